// Chosen particles as text: lasso.json for `cryosuite select`, row numbers, original indices.
function chosenRows() {
  const rows = [];
  if (state.chosen) for (let i = 0; i < state.chosen.length; i++) if (state.chosen[i]) rows.push(i);
  return rows;
}

function selectionText(rows) {
  return JSON.stringify({ kind: "cryosuite selection", version: 1, ...meta.selection, rows });
}

function showSelection() {
  const rows = chosenRows();
  const box = byId("selection");
  box.hidden = !state.chosen;
  if (!state.chosen) return;
  byId("selected-count").textContent = `${whole(rows.length)} particles selected (${percent(rows.length, meta.particles)})`;
  const counts = new Map();
  for (const row of rows) counts.set(labels()[row], (counts.get(labels()[row]) || 0) + 1);
  const parts = [...counts].filter(([label]) => label >= 0).sort((a, b) => b[1] - a[1]);
  byId("selected-parts").replaceChildren(...parts.slice(0, 8).map(([label, count]) => make("span", { class: "part" },
    swatch(meta.clusters[label].colour), `cluster ${label}: ${whole(count)} of ${whole(meta.clusters[label].size)}`)),
  ...(parts.length > 8 ? [make("span", { textContent: `and ${parts.length - 8} more` })] : []));
  byId("selected-next").replaceChildren(...meta.commands.select.map(commandLine));
  showText();
}

/** The text in the box below the buttons, in the form chosen there. */
function showText() {
  byId("selected-text").value = textAs(byId("selected-form").value);
}

function textAs(form) {
  const rows = chosenRows();
  if (form === "json") return selectionText(rows);
  if (form === "rows") return "# rows of the run's set, from 0\n" + rows.join("\n") + "\n";
  const index = valuesOf("index");
  return "# original indices, from 0\n" + rows.map((row) => index[row]).join("\n") + "\n";
}

function watchSelection() {
  const form = byId("selected-form");
  form.addEventListener("change", showText);
  byId("selected-copy").addEventListener("click", (event) => copyText(textAs(form.value), event.currentTarget));
  byId("selected-save").addEventListener("click", () => {
    const [name, kind] = { json: ["lasso.json", "application/json"], rows: ["rows.txt", "text/plain"],
      index: ["original_indices.txt", "text/plain"] }[form.value];
    download(name, textAs(form.value), kind);
  });
  byId("selected-clear").addEventListener("click", () => setChosen(null));
  byId("selected-invert").addEventListener("click", () => {
    const known = labels();
    setChosen(state.chosen.map((one, i) => (one || !(known[i] >= 0) ? 0 : 1)));
  });
  listeners.chosen.push(showSelection);
}
