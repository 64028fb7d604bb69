// What all scripts share: the data, elements, numbers as text.
const data = JSON.parse(document.getElementById('data').textContent);
const TYPES = { f4: Float32Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array };

/** The numbers of an array of the page, in the order of memory; stored integers stay as they are. */
function unpack(stored) {
  const text = atob(stored.b);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new TYPES[stored.t](bytes.buffer);
}

/** A share or cosine out of its stored integer: NaN where it is not known. */
const QUANTUM = 32767;
const fraction = (whole) => (whole === -32768 ? NaN : whole / QUANTUM);

const names = data.adapters.map((adapter) => adapter.name);
const k = names.length;

/** An element with attributes and children; texts become text, never markup. */
function h(tag, attributes, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function s(tag, attributes, ...children) {
  return filled(document.createElementNS('http://www.w3.org/2000/svg', tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** As the tables print numbers: four digits from 1 on, else three. */
function number(value) {
  if (!Number.isFinite(value)) return '–';
  if (value === 0) return '0';
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(size >= 1 ? 4 : 3)));
}

const share = (value) => (Number.isFinite(value) ? value.toFixed(3).replace(/^-(0\.000)$/, '$1') : '–');
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(1)} %` : '–');

/** A button that opens the card of an adapter. */
const opener = (i) => h('button', { type: 'button', class: 'link name', 'data-card': i }, names[i]);

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Calls back when colours change: another theme, or paper. */
function onTheme(redraw) {
  for (const query of ['(prefers-color-scheme: dark)', 'print']) matchMedia(query).addEventListener('change', redraw);
  addEventListener('beforeprint', redraw);
  addEventListener('afterprint', redraw);
}
