// The card of one cluster: its volume that turns, planes, FSC, particles, commands; and the legend of the map.
let spinning = null;

function showLegend() {
  const legend = byId("legend");
  const { kind, column } = shading;
  if (kind === "category") {
    const own = column.name === "cluster";
    legend.replaceChildren(...column.categories.map((entry, i) => make("button", {
      class: "chip", type: "button", ariaPressed: String(own ? state.spotlight && state.focus === entry.value : state.category === i),
      title: `${entry.text}: ${whole(entry.count)} particles`,
      onclick: () => {
        if (own) return setFocus(entry.value, !(state.spotlight && state.focus === entry.value));
        state.category = state.category === i ? -1 : i;
        redraw();
        return showLegend();
      },
    }, swatch(entry.colour), make("span", { textContent: entry.text }),
    make("small", { textContent: whole(entry.count) }))));
    return;
  }
  const bar = make("canvas", { width: 256, height: 1, class: "colourbar" });
  const context = bar.getContext("2d");
  shading.colours.slice(0, 256).forEach((colour, i) => {
    context.fillStyle = `rgb(${colour.map(Math.round).join()})`;
    context.fillRect(i, 0, 1, 1);
  });
  const density = kind === "density";
  const ends = density ? ["1 particle", `${whole(shading.most || 0)} particles per square (log scale)`]
    : [inWords(column, shading.low), inWords(column, shading.high)];
  const text = density ? "" : column.cyclic ? "the colours close to a ring, as the angle does"
    : column.low < column.shown[0] || column.high > column.shown[1] ? "the middle 96 % of the particles; beyond, the end colours" : "";
  legend.replaceChildren(make("span", { textContent: ends[0] }), bar, make("span", { textContent: ends[1] }),
    make("small", { textContent: text }));
}

const swatch = (colour) => make("span", { class: "swatch", style: `background:${colour}` });

function fact(name, value, hint) {
  return make("div", { title: hint || "" }, make("dt", { textContent: name }), make("dd", { textContent: value }));
}

const angstrom = (value, limit = 0) => (value === null || value === undefined ? "not known"
  : value.toFixed(value < 10 ? 2 : 1) + " Å" + (value <= 1.01 * limit ? ", the limit of the pixels," : ""));

/** Show one frame of a strip of pictures. */
function showFrame(element, frames, number) {
  element.style.backgroundPosition = frames > 1 ? `${(100 * number) / (frames - 1)}% 0` : "0 0";
}

function turntable(map, label) {
  const frames = map.frames;
  const element = make("div", { class: "turntable", role: "img",
    ariaLabel: `${map.title} of cluster ${label}, turning about the vertical` });
  element.style.backgroundImage = `url("${byId(map.strip).textContent}")`;
  element.style.backgroundSize = `${100 * frames}% 100%`;
  showFrame(element, frames, 0);
  const slider = make("input", { type: "range", min: 0, max: frames - 1, value: 0, step: 1, ariaLabel: "Turn the volume" });
  const play = make("button", { type: "button", class: "quiet", textContent: "Turn", ariaPressed: "false" });
  const stop = () => { clearInterval(spinning); spinning = null; play.ariaPressed = "false"; };
  const start = (steps) => {
    clearInterval(spinning);
    play.ariaPressed = "true";
    spinning = setInterval(() => {
      if (!element.isConnected || !steps--) return stop();
      slider.value = (+slider.value + 1) % frames;
      return showFrame(element, frames, +slider.value);
    }, 110);
  };
  play.addEventListener("click", () => (spinning ? stop() : start(100 * frames)));
  slider.addEventListener("input", () => { stop(); showFrame(element, frames, +slider.value); });
  let from = null;
  element.addEventListener("pointerdown", (event) => { stop(); from = [event.clientX, +slider.value]; element.setPointerCapture(event.pointerId); });
  element.addEventListener("pointermove", (event) => {
    if (!from) return;
    const moved = Math.round(((event.clientX - from[0]) / element.clientWidth) * frames);
    slider.value = (((from[1] - moved) % frames) + frames) % frames;
    showFrame(element, frames, +slider.value);
  });
  element.addEventListener("pointerup", () => { from = null; });
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
  if (state.spotlight && !calm) start(frames); // one turn when a cluster is chosen
  return make("div", {}, element, make("div", { class: "turn" }, play, slider));
}

function volumePart(cluster) {
  const part = make("section", {});
  if (!cluster.maps.length) {
    part.append(make("p", { class: "caption", textContent: meta.notes.volumes }));
    return part;
  }
  const body = make("div", {});
  const tabs = make("div", { class: "segments", role: "group", ariaLabel: "Which map" });
  const show = (map) => {
    for (const tab of tabs.children) tab.ariaPressed = String(tab.textContent === map.title);
    body.replaceChildren(turntable(map, cluster.label),
      make("p", { class: "caption", textContent: map.about }),
      make("img", { class: "planes", src: byId(map.planes).textContent, alt: `Three central planes of ${map.title} of cluster ${cluster.label}` }),
      make("p", { class: "caption", textContent: "Planes through the middle of the box, across z, y and x; bright is dense." }));
    if (map.curve) body.append(fscPlot(cluster, map));
    body.append(make("p", { class: "file" }, "file ", make("code", { textContent: map.file })));
  };
  for (const map of cluster.maps) {
    tabs.append(make("button", { type: "button", textContent: map.title, onclick: () => show(map) }));
  }
  if (cluster.maps.length > 1) part.append(tabs);
  part.append(body);
  show(cluster.maps[cluster.maps.length - 1]);
  return part;
}

