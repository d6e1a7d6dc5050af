// The map of particles: axes by plotly, dots by dots.js; colouring, hovering, choosing.
const state = { space: 0, x: "", y: "", colour: "cluster", focus: -1, spotlight: false, category: -1, chosen: null, tool: "zoom" };
const plot = byId("plot");
const canvas = byId("dots");
const tip = byId("tip");
const listeners = { focus: [], chosen: [] };
let places = null;
let finder = null;
let view = null;
let shading = null;
let waiting = false;

const labels = () => valuesOf("cluster");
const spaceOf = () => meta.spaces[state.space] || { equal: false };

/** Ranges of an axis: all particles, unless a few far ones would squeeze the rest. */
function rangeOf(values) {
  const step = Math.max(1, Math.floor(values.length / 20000));
  const known = [];
  let [low, high] = [Infinity, -Infinity];
  for (let i = 0; i < values.length; i++) {
    if (Number.isNaN(values[i])) continue;
    if (values[i] < low) low = values[i];
    if (values[i] > high) high = values[i];
    if (i % step === 0) known.push(values[i]);
  }
  if (!(high >= low)) return [0, 1];
  known.sort((a, b) => a - b);
  if (known.length > 200) {
    const inner = [known[Math.floor(0.002 * known.length)], known[Math.ceil(0.998 * known.length) - 1]];
    if (high - low > 2 * (inner[1] - inner[0]) && inner[1] > inner[0]) [low, high] = inner;
  }
  const margin = high > low ? 0.05 * (high - low) : Math.max(1, Math.abs(low) * 0.05);
  return [low - margin, high + margin];
}

/** Where the number of each cluster stands: at the particle nearest to its middle. */
function clusterPlaces(xs, ys) {
  const own = labels();
  const rows = meta.clusters.map(() => []);
  const step = Math.max(1, Math.floor(own.length / 60000));
  for (let i = 0; i < own.length; i += step) {
    if (own[i] >= 0 && !Number.isNaN(xs[i]) && !Number.isNaN(ys[i])) rows[own[i]].push(i);
  }
  return rows.map((list) => {
    if (!list.length) return null;
    const middle = [xs, ys].map((of) => list.map((i) => of[i]).sort((a, b) => a - b)[list.length >> 1]);
    let [best, least] = [list[0], Infinity];
    for (const i of list) {
      const apart = (xs[i] - middle[0]) ** 2 + (ys[i] - middle[1]) ** 2;
      if (apart < least) [least, best] = [apart, i];
    }
    return [xs[best], ys[best]];
  });
}

function axisTitle(name) {
  const column = columns.get(name);
  const more = meta.variance[name] ? `, ${meta.variance[name]} of the variance` : "";
  const unit = unitText(column.unit);
  return (column.title || name) + more + (unit ? ` (${unit})` : "");
}

/** Shade of each particle for the present colouring: {kind, index, colours, ...}. */
function shadingOf(name) {
  if (name === "density") return { kind: "density", colours: ramp(isDark() ? meta.ramps.densityDark : meta.ramps.density) };
  const column = columns.get(name);
  const values = valuesOf(name);
  const grey = rgbOf(meta.grey);
  const index = new Uint16Array(values.length);
  if (column.categories) {
    const at = new Map(column.categories.map((entry, i) => [entry.value, i]));
    const colours = [...column.categories.map((entry) => rgbOf(entry.colour)), grey];
    for (let i = 0; i < values.length; i++) index[i] = at.get(values[i]) ?? colours.length - 1;
    return { kind: "category", column, index, colours };
  }
  const [low, high] = column.cyclic ? [-180, 180] : column.shown;
  const colours = [...ramp(column.cyclic ? meta.ramps.cyclic : meta.ramps.path), grey];
  for (let i = 0; i < values.length; i++) {
    const part = high > low ? (values[i] - low) / (high - low) : 0.5;
    index[i] = Number.isNaN(part) ? 256 : Math.min(255, Math.max(0, Math.round(255 * part)));
  }
  return { kind: "number", column, index, colours, low, high };
}

/** 1 for particles that stand back: outside the chosen ones, the focused cluster or the picked category. */
function fadedOf() {
  const count = meta.particles;
  if (state.chosen) {
    const faded = new Uint8Array(count);
    for (let i = 0; i < count; i++) faded[i] = state.chosen[i] ? 0 : 1;
    return faded;
  }
  const picked = state.category >= 0 && shading.kind === "category" && shading.column.name !== "cluster";
  if (!picked && (state.focus < 0 || !state.spotlight)) return null;
  const values = picked ? valuesOf(shading.column.name) : labels();
  const wanted = picked ? shading.column.categories[state.category].value : state.focus;
  const faded = new Uint8Array(count);
  for (let i = 0; i < count; i++) faded[i] = values[i] === wanted ? 0 : 1;
  return faded;
}

