/** What Plotly is given for a chart: traces and layout in the page's colors, and where values lie in pixels. */

/** @typedef {{label: string, values: (number|null)[], color: string, kind?: "line"|"bars", dash?: number[]}} Series */

const MARGIN = { l: 52, r: 14, t: 8, b: 40 };
const SMALLEST = 1e-5; // nats; on a logarithmic scale smaller values are drawn here
const X_STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000];

/** Settings of Plotly that are the same for every chart. The page draws its own cursor, so Plotly handles no events. */
export const CONFIG = { staticPlot: true, displayModeBar: false };

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const known = (values) => values.filter((v) => v !== null);
const spacingOf = (x) => (x.length > 1 ? x[1] - x[0] : 1);

/** Ranges of both axes, and the pixel at which a value lies, measured from the top left corner of the chart. */
export function scales({ x, series, log, range }, width, height) {
  const [first, last] = [x[0], x.at(-1)];
  const margin = first === last || series[0].kind === "bars" ? 0.6 * spacingOf(x) : 0;
  const xRange = [first - margin, last + margin];
  const yRange = range ?? (log ? decades(series) : fromZero(series));
  const plot = { width: width - MARGIN.l - MARGIN.r, height: height - MARGIN.t - MARGIN.b };
  const raw = (v) => (log ? Math.log10(Math.max(v, SMALLEST)) : v);
  return {
    xRange, yRange, plot, top: MARGIN.t,
    left: (v) => MARGIN.l + ((v - xRange[0]) / (xRange[1] - xRange[0])) * plot.width,
    y: (v) => MARGIN.t + ((yRange[1] - raw(v)) / (yRange[1] - yRange[0])) * plot.height,
    x: (pixel) => xRange[0] + ((pixel - MARGIN.l) / plot.width) * (xRange[1] - xRange[0]),
  };
}

/** Least and greatest of all series. Not by spreading, since there may be more values than a call takes. */
function extent(series) {
  const step = ([low, high], v) => [Math.min(low, v), Math.max(high, v)];
  return series.flatMap((s) => known(s.values)).reduce(step, [Infinity, -Infinity]);
}

function fromZero(series) {
  const [low, high] = extent(series);
  return [Math.min(0, low), high * 1.08 || 1];
}

/** Whole powers of ten, as exponents. */
function decades(series) {
  const [low, high] = extent(series).map((v) => Math.log10(Math.max(v, SMALLEST)));
  return [Math.floor(low), Math.max(Math.ceil(high), Math.floor(low) + 1)];
}

/** A tick at each power of ten: 100, 1, 0.01, 1e-4. */
function logTicks([low, high]) {
  const exponents = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  return { type: "log", tickvals: exponents.map((e) => 10 ** e), ticktext: exponents.map((e) => (e < -3 ? `1e${e}` : (10 ** e).toLocaleString("en"))) };
}

/** Traces and layout of a chart of this size. @returns {[any[], any]} */
export function figure(wanted, scale, width, height) {
  const { x, series, log, xLabel = "step", ticks = ",.3~r", marks } = wanted;
  const [muted, line] = [color("muted"), color("line")];
  const axis = { fixedrange: true, zeroline: false, showline: false, ticks: "", ticklabelstandoff: 4 };
  const dtick = X_STEPS.find((step) => (step / (scale.xRange[1] - scale.xRange[0])) * scale.plot.width >= 44);
  const drawn = marks?.() ?? [];
  return [series.map((s) => trace(s, x, log, scale)), {
    width, height, margin: MARGIN, showlegend: false, hovermode: false, dragmode: false,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: muted },
    xaxis: { ...axis, range: scale.xRange, showgrid: false, tick0: 0, dtick, tickformat: ",d", title: { text: xLabel, standoff: 2, font: { size: 12 } } },
    yaxis: { ...axis, range: scale.yRange, gridcolor: line, gridwidth: 1, ...(log ? logTicks(scale.yRange) : { nticks: Math.ceil(scale.plot.height / 25), tickformat: ticks }) },
    shapes: drawn.map((mark) => ({ type: "line", x0: mark.x, x1: mark.x, yref: "paper", y0: 0, y1: 1, line: { color: color(mark.color), width: 2, dash: "5px,4px" } })),
    annotations: drawn.filter((mark) => mark.label).map((mark) => annotation(mark, scale)),
  }];
}

function trace({ values, color: name, kind, dash }, x, log, scale) {
  const y = log ? values.map((v) => (v === null ? null : Math.max(v, SMALLEST))) : values;
  if (kind === "bars") return bars(x, y, color(name), scale);
  const mode = known(values).length < 12 ? "lines+markers" : "lines";
  const look = { color: color(name), width: 2, dash: dash ? dash.map((length) => `${length}px`).join() : "solid" };
  return { type: "scatter", mode, x, y, connectgaps: true, cliponaxis: false, line: look, marker: { color: color(name), size: 5 } };
}

/** Bars; a single area of steps where they would be narrower than two pixels, as one path draws much faster. */
function bars(x, y, fill, scale) {
  const wide = scale.left(spacingOf(x)) - scale.left(0);
  if (wide < 2) return { type: "scatter", mode: "lines", x, y, line: { shape: "hvh", width: 0 }, fill: "tozeroy", fillcolor: fill };
  return { type: "bar", x, y, width: (spacingOf(x) / wide) * Math.min(0.7 * wide, 24), marker: { color: fill, line: { width: 0 } } };
}

function annotation({ x, label, color: name }, scale) {
  const isRight = scale.left(x) - MARGIN.l > scale.plot.width * 0.75;
  return { x, yref: "paper", y: 1, text: label, showarrow: false, font: { color: color(name), weight: 600 },
    xanchor: isRight ? "right" : "left", yanchor: "top", xshift: isRight ? -3 : 3, yshift: name === "replay" ? -17 : 0 };
}
