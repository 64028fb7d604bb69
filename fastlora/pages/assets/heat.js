// The heat map: all similarities on one canvas, which zooms to single cells with their numbers.

const MEASURES = { cosine: 'cosine', subspace: 'subspace overlap' };
const FONT = 'system-ui, "DejaVu Sans", sans-serif';
const TREE = 64, EDGE = 6, LABELS = 132, READABLE = 11, NUMBERED = 34, WIDEST = 72;

/** The three bytes of a colour of the style sheet. */
function rgb(name) {
  const hex = colour(name).replace('#', ''), full = hex.length === 3 ? [...hex].map((c) => c + c).join('') : hex;
  return [0, 2, 4].map((at) => parseInt(full.slice(at, at + 2), 16));
}

const hundredths = (value) => (Number.isFinite(value) ? value.toFixed(2).replace(/^-(0\.00)$/, '$1') : '–');

class Heat {
  constructor() {
    this.canvas = document.getElementById('heat-map');
    this.stored = { cosine: unpack(data.similar.cosine), subspace: unpack(data.similar.subspace) };
    this.norms = unpack(data.norm);
    this.measure = 'cosine';
    this.scale = 'fit';
    this.orders = {
      tree: data.similar.order,
      given: names.map((_, i) => i),
      norm: names.map((_, i) => i).sort((a, b) => this.norms[b] - this.norms[a]),
    };
    const measuring = this.canvas.getContext('2d');
    measuring.font = `12px ${FONT}`;
    this.longest = Math.min(LABELS, 12 + Math.max(...names.map((name) => measuring.measureText(name).width)));
    this.choose('tree');
    this.view = { x: 0, y: 0, n: k };
    this.cursor = { row: 0, column: Math.min(1, k - 1) };
    this.canvas.style.maxWidth = `${Math.max(520, Math.min(900, k * WIDEST + TREE + LABELS))}px`;
    this.listen();
    onTheme(() => this.redraw());
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    this.redraw();
  }

  choose(order) {
    this.ordering = order;
    this.order = this.orders[order];
  }

  at(i, j, measure = this.measure) {
    if (i === j) return this.norms[i] > 0 ? 1 : NaN;
    const [a, b] = i < j ? [i, j] : [j, i];
    return fraction(this.stored[measure][a * k - (a * (a + 1)) / 2 + b - a - 1]);
  }

  /** What the strongest colour stands for. */
  limit() {
    if (this.scale === 'one') return 1;
    let most = 0;
    for (const whole of this.stored[this.measure]) if (whole !== -32768) most = Math.max(most, Math.abs(whole));
    return Math.min(1, Math.max(most / QUANTUM, 0.001));
  }

  /** `value -> [red, green, blue]` in the colours of the theme. */
  palette() {
    const none = rgb('--none'), most = this.limit();
    const [low, high, negative] = this.measure === 'cosine'
      ? [rgb('--mid'), rgb('--pos'), rgb('--neg')] : [rgb('--low'), rgb('--high'), rgb('--high')];
    return (value) => {
      if (!Number.isFinite(value)) return none;
      const part = Math.min(1, Math.abs(value) / most), end = value < 0 ? negative : high;
      return low.map((from, c) => Math.round(from + part * (end[c] - from)));
    };
  }

