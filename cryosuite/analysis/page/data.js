// The numbers of the page: columns of particles, unpacked from their binary text when first asked for.
const byId = (id) => document.getElementById(id);
const meta = JSON.parse(byId("meta").textContent);
const columns = new Map(meta.columns.map((column) => [column.name, column]));
const unpacked = new Map();
const ARRAYS = { u8: Uint8Array, u16: Uint16Array, u32: Uint32Array, f32: Float32Array };

function bytesOf(id) {
  const text = atob(byId(id).textContent);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

/** Values of a column, one per particle, NaN where unknown. Codes of names stay codes. */
function valuesOf(name) {
  if (unpacked.has(name)) return unpacked.get(name);
  const column = columns.get(name);
  if (column.kind === "count") {
    unpacked.set(name, Float64Array.from({ length: meta.particles }, (_, i) => i));
    return unpacked.get(name);
  }
  const stored = new ARRAYS[column.kind](bytesOf("column-" + column.number).buffer);
  const missing = { u8: 255, u16: 65535, u32: 4294967295, f32: NaN }[column.kind];
  const values = column.whole && column.kind !== "f32" ? new Float64Array(stored.length) : new Float32Array(stored.length);
  for (let i = 0; i < stored.length; i++) {
    values[i] = stored[i] === missing ? NaN : column.low + column.step * stored[i];
  }
  unpacked.set(name, values);
  return values;
}

const grouped = new Intl.NumberFormat("en-GB");
const whole = (value) => grouped.format(value);
const percent = (part, all) => (all ? (100 * part / all).toFixed(part / all < 0.0995 ? 1 : 0) : "0") + " %";
const unitText = (unit) => (unit === "A" ? "Å" : unit === "degrees" ? "°" : unit);

/** A number of a column in words, with its unit. */
function inWords(column, value) {
  if (!Number.isFinite(value)) return "unknown";
  if (column.names.length) return column.names[value];
  const size = Math.abs(value);
  const text = column.whole ? String(Math.round(value)) : size >= 1000 ? whole(Math.round(value))
    : size && size < 0.001 ? value.toExponential(2) : String(+value.toPrecision(4));
  const unit = unitText(column.unit);
  return text + (unit ? (unit === "°" ? "°" : "\u00a0" + unit) : "");
}

/** An element with properties, attributes and children; text never becomes HTML. */
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "class") element.className = value;
    else if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key in element && key !== "list") element[key] = value;
    else element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

const rgbOf = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));

/** 256 colours [r, g, b] between some ``#rrggbb``. */
function ramp(stops) {
  const known = stops.map(rgbOf);
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (known.length - 1);
    const low = Math.min(Math.floor(at), known.length - 2);
    return known[low].map((value, k) => value + (at - low) * (known[low + 1][k] - value));
  });
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const isDark = () => css("--dark") === "1";

const MARGIN = { l: 56, r: 14, t: 10, b: 44 };

/** What all plots share in the present theme. */
function plotLayout(more) {
  const axis = { showgrid: false, zeroline: false, linecolor: css("--line"), tickcolor: css("--line"), ticks: "outside",
    ticklen: 4, showline: true, title: { standoff: 6 }, automargin: false };
  return {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: false,
    font: { family: "inherit", size: 12, color: css("--quiet") },
    margin: MARGIN,
    ...more,
    xaxis: { ...axis, ...(more.xaxis || {}) },
    yaxis: { ...axis, ...(more.yaxis || {}) },
  };
}
/** plotly, which lies at the end of the page as text and is run once all particles have been drawn. */
const plotly = new Promise((resolve) => {
  const run = () => requestAnimationFrame(() => setTimeout(() => {
    document.head.append(make("script", { textContent: byId("plotly").textContent }));
    resolve(window.Plotly);
  }, 0));
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", run);
  else run();
});
const PLOT_CONFIG = { displayModeBar: false, responsive: true, displaylogo: false, showLink: false, scrollZoom: false,
  doubleClick: false };

async function copyText(text, button) {
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    const area = make("textarea", { value: text, class: "offscreen" });
    document.body.append(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
  }
  const before = button.dataset.label || button.textContent;
  button.dataset.label = before;
  button.textContent = done ? "Copied" : "Press Ctrl+C";
  setTimeout(() => { button.textContent = before; }, 1600);
}

function download(name, text, kind) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
