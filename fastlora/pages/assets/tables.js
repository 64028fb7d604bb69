// Tables that are sorted by their headings and filtered by inputs; `data-v` of a cell is what it is sorted by.

function value(row, column) {
  const cell = row.cells[column];
  const text = 'v' in cell.dataset ? cell.dataset.v : cell.textContent.trim();
  return text === '' || text === '–' ? null : text;
}

function sortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = h('button', { type: 'button' }, ...heading.childNodes);
    heading.replaceChildren(button);
    button.addEventListener('click', () => {
      const down = heading.getAttribute('aria-sort') === 'ascending' ||
        (!heading.hasAttribute('aria-sort') && heading.classList.contains('number'));
      headings.forEach((other) => other.removeAttribute('aria-sort'));
      heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      sortRows(table.tBodies[0], column, heading.classList.contains('number'), down ? -1 : 1);
    });
  });
}

/** Rows in the order of a column; those without a value come last in both directions. */
function sortRows(body, column, numeric, direction) {
  const collator = new Intl.Collator('en', { numeric: true });
  const keyed = [...body.rows].map((row) => ({ row, key: value(row, column) }));
  keyed.sort((a, b) => {
    if (a.key === null || b.key === null) return (a.key === null) - (b.key === null);
    return direction * (numeric ? Number(a.key) - Number(b.key) : collator.compare(a.key, b.key));
  });
  body.append(...keyed.map(({ row }) => row));
}

/** Shows the rows that fit all inputs of a table: texts are looked for, other inputs compare a `data-` attribute. */
function filterable(table) {
  const inputs = [...document.querySelectorAll(`[data-filters="${table.id}"]`)];
  if (!inputs.length) return;
  const rows = [...table.tBodies[0].rows].map((row) => ({ row, text: row.textContent.toLowerCase() }));
  const count = document.getElementById(`${table.id}-count`);
  const fits = ({ row, text }) => inputs.every((input) => {
    const wanted = input.type === 'checkbox' ? (input.checked ? input.value : '') : input.value.trim();
    if (wanted === '') return true;
    return input.dataset.column ? row.dataset[input.dataset.column] === wanted : text.includes(wanted.toLowerCase());
  });
  const apply = () => {
    let shown = 0;
    for (const entry of rows) {
      entry.row.hidden = !fits(entry);
      shown += !entry.row.hidden;
    }
    if (count) count.textContent = `${shown} of ${rows.length}`;
  };
  inputs.forEach((input) => input.addEventListener('input', apply));
  apply();
}
