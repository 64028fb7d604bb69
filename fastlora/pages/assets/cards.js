// A card for an adapter: norms by layer and kind of module, ranks, spectra, what is odd about it.

const LINES = 8; // spectra that one chart has
const many = {
  norms: unpack(data.norms), ranks: unpack(data.ranks), numerical: unpack(data.numerical),
  effective: unpack(data.effective), spectra: unpack(data.spectra),
};
const M = data.modules.length;

/** `√Σ‖ΔW‖²` of the modules of every layer and kind: NaN where there are none. */
function norms(i) {
  const sums = new Map();
  for (let m = 0; m < M; m++) {
    const norm = many.norms[i * M + m], at = data.layer[m] * data.kinds.length + data.kind[m];
    if (Number.isFinite(norm)) sums.set(at, (sums.get(at) || 0) + norm * norm);
  }
  return (layer, kind) => {
    const sum = sums.get(layer * data.kinds.length + kind);
    return sum === undefined ? NaN : Math.sqrt(sum);
  };
}

function spectra(i, at) {
  const K = data.kinds.length, J = data.directions.length;
  const energy = (kind) => data.layers.reduce((sum, _, layer) => sum + (at(layer, kind) || 0) ** 2, 0);
  return data.kinds.map((name, kind) => ({
    name, kind, energy: energy(kind), values: [...many.spectra.subarray((i * K + kind) * J, (i * K + kind + 1) * J)],
  })).filter(({ values }) => values.some((v) => v > 0)).sort((a, b) => b.energy - a.energy);
}

function nearest(i) {
  const found = [];
  for (let j = 0; j < k; j++) if (j !== i) found.push([j, heat.at(i, j, 'cosine'), heat.at(i, j, 'subspace')]);
  found.sort((a, b) => (Number.isFinite(b[1]) ? b[1] : -2) - (Number.isFinite(a[1]) ? a[1] : -2));
  return found.slice(0, 5);
}

const heading = (name, numeric) => h('th', { scope: 'col', class: numeric ? 'number' : null }, name);
const cell = (content, sorted) => h('td', { class: 'number', 'data-v': sorted }, content);

/** A table that scrolls, with headings `[name, whether its column holds numbers]`. */
function scrolling(label, headings, rows) {
  const table = h('table', {}, h('thead', {}, h('tr', {}, ...headings.map((args) => heading(...args)))), h('tbody', {}, ...rows));
  sortable(table);
  return h('div', { class: 'scroll', tabindex: 0, role: 'region', 'aria-label': label }, table);
}

function modulesTable(i) {
  const rows = data.modules.map((module, m) => [module, i * M + m]).filter(([, at]) => many.ranks[at] >= 0).map(([module, at]) =>
    h('tr', {}, h('th', { scope: 'row' }, module), cell(rankText(many.ranks[at], many.numerical[at]), many.ranks[at]),
      cell(many.effective[at].toFixed(1), many.effective[at]), cell(number(many.norms[at]), many.norms[at])));
  const headings = [['module'], ['rank', true], ['effective', true], ['‖ΔW‖', true]];
  return scrolling(`Modules of ${names[i]}`, headings, rows);
}

const rankText = (stored, numerical) => (stored === numerical ? `${stored}` : `${stored} (${numerical})`);

/** Filled when it is opened for the first time. */
function later(title, make) {
  const details = h('details', {}, h('summary', {}, title));
  details.addEventListener('toggle', () => { if (details.open && details.childElementCount === 1) details.append(make()); });
  return details;
}

function card(i) {
  const adapter = data.adapters[i], at = norms(i), lines = spectra(i, at), id = `card-${i}`;
  const ranks = adapter.least_rank === adapter.most_rank ? adapter.most_rank : `${adapter.least_rank}–${adapter.most_rank}`;
  const facts = [
    ['base model', adapter.base], ['modules', `${adapter.modules}, rank ${ranks}, ${adapter.dtype}`],
    ['‖ΔW‖', number(adapter.norm)], ['effective rank', `${adapter.effective.toFixed(1)} on average`],
    ['family', adapter.family === null ? 'none' : String(adapter.family + 1)],
  ];
  const closer = h('button', { type: 'button', 'aria-label': `Close the card of ${adapter.name}` }, '×');
  const rows = nearest(i).map(([j, cosine, subspace]) =>
    h('tr', {}, h('th', { scope: 'row' }, opener(j)), cell(share(cosine), cosine), cell(share(subspace), subspace)));
  const made = h('article', { class: 'card', id, tabindex: -1, 'aria-labelledby': `${id}-name` },
    h('header', {}, h('h4', { id: `${id}-name` }, adapter.name), closer),
    adapter.oddities.length > 0 && h('ul', { class: 'odd', 'aria-label': 'Oddities' }, ...adapter.oddities.map((told) => h('li', {}, told))),
    h('dl', { class: 'facts' }, ...facts.flatMap(([name, told]) => [h('dt', {}, name), h('dd', {}, told)])),
    h('h5', {}, '‖ΔW‖ by layer and kind of module'),
    grid(data.layers, data.kinds, at, `‖ΔW‖ of ${adapter.name} by layer and kind of module; the table of modules has the numbers`),
    lines.length > 0 && h('h5', {}, `Share of ‖ΔW‖² by direction${lines.length > LINES ? `: the ${LINES} largest of ${lines.length} kinds` : ''}`),
    ...(lines.length ? spectrumLines(lines.slice(0, LINES), data.directions, `Spectra of ${adapter.name} by kind of module`) : []),
    h('h5', {}, 'Nearest'),
    scrolling(`Nearest to ${adapter.name}`, [['adapter'], ['cosine', true], ['subspace', true]], rows),
    later('All modules', () => modulesTable(i)),
    data.provenance[i] !== '' && later('How it came about', () => h('pre', {}, data.provenance[i])),
    adapter.notes.length > 0 && later('Notes', () => h('ul', {}, ...adapter.notes.map((note) => h('li', {}, note)))),
  );
  closer.addEventListener('click', () => {
    made.remove();
    document.getElementById('cards').focus();
  });
  return made;
}

/** Puts the card of an adapter first, or finds it where it is, and goes there. */
function openCard(i, go = true) {
  const there = document.getElementById(`card-${i}`), made = there || card(i);
  if (!there) document.getElementById('cards').prepend(made);
  if (go) {
    made.scrollIntoView({ block: 'nearest' });
    made.focus({ preventScroll: true });
  }
}
