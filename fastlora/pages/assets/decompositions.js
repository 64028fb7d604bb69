// One decomposition: eigenvalues of every module beside the chance edge, and the energy that is shared by layer.

const SHOWN = 30, PANELS = 8; // modules and adapters that are drawn at first

const chains = (() => {
  const stored = data.decompositions, values = {};
  for (const name of ['module', 'shared', 'edge', 'expected', 'values', 'energy']) values[name] = unpack(stored[name]);
  let at = 0; // shares of energy that lie before a report
  const reports = stored.reports.map((report, i) => {
    const first = stored.starts[i], count = stored.starts[i + 1] - first, energy = at;
    at += count * report.adapters.length;
    return { ...report, first, count, energy };
  });
  return { ...values, width: stored.values.s[1], reports, threshold: stored.threshold };
})();

function chainRows(report) {
  const rows = [];
  for (let n = 0; n < report.count; n++) {
    const at = report.first + n, width = report.adapters.length;
    rows.push({
      module: chains.module[at], shared: chains.shared[at], edge: fraction(chains.edge[at]), expected: chains.expected[at],
      values: [...chains.values.subarray(at * chains.width, (at + 1) * chains.width)].map(fraction).filter(Number.isFinite),
      energy: [...chains.energy.subarray(report.energy + n * width, report.energy + (n + 1) * width)].map(fraction),
    });
  }
  return rows;
}

function spectrumDots(rows) {
  const width = 760, high = 17, left = 250, right = 16, top = 6;
  const x = (v) => left + Math.max(0, Math.min(1, v)) * (width - left - right);
  const bottom = top + rows.length * high, marks = [];
  for (const v of [0, 0.25, 0.5, 0.75, 1]) marks.push(line(x(v), top, x(v), bottom, 'axis'), text(x(v), bottom + 15, String(v), 'middle'));
  if (chains.threshold !== null) marks.push(line(x(chains.threshold), top, x(chains.threshold), bottom, 'tau'));
  rows.forEach((row, n) => {
    const y = top + (n + 0.5) * high, name = data.modules[row.module];
    marks.push(text(left - 8, y + 4, clipped(name, 38), 'end', {}), line(x(row.edge), y - 6, x(row.edge), y + 6, 'edge'));
    row.values.forEach((v) => marks.push(s('circle', { class: 'dot', cx: x(v).toFixed(1), cy: y, r: 4 }, s('title', {}, `${name}: ${share(v)}`))));
  });
  return picture(width, bottom + 22, 'Eigenvalues by module beside the chance edge; the table below has the numbers', ...marks);
}

/** Bars of `‖ΔW‖²` by layer, as shares of the adapter's; the shared part is strong, the unique part pale. */
function energyBars(report, rows, column) {
  const i = report.adapters[column], whole = new Float64Array(data.layers.length), shared = new Float64Array(data.layers.length);
  for (let m = 0; m < M; m++) if (Number.isFinite(many.norms[i * M + m])) whole[data.layer[m]] += many.norms[i * M + m] ** 2;
  for (const row of rows) {
    const part = row.energy[column];
    if (Number.isFinite(part)) shared[data.layer[row.module]] += part * many.norms[i * M + row.module] ** 2;
  }
  const total = whole.reduce((a, b) => a + b, 0), all = shared.reduce((a, b) => a + b, 0), most = Math.max(...whole, 1e-300);
  const width = 320, height = 96, bottom = 18, across = width / data.layers.length;
  const bars = data.layers.flatMap((layer, l) => {
    const bar = (size, name) => s('rect', {
      class: name, x: (l * across + across * 0.08).toFixed(2), width: (across * 0.84).toFixed(2),
      y: (height - bottom - size).toFixed(2), height: size.toFixed(2),
    }, s('title', {}, `${layer}: ${percent(whole[l] / total)} of ‖ΔW‖², ${percent(shared[l] / (whole[l] || 1))} of it shared`));
    return [bar(((height - bottom) * whole[l]) / most, 'weak'), bar(((height - bottom) * shared[l]) / most, 'bar')];
  });
  const label = `Energy of ${names[i]} by layer: ${percent(all / total)} shared`;
  return figure(h('span', {}, opener(i), ` ${percent(all / total)} shared`), picture(width, height, label, ...bars,
    line(0, height - bottom, width, height - bottom, 'axis'), text(0, height - 5, clipped(data.layers[0], 24)),
    text(width, height - 5, clipped(data.layers[data.layers.length - 1], 24), 'end')));
}