  /** Colours every cell once; what is shown of them is scaled from that. */
  redraw() {
    const cells = document.createElement('canvas');
    cells.width = cells.height = k;
    const context = cells.getContext('2d'), image = context.createImageData(k, k), paint = this.palette(), self = rgb('--self');
    for (let r = 0, p = 0; r < k; r++) {
      for (let c = 0; c < k; c++, p += 4) {
        const [red, green, blue] = r === c ? self : paint(this.at(this.order[r], this.order[c]));
        image.data[p] = red; image.data[p + 1] = green; image.data[p + 2] = blue; image.data[p + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
    this.cells = cells;
    this.draw();
    this.legend(paint);
  }

  /** The square of cells inside the canvas: left, top, length, and of one cell. */
  frame() {
    const width = this.canvas.clientWidth, tree = width < 480 ? 36 : TREE;
    const labels = Math.min(this.longest, width / 4), labelled = (width - tree - labels) / this.view.n >= READABLE;
    const room = labelled ? labels : EDGE;
    const size = Math.max(80, width - tree - room);
    return { left: tree, top: EDGE, size, room, labelled, cell: size / this.view.n };
  }

  draw() {
    const { left, top, size, room, labelled, cell } = this.frame(), { x, y, n } = this.view;
    const width = left + size + room, height = top + size + room, ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    const context = this.canvas.getContext('2d');
    context.scale(ratio, ratio);
    context.imageSmoothingEnabled = cell * ratio < 1;
    context.drawImage(this.cells, x, y, n, n, left, top, size, size);
    context.strokeStyle = colour('--line');
    context.strokeRect(left - 0.5, top - 0.5, size + 1, size + 1);
    this.tree(context, left, top, size, cell);
    context.font = `${Math.min(12, Math.max(9, cell * 0.7))}px ${FONT}`;
    if (cell >= NUMBERED) this.numbers(context, left, top, cell);
    if (labelled) this.labels(context, left, top, size, room, cell);
    const at = { x: left + (this.cursor.column - x) * cell, y: top + (this.cursor.row - y) * cell };
    context.save();
    context.beginPath();
    context.rect(left, top, size, size);
    context.clip();
    context.lineWidth = 2;
    context.strokeStyle = colour('--fg');
    context.strokeRect(at.x, at.y, Math.max(3, cell), Math.max(3, cell));
    context.restore();
    this.canvas.dataset.cells = n.toFixed(2);
    this.canvas.dataset.at = `${this.cursor.row},${this.cursor.column}`;
  }

  numbers(context, left, top, cell) {
    const { x, y, n } = this.view, paint = this.palette(), self = rgb('--self');
    context.textAlign = 'center';
    context.textBaseline = 'middle';
    for (let r = Math.floor(y); r < Math.min(k, y + n); r++) {
      for (let c = Math.floor(x); c < Math.min(k, x + n); c++) {
        const found = this.at(this.order[r], this.order[c]), [red, green, blue] = r === c ? self : paint(found);
        const px = left + (c - x + 0.5) * cell, py = top + (r - y + 0.5) * cell;
        if (px < left || py < top) continue;
        context.fillStyle = 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? '#111' : '#fff';
        context.fillText(hundredths(found), px, py);
      }
    }
  }

  labels(context, left, top, size, room, cell) {
    const { x, y, n } = this.view;
    const fitted = (name) => {
      let text = name;
      while (text.length > 3 && context.measureText(text).width > room - 10) text = `${text.replace(/…$/, '').slice(0, -1)}…`;
      return text;
    };
    context.fillStyle = colour('--muted');
    context.textBaseline = 'middle';
    for (let r = Math.floor(y); r < Math.min(k, y + n); r++) {
      const at = top + (r - y + 0.5) * cell;
      if (at < top || at > top + size) continue;
      context.textAlign = 'left';
      context.fillText(fitted(names[this.order[r]]), left + size + 6, at);
    }
    context.textAlign = 'right';
    for (let c = Math.floor(x); c < Math.min(k, x + n); c++) {
      const at = left + (c - x + 0.5) * cell;
      if (at < left || at > left + size) continue;
      context.save();
      context.translate(at, top + size + 6);
      context.rotate(-Math.PI / 2);
      context.fillText(fitted(names[this.order[c]]), 0, 0);
      context.restore();
    }
  }

  /** The tree of average linkage beside the rows; a joint lies the further left the less alike its branches are. */
  tree(context, left, top, size, cell) {
    if (this.ordering !== 'tree' || !data.similar.joints) return;
    const joints = unpack(data.similar.joints), place = new Float64Array(2 * k - 1), height = new Float64Array(2 * k - 1);
    this.order.forEach((adapter, row) => { place[adapter] = row + 0.5; });
    let most = 1;
    for (let j = 0; j < k - 1; j++) most = Math.max(most, joints[3 * j + 2]);
    const across = (h) => left - 3 - (h / most) * (left - 8), down = (row) => top + (row - this.view.y) * cell;
    context.save();
    context.beginPath();
    context.rect(0, top, left, size);
    context.clip();
    context.strokeStyle = colour('--strong');
    context.lineWidth = k > 200 ? 0.6 : 1;
    context.beginPath();
    for (let j = 0; j < k - 1; j++) {
      const [a, b, h] = [joints[3 * j], joints[3 * j + 1], joints[3 * j + 2]];
      place[k + j] = (place[a] + place[b]) / 2;
      height[k + j] = h;
      context.moveTo(across(height[a]), down(place[a]));
      context.lineTo(across(h), down(place[a]));
      context.lineTo(across(h), down(place[b]));
      context.lineTo(across(height[b]), down(place[b]));
    }
    context.stroke();
    context.restore();
  }

  legend(paint) {
    const canvas = document.getElementById('heat-legend'), ratio = devicePixelRatio || 1, width = 240, most = this.limit();
    const low = this.measure === 'cosine' ? -most : 0;
    canvas.width = width * ratio;
    canvas.height = 34 * ratio;
    const context = canvas.getContext('2d');
    context.scale(ratio, ratio);
    for (let p = 0; p < width; p++) {
      context.fillStyle = `rgb(${paint(low + ((most - low) * p) / (width - 1)).join(',')})`;
      context.fillRect(p, 4, 1, 11);
    }
    context.fillStyle = colour('--muted');
    context.font = `11px ${FONT}`;
    for (const [value, align] of [[low, 'left'], [(low + most) / 2, 'center'], [most, 'right']]) {
      context.textAlign = align;
      context.fillText(Number(value.toPrecision(2)) + 0, (width * (value - low)) / (most - low || 1), 29);
    }
  }

  /** Shows `n` cells a side, so that the cell under a place of the canvas (from 0 to 1) stays where it is. */
  zoom(n, px = 0.5, py = 0.5) {
    const { x, y, n: before } = this.view;
    const next = Math.min(k, Math.max(Math.min(k, 4), n));
    this.look(x + px * (before - next), y + py * (before - next), next);
  }

  look(x, y, n = this.view.n) {
    const held = (v) => Math.min(k - n, Math.max(0, v));
    this.view = { x: held(x), y: held(y), n };
    this.draw();
  }

  /** Moves the cursor, brings it into view and says what is there. */
  point(row, column, follow = true) {
    const held = (v) => Math.min(k - 1, Math.max(0, v));
    this.cursor = { row: held(row), column: held(column) };
    if (follow) {
      const into = (from, at, n) => (at < from ? at : at + 1 > from + n ? at + 1 - n : from);
      this.look(into(this.view.x, this.cursor.column, this.view.n), into(this.view.y, this.cursor.row, this.view.n));
    } else this.draw();
    this.tell();
  }

  pair() {
    return [this.order[this.cursor.row], this.order[this.cursor.column]];
  }

  tell() {
    const [i, j] = this.pair(), told = document.getElementById('heat-told');
    const numbers = Object.entries(MEASURES).map(([measure, name]) => `${name} ${share(this.at(i, j, measure))}`);
    if (i !== j && this.norms[i] > 0) numbers.push(`ratio of norms ${number(this.norms[j] / this.norms[i])}`);
    told.replaceChildren(opener(i), i === j ? ' with itself: ' : ' × ', ...(i === j ? [] : [opener(j), ': ']), numbers.join(', '));
  }

  /** Where in the square a pointer is, from 0 to 1, and in which cell. */
  place(event) {
    const { left, top, size } = this.frame(), box = this.canvas.getBoundingClientRect();
    const px = (event.clientX - box.left - left) / size, py = (event.clientY - box.top - top) / size;
    const { x, y, n } = this.view;
    return { px, py, inside: px >= 0 && px < 1 && py >= 0 && py < 1, row: Math.floor(y + py * n), column: Math.floor(x + px * n) };
  }

  listen() {
    const canvas = this.canvas;
    let drag = null;
    canvas.addEventListener('pointerdown', (event) => {
      if (!this.place(event).inside) return;
      drag = { x: event.clientX, y: event.clientY, view: { ...this.view }, moved: false };
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener('pointermove', (event) => {
      if (drag === null) {
        const at = this.place(event);
        if (at.inside && event.pointerType === 'mouse' && document.activeElement !== canvas) this.point(at.row, at.column, false);
        return;
      }
      const { cell } = this.frame(), dx = event.clientX - drag.x, dy = event.clientY - drag.y;
      drag.moved ||= Math.hypot(dx, dy) > 4;
      if (drag.moved) this.look(drag.view.x - dx / cell, drag.view.y - dy / cell);
    });
    canvas.addEventListener('pointerup', (event) => {
      const at = this.place(event);
      if (drag && !drag.moved && at.inside) this.point(at.row, at.column);
      drag = null;
    });
    canvas.addEventListener('pointercancel', () => { drag = null; });
    canvas.addEventListener('dblclick', (event) => {
      const { px, py, inside } = this.place(event);
      if (inside) this.zoom(this.view.n / 2, px, py);
    });
    canvas.addEventListener('wheel', (event) => {
      const { px, py, inside } = this.place(event);
      if (!event.ctrlKey || !inside) return;
      event.preventDefault();
      this.zoom(this.view.n * 1.002 ** event.deltaY, px, py);
    }, { passive: false });
    canvas.addEventListener('keydown', (event) => this.key(event));
    const change = (id, then) => document.getElementById(id).addEventListener('change', (event) => then(event.target.value));
    change('heat-measure', (value) => { this.measure = value; this.redraw(); this.tell(); });
    change('heat-scale', (value) => { this.scale = value; this.redraw(); });
    change('heat-order', (value) => { this.choose(value); this.redraw(); this.tell(); });
    change('heat-find', (value) => this.find(value));
    const press = (id, then) => document.getElementById(id).addEventListener('click', then);
    press('heat-in', () => this.nearCursor(this.view.n / 2));
    press('heat-out', () => this.nearCursor(this.view.n * 2));
    press('heat-all', () => this.zoom(k));
    document.getElementById('heat-names').append(...names.map((name) => h('option', { value: name })));
  }

  nearCursor(n) {
    const { x, y, n: before } = this.view;
    const part = (at, from) => Math.min(1, Math.max(0, (at + 0.5 - from) / before));
    this.zoom(n, part(this.cursor.column, x), part(this.cursor.row, y));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = event.shiftKey ? 10 : 1, { row, column } = this.cursor;
    const moves = {
      ArrowUp: [row - step, column], ArrowDown: [row + step, column],
      ArrowLeft: [row, column - step], ArrowRight: [row, column + step],
      Home: [row, 0], End: [row, k - 1], PageUp: [0, column], PageDown: [k - 1, column],
    };
    if (event.key in moves) this.point(...moves[event.key]);
    else if (event.key === '+' || event.key === '=') this.nearCursor(this.view.n / 2);
    else if (event.key === '-') this.nearCursor(this.view.n * 2);
    else if (event.key === '0') this.zoom(k);
    else if (event.key === 'Enter') [...new Set(this.pair())].reverse().forEach((i) => openCard(i));
    else return;
    event.preventDefault();
  }

  /** The adapter of a name, or the first whose name holds the text: its row and column come to the middle. */
  find(value) {
    const wanted = value.trim().toLowerCase();
    if (!wanted) return;
    let i = names.findIndex((name) => name.toLowerCase() === wanted);
    if (i < 0) i = names.findIndex((name) => name.toLowerCase().includes(wanted));
    const told = document.getElementById('heat-told');
    if (i < 0) {
      told.textContent = `No adapter is called ${value.trim()}.`;
      return;
    }
    const at = this.order.indexOf(i), n = Math.min(k, Math.max(4, Math.min(this.view.n, 24)));
    this.look(Math.round(at - n / 2), Math.round(at - n / 2), n);
    this.point(at, at);
  }
}