/** Place of the plot area and ranges of its axes: plotly's, or before plotly runs those it will have. */
function frameOf() {
  if (plot._fullLayout) {
    const { xaxis, yaxis } = plot._fullLayout;
    return { left: xaxis._offset, top: yaxis._offset, wide: xaxis._length, high: yaxis._length,
      x: xaxis.range, y: yaxis.range };
  }
  const box = byId("plot-box");
  const [x, y] = fullRanges();
  return { left: MARGIN.l, top: MARGIN.t, wide: box.clientWidth - MARGIN.l - MARGIN.r,
    high: box.clientHeight - MARGIN.t - MARGIN.b, x, y };
}

/** Ranges of both axes that show everything; equal units on both where the map asks for it. */
function fullRanges() {
  const ranges = [rangeOf(valuesOf(state.x)), rangeOf(valuesOf(state.y))];
  if (!spaceOf().equal) return ranges;
  const box = byId("plot-box");
  const size = [box.clientWidth - MARGIN.l - MARGIN.r, box.clientHeight - MARGIN.t - MARGIN.b];
  const unit = Math.max(...ranges.map(([low, high], i) => (high - low) / Math.max(size[i], 1)));
  return ranges.map(([low, high], i) => [(low + high - unit * size[i]) / 2, (low + high + unit * size[i]) / 2]);
}

/** Lay the canvas under plotly's plot area and draw all particles. */
function draw() {
  waiting = false;
  const frame = frameOf();
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const [width, height] = [Math.round(frame.wide * ratio), Math.round(frame.high * ratio)];
  if (width < 2 || height < 2) return;
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  Object.assign(canvas.style, { left: frame.left + "px", top: frame.top + "px", width: frame.wide + "px",
    height: frame.high + "px" });
  view = { x0: frame.x[0], x1: frame.x[1], y0: frame.y[0], y1: frame.y[1], width, height, ratio };
  places = project(valuesOf(state.x), valuesOf(state.y), view);
  finder = null;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const background = rgbOf(css("--plot"));
  if (shading.kind === "density") {
    shading.most = drawDensity(context, places, view, shading.colours, background, ratio);
  } else {
    drawDots(context, places, view, shading.index, shading.colours, fadedOf(), background, ratio);
  }
}

function redraw() {
  if (!waiting) {
    waiting = true;
    requestAnimationFrame(draw);
  }
}

function numberTrace() {
  const at = clusterPlaces(valuesOf(state.x), valuesOf(state.y));
  const shown = meta.clusters.filter((_, label) => at[label]);
  return {
    type: "scatter", mode: "markers+text", hoverinfo: "skip", cliponaxis: true,
    x: shown.map((cluster) => at[cluster.label][0]), y: shown.map((cluster) => at[cluster.label][1]),
    text: shown.map((cluster) => `<b>${cluster.label}</b>`), customdata: shown.map((cluster) => cluster.label),
    textfont: { size: 10.5, color: css("--ink") },
    marker: { size: 19, color: css("--panel"), opacity: 0.92,
      line: { width: shown.map((cluster) => (cluster.label === state.focus && state.spotlight ? 4 : 1.8)), color: shown.map((c) => c.colour) } },
    selected: { marker: { opacity: 0.92 } }, unselected: { marker: { opacity: 0.92 }, textfont: { color: css("--ink") } },
  };
}

/** Show other axes (or the same ones in another theme) from the whole range. */
function showAxes() {
  const [xr, yr] = fullRanges();
  const layout = plotLayout({
    xaxis: { title: { text: axisTitle(state.x), standoff: 6 }, range: xr },
    yaxis: { title: { text: axisTitle(state.y), standoff: 6 }, range: yr,
      ...(spaceOf().equal ? { scaleanchor: "x", constrain: "range" } : {}) },
    dragmode: state.tool === "box" ? "select" : state.tool === "move" ? "pan" : state.tool,
    newselection: { line: { color: css("--accent"), width: 2, dash: "solid" } },
    uirevision: state.x + state.y,
  });
  if (spaceOf().equal) layout.xaxis.constrain = "range";
  return Plotly.react(plot, [numberTrace()], layout, { ...PLOT_CONFIG, responsive: false }).then(draw);
}

function setColour(name) {
  state.colour = name;
  state.category = -1;
  shading = shadingOf(name);
  draw();
  showLegend();
}

