"use strict";

// Charts: how lines and heat maps look, and zooming in all charts of training at the same time.

const COLOURS = ["#2f7ed8", "#e0702a", "#2ba36b", "#9a5fd0", "#cf4a7a", "#8f9330"];
const BETTER_OR_WORSE = [[0, "#2166ac"], [0.5, "#ececec"], [1, "#b2182b"]];
const CONFIG = {responsive: true, displayModeBar: false, doubleClick: "autosize"};
const MAX_TICKS = 300;  // skipped steps that a chart marks; plotly draws each of them separately

const places = new Map();  // key of a chart -> the element that plotly draws into
const zoomable = new Set();
let zoom = null;  // the visible range of steps; null if all are visible
let zooming = false;

function byId(id) {
  return document.getElementById(id);
}

function node(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// plotly reads names as a kind of HTML.
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function place(parent, key, title, caption) {
  if (!places.has(key)) {
    const chart = node("div", {className: "chart"});
    parent.append(node("figure", {}, node("h3", {textContent: title}), chart,
                       node("p", {className: "caption", textContent: caption})));
    places.set(key, chart);
  }
  return places.get(key);
}

function layout(xaxis, yaxis, more) {
  const axis = {gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("line"), automargin: true};
  return {
    margin: {l: 48, r: 12, t: 8, b: 36}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: {color: colour("text"), size: 12}, hovermode: "x unified",
    hoverlabel: {bgcolor: colour("card"), font: {color: colour("text")}},
    legend: {orientation: "h", x: 0, y: 1.02, yanchor: "bottom"}, uirevision: "keep",
    xaxis: {...axis, ...xaxis}, yaxis: {...axis, ...yaxis}, ...more,
  };
}

// The moving average in which each value has `weight` times the weight of the next one.
function smooth(values, weight) {
  let sum = 0, total = 0;
  return values.map(value => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return Number((sum / total).toPrecision(6));  // rounding errors would look like a curve where nothing changes
  });
}

function drawPanel(parent, panel, steps, marks, view) {
  const chart = place(parent, `panel ${panel.title}`, panel.title, panel.caption);
  const mode = steps.length < 2 ? "markers" : "lines";
  const traces = panel.curves.flatMap((curve, index) => {
    const line = {color: COLOURS[index % COLOURS.length]};
    const name = plain(curve.name);
    const trace = {x: steps, mode, legendgroup: name, hovertemplate: "%{y:.4g}"};
    return [
      {...trace, y: curve.values, name: `${name}, raw`, line: {...line, width: 1}, opacity: 0.4, showlegend: false},
      {...trace, y: smooth(curve.values, view.smoothing), name, line: {...line, width: 2}, showlegend: true},
    ];
  });
  const type = view.logarithmic ? "log" : "linear";
  const range = zoom ? {range: [...zoom], autorange: false} : {autorange: true};
  Plotly.react(chart, traces, layout(
    {title: {text: "step"}, uirevision: String(zoom), ...range},
    {title: {text: panel.unit}, type, uirevision: type, exponentformat: "power"},
    {shapes: marks},
  ), CONFIG);
  zoomTogether(chart);
}

function stepMarks(resumed, skipped) {
  const mark = (step, height, line) => ({type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: height, line});
  return [
    ...resumed.map(step => mark(step, 1, {color: colour("faint"), width: 1, dash: "dot"})),
    ...skipped.slice(-MAX_TICKS).map(step => mark(step, 0.05, {color: "#d62728", width: 2})),
  ];
}

function zoomTogether(chart) {
  if (zoomable.has(chart)) return;
  zoomable.add(chart);
  chart.on("plotly_relayout", async change => {
    const moved = "xaxis.range[0]" in change;
    if (zooming || !(moved || change["xaxis.autorange"])) return;
    zooming = true;
    zoom = moved ? [change["xaxis.range[0]"], change["xaxis.range[1]"]] : null;
    const others = [...zoomable].filter(other => other !== chart);
    const update = () => zoom ? {"xaxis.range": [...zoom]} : {"xaxis.autorange": true};
    await Promise.all(others.map(other => Plotly.relayout(other, update())));
    zooming = false;
  });
}

function drawValidationLoss(parent, loss) {
  const chart = place(parent, `loss ${loss.title}`, `${loss.title} over the steps`,
    "Below the dashed line, the LoRA predicts these clips better than the base model. A line that turns upwards, while " +
    "the training loss still falls, means that the LoRA learns its clips by heart.");
  const traces = [{x: loss.steps, y: loss.lora, name: "LoRA", mode: "lines+markers", line: {color: COLOURS[0]},
                   hovertemplate: "%{y:.4g}", showlegend: true}];
  if (loss.base !== null) {
    traces.push({x: [0, ...loss.steps], y: Array(loss.steps.length + 1).fill(loss.base), name: "base model",
                 mode: loss.steps.length ? "lines" : "markers", line: {color: colour("faint"), dash: "dash"},
                 hovertemplate: "%{y:.4g}", showlegend: true});
  }
  Plotly.react(chart, traces, layout({title: {text: "step"}}, {}), CONFIG);
}

function drawLevels(parent, loss) {
  const levels = loss.levels;
  const chart = place(parent, `levels ${loss.title}`, `${loss.title} by noise level`,
    "Noise level 1 is pure noise, where a clip's layout and motion are decided, and 0 a clean clip, where only details " +
    "are left. The strongest line is the newest step.");
  const count = levels.lora.length;
  const shown = [...new Set([0, 0.25, 0.5, 0.75, 1].map(part => Math.round(part * (count - 1))))];
  const traces = count === 0 ? [] : shown.map((index, order) => ({
    x: levels.sigma, y: levels.lora[index], name: `step ${loss.steps[index]}`, mode: "lines+markers",
    line: {color: COLOURS[0], width: index === count - 1 ? 3 : 1.5}, opacity: (order + 1) / shown.length,
    hovertemplate: "%{y:.4g}", showlegend: true,
  }));
  if (levels.base !== null) {
    traces.push({x: levels.sigma, y: levels.base, name: "base model", mode: "lines+markers",
                 line: {color: colour("faint"), dash: "dash"}, hovertemplate: "%{y:.4g}", showlegend: true});
  }
  Plotly.react(chart, traces, layout({title: {text: "noise level"}, range: [0, 1]}, {}), CONFIG);
  if (levels.change === null) return;
  drawHeatMap(place(parent, `change ${loss.title}`, `${loss.title}: LoRA compared with the base model`,
    "By how many percent the LoRA's loss differs from the base model's. Blue is lower, which is better; red is higher."),
    loss.steps, levels.sigma, levels.change, {colorscale: BETTER_OR_WORSE, zmid: 0, ticksuffix: " %"});
}

function drawTrainingLevels(parent, levels) {
  drawHeatMap(place(parent, "training levels", "Training loss by noise level",
    "The mean loss of the training clips whose noise level was in each band, over groups of steps."),
    levels.steps, levels.sigma, levels.values, {colorscale: "Viridis", ticksuffix: ""});
}

function drawHeatMap(chart, steps, sigma, values, {ticksuffix, ...colours}) {
  const trace = {type: "heatmap", x: steps.map(String), y: sigma, z: values, ...colours,
                 colorbar: {ticksuffix, thickness: 12, outlinewidth: 0},
                 hovertemplate: `step %{x}<br>noise level %{y}<br>%{z:.4g}${ticksuffix}<extra></extra>`};
  Plotly.react(chart, [trace], layout({title: {text: "step"}, type: "category", nticks: 8},
    {title: {text: "noise level"}}, {hovermode: "closest"}), CONFIG);
}
