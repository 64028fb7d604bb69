// Puts everything to work.

const FIRST_CARDS = 8, FEW = 16; // cards that are there at first, adapters that have a bar of their own

/** Of a few adapters a bar for each and for the closest pairs; of many how norms and cosines are distributed. */
function drawOverview(place) {
  const totals = unpack(data.norm), cosines = [...unpack(data.similar.cosine)].map(fraction);
  if (k <= FEW) {
    const pairs = [];
    for (let i = 0, at = 0; i < k; i++) for (let j = i + 1; j < k; j++, at++) pairs.push([`${names[i]} × ${names[j]}`, cosines[at]]);
    const closest = pairs.filter(([, v]) => Number.isFinite(v)).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, Math.max(4, k));
    place.append(bars('‖ΔW‖ of the adapters', names.map((name, i) => [name, totals[i]]), 'Norms; the table of adapters has the numbers'));
    if (closest.length) place.append(bars('The largest cosines of pairs', closest, 'The closest pairs and their cosines', share));
    return;
  }
  const known = cosines.filter(Number.isFinite);
  const [low, high] = known.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [0, 0.01]);
  place.append(histogram('‖ΔW‖ of the adapters', totals, 0, Math.max(...totals) || 1, 'How many adapters have which norm; the table of adapters has the numbers'));
  place.append(histogram('Cosines of all pairs', known, low, high, `How many pairs have which cosine, from ${share(low)} to ${share(high)}`, share));
}

document.getElementById('scripts-off').remove();
document.getElementById('heat').hidden = false;
const heat = new Heat();
heat.tell();

for (const table of document.querySelectorAll('table[data-sorted]')) sortable(table);
for (const table of document.querySelectorAll('table[id]')) filterable(table);

drawOverview(document.getElementById('overview-charts'));

/** Cards that are there from the start: all of a small pool; of a large one the results and those that are odd. */
const first = k <= FIRST_CARDS ? names.map((_, i) => i) : data.adapters.map((adapter, i) => [i, adapter])
  .sort(([, a], [, b]) => b.is_result - a.is_result || b.oddities.length - a.oddities.length).slice(0, 3).map(([i]) => i);
[...first].reverse().forEach((i) => openCard(i, false));
if (chains.reports.length) openReport(data.decompositions.first, false);

document.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (button && button.dataset.card !== undefined) openCard(Number(button.dataset.card));
  else if (button && button.dataset.report !== undefined) openReport(Number(button.dataset.report), true);
});
