// The page: fill it with the data, play the samples, and follow a run that goes on.

const REFRESH_SECONDS = 5;
const DRAW = {curves: drawCurves, samples: drawSamples};
const live = document.documentElement.dataset.live === "true";
const data = {}, versions = {};

let pairs = [];  // for each prompt: its row of the data, and its two players
let playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;

function table(heads, rows) {
  const cells = (tag, texts) => node("tr", {}, ...texts.map(text => node(tag, {textContent: text})));
  return node("table", {}, ...(heads ? [cells("th", heads)] : []), ...rows.map(row => cells("td", row)));
}

// --- Everything but the samples ---------------------------------------------------------------------------------------

function drawCurves() {
  const run = data.curves;
  byId("name").textContent = run.name;
  byId("state").textContent = run.state;
  byId("summary").textContent = run.summary.join(" · ");
  byId("updated").textContent = `The last line of metrics.jsonl is from ${run.updated}.` + (live ? " This page follows the run." : "");
  byId("notes").replaceChildren(...run.notes.map(note => node("li", {textContent: note})));
  drawTraining();
  const validation = byId("validation-charts");
  byId("no-validation").hidden = run.validation.length > 0;
  for (const loss of run.validation) {
    drawValidationLoss(validation, loss);
    if (loss.levels) drawLevels(validation, loss);
  }
  drawTables(run);
}

function drawTraining() {
  const {steps, panels, per_point} = data.curves.curves;
  const view = {smoothing: Number(byId("smoothing").value), logarithmic: byId("logarithmic").checked};
  const marks = stepMarks(data.curves.resumed, data.curves.skipped);
  byId("per-point").textContent = per_point > 1 ? `Each point is the mean of ${per_point} steps.` : "";
  for (const panel of panels) drawPanel(byId("panels"), panel, steps, marks, view);
  if (data.curves.training_levels) drawTrainingLevels(byId("panels"), data.curves.training_levels);
}

function drawTables(run) {
  const fields = Object.entries(run.settings).flatMap(
    ([section, values]) => values.map(([name, value]) => [`${section}.${name}`, value]));
  const fill = (id, heads, rows, empty) =>
    byId(id).replaceChildren(rows.length ? table(heads, rows) : node("p", {className: "caption", textContent: empty}));
  fill("events", ["time", "step", "event", ""], run.events, "This run has recorded no events.");
  fill("skipped", ["step", "clips"], run.skipped_table, "");
  fill("settings", null, fields, "");
  fill("environment", null, run.environment, "This run has not recorded its environment.");
  byId("skipped-details").hidden = run.skipped_table.length === 0;
}

// --- Samples ----------------------------------------------------------------------------------------------------------

function drawSamples() {
  const {steps, rows, note} = data.samples;
  const slider = byId("step");
  const follows = pairs.length === 0 || slider.value === slider.max;
  slider.max = Math.max(steps.length - 1, 0);
  if (follows) slider.value = slider.max;
  slider.disabled = steps.length < 2;
  byId("samples-note").textContent = note;
  byId("samples-note").hidden = !note;
  byId("no-samples").hidden = rows.length > 0;
  byId("player").hidden = rows.length === 0;
  pairs = rows.map(row => ({row, base: player(), lora: player()}));
  byId("videos").replaceChildren(...pairs.map(({row, base, lora}) => node("figure", {},
    node("div", {className: "pair"},
         node("div", {}, base.video, base.label), node("div", {}, lora.video, lora.label)),
    node("figcaption", {textContent: row.caption}))));
  for (const {row, base} of pairs) show(base, row.base, "base model");
  showStep();
}

function player() {
  const video = node("video", {muted: true, loop: true, playsInline: true, preload: "auto"});
  return {video, label: node("p", {className: "caption"})};
}

function showStep() {
  const {steps} = data.samples;
  const index = Number(byId("step").value);
  byId("step-shown").textContent = steps.length ? `${steps[index]}` : "none yet";
  for (const {row, base, lora} of pairs) {
    show(lora, row.lora[index] ?? null, steps.length ? `LoRA after step ${steps[index]}` : "LoRA", base.video);
  }
}

// Show a video at the time at which another one is, so that the two play side by side.
function show({video, label}, source, text, beside) {
  label.textContent = source ? text : `${text}: no video`;
  video.hidden = !source;
  if (!source) {
    video.removeAttribute("src");
    return;
  }
  video.onloadeddata = () => {
    if (beside) video.currentTime = beside.currentTime;
    if (playing) video.play();
  };
  video.src = source;
}

function videos() {
  return pairs.flatMap(({base, lora}) => [base.video, lora.video]).filter(video => !video.hidden);
}

function play(wanted) {
  playing = wanted;
  byId("play").textContent = playing ? "Pause" : "Play";
  for (const video of videos()) playing ? video.play() : video.pause();
}

// --- A run that goes on -----------------------------------------------------------------------------------------------

async function refresh() {
  try {
    for (const name of Object.keys(DRAW)) {
      const reply = await fetch(`${name}.json`, {cache: "no-cache"});
      if (!reply.ok) throw new Error(await reply.text());
      const version = reply.headers.get("ETag").replaceAll('"', "");
      if (version === versions[name]) continue;
      data[name] = await reply.json();
      versions[name] = version;
      DRAW[name]();
    }
  } catch (error) {
    const reason = error instanceof TypeError ? "tfm-report has ended" : error.message;
    byId("updated").textContent = `This page cannot be refreshed: ${reason}.`;
  }
  setTimeout(refresh, 1000 * REFRESH_SECONDS);
}

// --- Start ------------------------------------------------------------------------------------------------------------

for (const name of Object.keys(DRAW)) {
  const block = byId(`${name}-data`);
  data[name] = JSON.parse(block.textContent);
  versions[name] = block.dataset.version;
  DRAW[name]();
}
play(playing);
byId("smoothing").addEventListener("input", drawTraining);
byId("logarithmic").addEventListener("change", drawTraining);
byId("step").addEventListener("input", showStep);
byId("play").addEventListener("click", () => play(!playing));
byId("restart").addEventListener("click", () => {
  for (const video of videos()) video.currentTime = 0;
  play(true);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCurves);
if (live) setTimeout(refresh, 1000 * REFRESH_SECONDS);