function fscPlot(cluster, map) {
  const element = make("div", { class: "fsc" });
  const ticks = [0.2, 0.4, 0.6, 0.8, 1].map((part) => part * map.curve[0][map.curve[0].length - 1]);
  plotly.then(() => requestAnimationFrame(() => Plotly.newPlot(element, [
    { type: "scatter", mode: "lines", x: map.curve[0], y: map.curve[1], line: { color: cluster.colour, width: 2.4 } },
  ], plotLayout({
    height: 190, margin: { l: 46, r: 10, t: 8, b: 40 },
    xaxis: { title: { text: "resolution (Å)", standoff: 4 }, tickvals: ticks, ticktext: ticks.map((f) => (1 / f).toFixed(1)), fixedrange: true },
    yaxis: { title: { text: "FSC", standoff: 4 }, range: [-0.08, 1.03], tickvals: [0, 0.5, 1], fixedrange: true },
    shapes: [0.143, 0.5].map((level) => ({ type: "line", xref: "paper", x0: 0, x1: 1, y0: level, y1: level,
      line: { color: css("--line"), width: 1, dash: "dot" } })),
    annotations: [0.143, 0.5].map((level) => ({ xref: "paper", x: 1, xanchor: "right", y: level, yanchor: "bottom",
      text: String(level), showarrow: false, font: { size: 10, color: css("--quiet") } })),
  }), PLOT_CONFIG)));
  return make("div", {}, element, make("p", { class: "caption",
    textContent: `Fourier shell correlation (${map.note}): ${angstrom(map.resolution[0], map.limit)} at 0.143, ${angstrom(map.resolution[1], map.limit)} at 0.5.` }));
}

function particlesPart(cluster, which) {
  const list = cluster.particles[which];
  if (!list.rows.length) return "";
  const words = which === "typical"
    ? "Most typical: nearest to the middle of the cluster, nearest first."
    : "Most odd: farthest from the middle of the cluster, farthest first. Junk and wrong assignments gather here.";
  const part = make("section", {}, make("h3", { textContent: which === "typical" ? "Typical particles" : "Odd particles" }));
  if (list.picture) {
    const sheet = make("div", { class: "montage" }, make("img", { src: byId(list.picture).textContent,
      alt: `${list.rows.length} ${which} particles of cluster ${cluster.label}` }));
    const grid = make("div", { class: "tiles" });
    list.rows.forEach((row) => grid.append(make("button", { type: "button", ariaLabel: `Particle in row ${row}: show on the map`,
      title: `row ${row}` + (columns.has("index") ? `, index ${valuesOf("index")[row]}` : ""), onclick: () => markRow(row) })));
    sheet.append(grid);
    part.append(sheet);
    words.length && part.append(make("p", { class: "caption", textContent: words + " Click one to find it on the map." }));
  } else {
    part.append(make("p", { class: "caption", textContent: `${words} Rows ${list.rows.join(", ")}.` }));
  }
  return part;
}

/** Ring a particle on the map for a while. */
function markRow(row) {
  const [x, y] = [valuesOf(state.x)[row], valuesOf(state.y)[row]];
  Plotly.relayout(plot, { annotations: Number.isNaN(x) ? [] : [{ x, y, text: `row ${row}`, showarrow: true, arrowhead: 2,
    arrowcolor: css("--accent"), ax: 28, ay: -34, font: { color: css("--ink"), size: 12 }, bgcolor: css("--panel"),
    bordercolor: css("--accent"), borderpad: 3 }] });
  byId("map").scrollIntoView({ block: "nearest", behavior: "smooth" });
}

function commandLine(text) {
  const copy = make("button", { type: "button", class: "quiet", textContent: "Copy", ariaLabel: "Copy this command" });
  copy.addEventListener("click", () => copyText(text, copy));
  return make("div", { class: "command" }, make("code", { textContent: text }), copy);
}

function showCard(label) {
  clearInterval(spinning);
  spinning = null;
  const card = byId("card");
  const cluster = meta.clusters[label];
  for (const row of document.querySelectorAll("#cluster-table tbody tr")) row.classList.toggle("chosen", +row.dataset.label === label);
  if (!cluster) {
    card.replaceChildren(make("h2", { textContent: "Choose a cluster" }),
      make("p", { textContent: "Click a dot or a number on the map, a name in the legend, or a row of the table below." }));
    return;
  }
  const step = (by) => setFocus((label + by + meta.clusters.length) % meta.clusters.length);
  card.replaceChildren(
    make("div", { class: "head" }, make("h2", {}, swatch(cluster.colour), `Cluster ${label}`),
      make("span", { class: "steps" },
        make("button", { type: "button", class: "quiet", textContent: "‹", ariaLabel: "Previous cluster", onclick: () => step(-1) }),
        make("button", { type: "button", class: "quiet", textContent: "›", ariaLabel: "Next cluster", onclick: () => step(1) }))),
    make("dl", { class: "facts" }, ...cluster.facts.map((entry) => fact(...entry))),
    volumePart(cluster),
    particlesPart(cluster, "typical"), particlesPart(cluster, "odd"),
    make("section", {}, make("h3", { textContent: "Next" }),
      ...cluster.commands.map((entry) => make("div", {}, make("p", { class: "caption", textContent: entry[0] }), commandLine(entry[1])))),
  );
  card.scrollTop = 0;
}
