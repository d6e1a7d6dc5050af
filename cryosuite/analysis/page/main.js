// Start: the choices above the map, the table, the curves, the theme.
function option(select, value, text) {
  select.append(make("option", { value, textContent: text }));
}

function setSpace(number) {
  state.space = number;
  [state.x, state.y] = [meta.spaces[number].x, meta.spaces[number].y];
  afterAxes();
}

function afterAxes() {
  byId("axis-x").value = state.x;
  byId("axis-y").value = state.y;
  [...byId("spaces").children].forEach((button, i) => { button.ariaPressed = String(i === state.space); });
  byId("space-about").textContent = spaceOf().about || "Any two numbers against each other.";
  return showAxes();
}

function setTool(tool) {
  state.tool = tool;
  for (const button of byId("tools").children) button.ariaPressed = String(button.dataset.tool === tool);
  Plotly.relayout(plot, { dragmode: { box: "select", move: "pan" }[tool] || tool });
  plot.dataset.tool = tool;
}

function fillChoices() {
  const colour = byId("colour-by");
  for (const column of meta.columns) if (column.colour) option(colour, column.name, column.title || column.name);
  option(colour, "density", "density of particles");
  colour.value = state.colour;
  colour.addEventListener("change", () => setColour(colour.value));
  for (const axis of ["x", "y"]) {
    const select = byId("axis-" + axis);
    for (const column of meta.columns) if (column.axis) option(select, column.name, column.title || column.name);
    select.addEventListener("change", () => {
      state[axis] = select.value;
      state.space = meta.spaces.findIndex((space) => space.x === state.x && space.y === state.y);
      afterAxes();
    });
  }
  meta.spaces.forEach((space, i) => byId("spaces").append(make("button", { type: "button", textContent: space.name,
    ariaPressed: String(i === 0), onclick: () => setSpace(i) })));
  for (const [tool, text, hint] of [["zoom", "Zoom", "drag a frame to enlarge it; double click for all"], ["move", "Move", "drag the map"],
    ["lasso", "Lasso", "draw around particles to select them; Shift adds, Alt takes away"], ["box", "Box", "drag a box around particles to select them"]]) {
    byId("tools").append(make("button", { type: "button", textContent: text, title: hint, onclick: () => setTool(tool),
      "data-tool": tool, ariaPressed: String(tool === "zoom") }));
  }
  byId("tools").append(make("button", { type: "button", textContent: "Show all", onclick: () => { setFocus(state.focus, false); setChosen(null); showAxes(); } }));
}

/** Rows of the table: a click or Enter chooses the cluster; the picture is the first frame of its turning volume. */
function wakeTable() {
  const pictures = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      const map = meta.clusters[+entry.target.dataset.label].maps.at(-1);
      entry.target.style.backgroundImage = `url("${byId(map.strip).textContent}")`;
      entry.target.style.backgroundSize = `${100 * map.frames}% 100%`;
      pictures.unobserve(entry.target);
    }
  }, { rootMargin: "200px" });
  for (const row of document.querySelectorAll("#cluster-table tbody tr")) {
    const label = +row.dataset.label;
    row.addEventListener("click", () => {
      setFocus(label);
      if (byId("card").getBoundingClientRect().bottom < 80) byId("map").scrollIntoView({ behavior: "smooth" });
    });
    if (meta.clusters[label].maps.length) {
      const thumb = row.querySelector(".thumb");
      thumb.dataset.label = label;
      pictures.observe(thumb);
    }
  }
}

function showCurves() {
  const select = byId("curve-of");
  if (!select) return;
  const names = Object.keys(meta.curves);
  for (const name of names) option(select, name, name);
  const show = () => {
    const [x, y] = meta.curves[select.value];
    Plotly.react(byId("curve"), [{ type: "scatter", mode: x.length > 40 ? "lines" : "lines+markers", x, y,
      line: { color: css("--accent"), width: 1.8 }, marker: { size: 5 } }],
    plotLayout({ height: 260, xaxis: { title: { text: "training step", standoff: 6 } }, yaxis: { title: { text: select.value, standoff: 6 } },
      margin: { l: 70, r: 14, t: 10, b: 44 } }), PLOT_CONFIG);
  };
  select.addEventListener("change", show);
  show();
  return show;
}

function watchTheme(again) {
  const button = byId("theme");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    if (state.colour === "density") shading = shadingOf("density");
    showAxes();
    again.forEach((show) => show && show());
    if (state.focus >= 0) showCard(state.focus);
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    apply();
  });
  dark.addEventListener("change", apply);
}

function watchKeys() {
  window.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
    const count = meta.clusters.length;
    if (event.key === "]" || event.key === "n") setFocus((state.focus + 1) % count);
    else if (event.key === "[" || event.key === "p") setFocus((state.focus - 1 + count) % count);
    else if (event.key === "l") setTool("lasso");
    else if (event.key === "z") setTool("zoom");
    else if (event.key === "Escape") { setChosen(null); setFocus(state.focus, false); }
  });
}

async function start() {
  [state.x, state.y] = [meta.spaces[0].x, meta.spaces[0].y];
  shading = shadingOf("cluster");
  draw();
  document.documentElement.dataset.drawn = String(Math.round(performance.now()));
  listeners.focus.push(showCard);
  fillChoices();
  setFocus(meta.first, false);
  wakeTable();
  await plotly;
  await afterAxes();
  watchMap();
  watchSelection();
  watchKeys();
  watchTheme([showCurves()]);
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", () => copyText(byId(button.dataset.copy).textContent, button));
  }
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}
start();
