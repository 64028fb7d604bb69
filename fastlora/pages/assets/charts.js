// Small charts as SVG: their colours are those of the style sheet, so they follow the theme.

const figure = (title, ...children) => h('figure', { class: 'chart' }, h('figcaption', {}, title), ...children);

/** A picture with a sentence for those who cannot see it. */
const picture = (width, height, label, ...children) =>
  s('svg', { viewBox: `0 0 ${width} ${height}`, role: 'img', 'aria-label': label }, ...children);

const text = (x, y, content, anchor = 'start', more = {}) => s('text', { x, y, 'text-anchor': anchor, ...more }, content);
const line = (x1, y1, x2, y2, name) => s('line', { x1, y1, x2, y2, class: name });

/** How many values lie in each of some bins, as bars. */
function histogram(title, values, low, high, label, format = number) {
  const known = [...values].filter(Number.isFinite);
  const bins = Math.max(8, Math.min(48, Math.round(2 * Math.sqrt(known.length))));
  const width = 420, height = 120, bottom = 22, top = 14;
  const counts = new Array(bins).fill(0);
  const span = high - low || 1;
  known.forEach((v) => counts[Math.min(bins - 1, Math.max(0, Math.floor((bins * (v - low)) / span)))]++);
  const most = Math.max(1, ...counts);
  const bars = counts.map((count, i) => {
    const tall = count && Math.max(1.5, ((height - bottom - top) * count) / most);
    const from = low + (span * i) / bins;
    return s('rect', { class: 'bar', x: (width * i) / bins + 0.5, y: height - bottom - tall, width: width / bins - 1, height: tall },
      s('title', {}, `${format(from)} to ${format(from + span / bins)}: ${count}`));
  });
  return figure(title, picture(width, height, label, ...bars, line(0, height - bottom, width, height - bottom, 'axis'),
    text(0, height - 7, format(low)), text(width, height - 7, format(high), 'end'), text(width, 10, `most in a bin: ${most}`, 'end')));
}

/** A bar for each of a few: `[name, value]`, what is negative in another colour. */
function bars(title, rows, label, format = number) {
  const width = 420, high = 19, left = 170, right = 52, most = Math.max(...rows.map(([, v]) => Math.abs(v)), 1e-300);
  const marks = rows.flatMap(([name, v], n) => {
    const y = n * high, long = (Math.abs(v) / most) * (width - left - right);
    return [
      text(left - 8, y + 13, clipped(name, 28), 'end'),
      s('rect', { class: v < 0 ? 'bar minus' : 'bar', x: left, y: y + 3, width: Math.max(1, long).toFixed(1), height: high - 6 }, s('title', {}, name)),
      text(left + long + 6, y + 13, format(v)),
    ];
  });
  return figure(title, picture(width, rows.length * high, label, ...marks));
}

/** Of a kind the same everywhere: eight colours, then the same dashed. */
const stroke = (kind) => ({ class: `line s${kind % 8}`, 'stroke-dasharray': kind % 16 < 8 ? null : '5 3' });

/** Lines over the same x, on a logarithmic scale of y: `{name, kind, values}` each. */
function spectrumLines(series, xs, label) {
  const width = 320, height = 150, left = 40, bottom = 26, top = 6;
  const all = series.flatMap(({ values }) => values.filter((v) => v > 0));
  const most = Math.max(...all, 1e-12), least = Math.max(Math.min(...all, most), most * 1e-6);
  const decades = Math.max(1, Math.ceil(Math.log10(most / least)));
  const highest = Math.ceil(Math.log10(most));
  const last = Math.max(1, xs.length ? xs[xs.length - 1] : 1);
  const x = (j) => left + ((width - left) * xs[j]) / last;
  const y = (v) => top + ((height - top - bottom) * (highest - Math.log10(v))) / decades;
  const grid = [];
  for (let d = 0; d <= decades; d += Math.max(1, Math.ceil(decades / 4))) {
    const at = y(10 ** (highest - d));
    grid.push(line(left, at, width, at, 'axis'), text(left - 5, at + 4, powerOfTen(highest - d), 'end'));
  }
  const lines = series.map(({ values, kind }) => s('polyline', {
    ...stroke(kind),
    points: values.map((v, j) => [v, j]).filter(([v]) => v >= least).map(([v, j]) => `${x(j).toFixed(1)},${y(v).toFixed(1)}`).join(' '),
  }));
  return [
    picture(width, height, label, ...grid, ...lines, text(left, height - 6, '1'), text(width, height - 6, String(last + 1), 'end'),
      text((left + width) / 2, height - 6, 'direction', 'middle')),
    h('ul', { class: 'legend' }, ...series.map(({ name, kind }) => h('li', {},
      s('svg', { viewBox: '0 0 22 8', 'aria-hidden': 'true' }, s('line', { x1: 0, y1: 4, x2: 22, y2: 4, ...stroke(kind) })), name))),
  ];
}

const powerOfTen = (exponent) => (exponent === 0 ? '1' : exponent === -1 ? '0.1' : exponent === -2 ? '0.01' : `1e${exponent}`);

/** Layers down, kinds across: a cell is the darker the larger its value. */
function grid(rows, columns, at, label) {
  const labels = Math.max(64, Math.min(92, 8 + 6 * Math.max(0, ...rows.map((name) => name.length))));
  const width = 320, high = rows.length > 40 ? 5 : 13, top = 4, foot = 58;
  const across = Math.min(90, (width - labels) / Math.max(1, columns.length));
  const cells = [];
  let most = 0;
  for (let r = 0; r < rows.length; r++) for (let c = 0; c < columns.length; c++) most = Math.max(most, at(r, c) || 0);
  const every = Math.max(1, Math.ceil(rows.length / (rows.length > 40 ? 20 : 40)));
  rows.forEach((name, r) => {
    if (r % every === 0) cells.push(text(labels - 5, top + r * high + Math.max(high, 10) - 2, clipped(name, 13), 'end'));
    columns.forEach((column, c) => {
      const found = at(r, c), place = { x: labels + c * across + 0.5, y: top + r * high + 0.5, width: across - 1, height: high - 1 };
      cells.push(Number.isFinite(found)
        ? s('rect', { class: 'cell', ...place, 'fill-opacity': (0.04 + (0.96 * found) / (most || 1)).toFixed(3) },
            s('title', {}, `${name}, ${column}: ${number(found)}`))
        : s('rect', { class: 'absent', ...place }));
    });
  });
  const below = top + rows.length * high;
  columns.forEach((column, c) => {
    const x = labels + (c + 0.5) * across, y = below + 11;
    cells.push(text(x + 3, y, clipped(column, 15), 'end', { transform: `rotate(-30 ${x + 3} ${y})` }));
  });
  return picture(width, below + foot, label, ...cells);
}

const clipped = (name, most) => (name.length <= most ? name : `…${name.slice(1 - most)}`);