function chainTable(report, rows) {
  const few = report.adapters.length <= 6;
  const headings = [['module'], ['shared', true], ['by chance', true], ['chance edge', true], ['largest eigenvalues'],
    ...(few ? report.adapters.map((i) => [`${names[i]} %`, true]) : [['mean energy %', true]])];
  const body = rows.map((row) => {
    const known = row.energy.filter(Number.isFinite), mean = known.reduce((a, b) => a + b, 0) / (known.length || 1);
    const energies = (few ? row.energy : [mean]).map((part) => cell(Number.isFinite(part) ? (100 * part).toFixed(1) : '–', Number.isFinite(part) ? part : ''));
    return h('tr', {}, h('th', { scope: 'row' }, data.modules[row.module]), cell(row.shared, row.shared), cell(number(row.expected), row.expected),
      cell(share(row.edge), row.edge), h('td', { 'data-v': row.values[0] }, row.values.slice(0, 4).map(share).join('  ')), ...energies);
  });
  return scrolling('Modules of the decomposition', headings, body);
}

/** Shows a report; `go`: brings it into view and takes the focus there. */
function openReport(n, go) {
  const report = chains.reports[n], rows = chainRows(report), place = document.getElementById('report');
  const order = [...rows].sort((a, b) => b.shared - a.shared || (b.values[0] || 0) - (a.values[0] || 0));
  const chart = h('div', { class: 'wide' }, spectrumDots(order.slice(0, SHOWN)));
  const panels = h('div', { class: 'energies' }, ...report.adapters.slice(0, PANELS).map((_, column) => energyBars(report, rows, column)));
  const more = (count, what, then) => {
    const button = h('button', { type: 'button' }, `Show all ${count} ${what}`);
    button.addEventListener('click', () => { then(); button.remove(); });
    return button;
  };
  const title = h('h3', { tabindex: -1 }, report.title);
  const key = h('ul', { class: 'legend' },
    ...[['dot', 'an eigenvalue'], ['edge', 'chance edge of the module'],
      ...(chains.threshold === null ? [] : [['tau', `τ = ${number(chains.threshold)}`]])].map(([name, told]) =>
      h('li', {}, s('svg', { viewBox: '0 0 22 8', 'aria-hidden': 'true' },
        name === 'dot' ? s('circle', { class: name, cx: 11, cy: 4, r: 4 }) : line(11, 0, 11, 8, name)), told)));
  place.replaceChildren(...[
    title,
    ...(chains.reports.length > 1 ? report.warnings.map((told) => h('p', { class: 'notice warning' }, told)) : []),
    h('h5', {}, 'Eigenvalues by module, most shared first'), key, chart,
    rows.length > SHOWN && more(rows.length, 'modules', () => chart.replaceChildren(spectrumDots(order))),
    h('h5', {}, 'Energy by layer: shared (strong) and unique (pale), as a share of ‖ΔW‖² of the adapter'), panels,
    report.adapters.length > PANELS && more(report.adapters.length, 'adapters', () =>
      panels.replaceChildren(...report.adapters.map((_, column) => energyBars(report, rows, column)))),
    h('h5', {}, 'In numbers'), chainTable(report, rows),
  ].filter(Boolean));
  if (go) {
    title.scrollIntoView({ block: 'start' });
    title.focus({ preventScroll: true });
  }
}