/** Show a cluster's card; with ``spotlight`` the others stand back on the map. */
function setFocus(label, spotlight = true) {
  state.focus = label;
  state.spotlight = spotlight && label >= 0;
  if (state.spotlight && state.chosen) setChosen(null);
  redraw();
  if (plot.data) Plotly.restyle(plot, { "marker.line.width": [plot.data[0].customdata.map((own) => (own === label && state.spotlight ? 4 : 1.8))] });
  showLegend();
  for (const listener of listeners.focus) listener(label);
}

function setChosen(chosen) {
  state.chosen = chosen;
  if (!chosen) Plotly.relayout(plot, { selections: [] });
  redraw();
  for (const listener of listeners.chosen) listener(chosen);
}

/** Row of the particle under the pointer, or -1; and the cluster whose number is there, or -1. */
function under(event) {
  const box = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - box.left, event.clientY - box.top];
  if (!view || !plot.data || x < 0 || y < 0 || x > box.width || y > box.height) return { row: -1, label: -1 };
  const trace = plot.data[0];
  for (let k = 0; k < trace.x.length; k++) {
    const px = ((trace.x[k] - view.x0) / (view.x1 - view.x0)) * box.width;
    const py = ((view.y1 - trace.y[k]) / (view.y1 - view.y0)) * box.height;
    if (Math.hypot(px - x, py - y) < 12) return { row: -1, label: trace.customdata[k] };
  }
  finder = finder || new Finder(places, view);
  const row = finder.nearest(x * view.ratio, y * view.ratio, 10 * view.ratio);
  return { row, label: row >= 0 ? labels()[row] : -1 };
}

function showTip(event) {
  const { row, label } = event.buttons ? { row: -1, label: -1 } : under(event);
  if (row < 0 && label < 0) {
    tip.hidden = true;
    return;
  }
  const lines = [];
  if (row < 0) lines.push(`cluster ${label}: ${whole(meta.clusters[label].size)} particles`);
  else {
    const names = ["row", "index", "cluster", "confidence", "micrograph", state.colour];
    for (const name of new Set(names)) {
      if (columns.has(name)) lines.push(`${columns.get(name).title || name}: ${inWords(columns.get(name), valuesOf(name)[row])}`);
    }
  }
  tip.replaceChildren(...lines.map((line) => make("div", { textContent: line })));
  tip.hidden = false;
  const frame = byId("plot-box").getBoundingClientRect();
  const [x, y] = [event.clientX - frame.left, event.clientY - frame.top];
  tip.style.left = Math.min(x + 14, frame.width - tip.offsetWidth - 4) + "px";
  tip.style.top = (y + 18 + tip.offsetHeight > frame.height ? y - tip.offsetHeight - 8 : y + 18) + "px";
}

/** Particles inside a lasso or box of plotly's; Shift adds to the chosen ones, Alt takes away. */
function choose(selected) {
  if (!selected || (!selected.lassoPoints && !selected.range)) return;
  const box = selected.range;
  const [px, py] = box
    ? [[box.x[0], box.x[1], box.x[1], box.x[0]], [box.y[0], box.y[0], box.y[1], box.y[1]]]
    : [selected.lassoPoints.x, selected.lassoPoints.y];
  const inside = insidePolygon(valuesOf(state.x), valuesOf(state.y), px, py);
  if (state.chosen && (state.adding || state.taking)) {
    for (let i = 0; i < inside.length; i++) {
      inside[i] = state.taking ? (state.chosen[i] && !inside[i] ? 1 : 0) : (state.chosen[i] || inside[i] ? 1 : 0);
    }
  }
  setChosen(inside);
}

function watchMap() {
  let pressed = null;
  const frame = byId("plot-box");
  frame.addEventListener("mousemove", showTip);
  frame.addEventListener("mouseleave", () => { tip.hidden = true; });
  frame.addEventListener("pointerdown", (event) => {
    pressed = [event.clientX, event.clientY];
    [state.adding, state.taking] = [event.shiftKey, event.altKey];
    tip.hidden = true;
  }, true);
  window.addEventListener("pointerup", (event) => {
    const still = pressed && Math.hypot(event.clientX - pressed[0], event.clientY - pressed[1]) < 4;
    pressed = null;
    if (!still) return;
    const { label } = under(event);
    if (label >= 0) setFocus(label);
  }, true);
  frame.addEventListener("dblclick", () => { showAxes(); });
  plot.on("plotly_relayout", redraw);
  plot.on("plotly_relayouting", redraw);
  plot.on("plotly_afterplot", redraw);
  plot.on("plotly_selected", choose);
  let size = [frame.clientWidth, frame.clientHeight].join();
  new ResizeObserver(() => {
    const now = [frame.clientWidth, frame.clientHeight].join();
    if (now === size) return;
    size = now;
    Plotly.Plots.resize(plot).then(redraw);
  }).observe(frame);
}
