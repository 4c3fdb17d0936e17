/** Charts by uPlot in the page's colours, with a legend that shows the values under the cursor. */

import uPlot from "../vendor/uplot/uPlot.esm.js";
import { h } from "./dom.js";
import { number } from "./format.js";

/** @typedef {{label: string, values: (number|null)[], color: string, kind?: "line"|"bars", dash?: number[]}} Series */

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

function plotted(series) {
  return {
    label: series.label,
    stroke: () => colour(series.color),
    fill: series.kind === "bars" ? () => colour(series.color) : undefined,
    width: series.kind === "bars" ? 0 : 2,
    dash: series.dash,
    spanGaps: true,
    paths: series.kind === "bars" ? uPlot.paths.bars({ size: [0.7, 24] }) : undefined,
    points: { show: series.kind === "bars" ? false : series.values.filter((v) => v !== null).length < 12, size: 5 },
  };
}

const decade = (_, ticks) => ticks.map((v) => (v > 0 && Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6 ? v : null));

function axes(xLabel, yFormat, log) {
  const look = { stroke: () => colour("muted"), font: "12px system-ui", ticks: { show: false } };
  return [
    { ...look, grid: { show: false }, size: 24, label: xLabel, labelSize: 18, labelGap: 0, labelFont: "12px system-ui",
      incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000], space: 44 },
    { ...look, grid: { stroke: () => colour("line"), width: 1, ...(log ? { filter: decade } : {}) }, size: 52,
      values: (_, ticks) => ticks.map((tick) => (tick === null ? "" : (yFormat ?? number)(tick))) },
  ];
}

/** @param {Series[]} series @param {(v: number) => string} format */
function makeLegend(series, format, from) {
  const values = series.map(() => h("b", {}));
  const place = h("span", { class: "at" });
  const show = (x, i) => {
    place.textContent = i === null ? "" : `${from} ${x}`;
    series.forEach((s, k) => { values[k].textContent = i === null || s.values[i] === null ? "" : format(s.values[i]); });
  };
  const keys = series.map((s, k) => h("span", { class: `key ${s.color}` }, s.label, " ", values[k]));
  return { element: h("div", { class: "legend" }, keys, place), show };
}

/**
 * @param {{title: string, x: number[], series: Series[], xLabel?: string, log?: boolean, range?: [number, number],
 *   format?: (v: number) => string, height?: number, marks?: () => {x: number, label: string, color: string}[],
 *   onHover?: (i: number|null) => void, onClick?: (i: number) => void, from?: string}} wanted
 * @returns {{element: HTMLElement, point: (i: number) => void, set: (values: (number|null)[][]) => void}}
 */
export function chart(wanted) {
  const { title, x, series, height = 190, log = false } = wanted;
  const legend = makeLegend(series, wanted.format ?? number, wanted.from ?? "step");
  const host = h("div", { class: "plot" });
  const shown = series.filter((s) => s.values.some((v) => v !== null));
  const element = h("figure", { class: "chart", role: "group", "aria-label": summary(title, shown, wanted.format) },
    h("figcaption", {}, h("h3", {}, title), legend.element), host);
  if (!x.length || !shown.length) {
    host.replaceChildren(h("p", { class: "nothing" }, "Nothing recorded yet"));
    return { element, point: () => {}, set: () => {} };
  }
  const clean = (values) => (log ? values.map((v) => (v === null ? null : Math.max(v, 1e-5))) : values);
  const margin = (low, high) => (low === high || series[0].kind === "bars" ? 0.6 : 0);
  const plot = new uPlot({
    width: 300, height,
    legend: { show: false },
    cursor: { y: false, drag: { x: false, y: false }, points: { size: 6 } },
    scales: { x: { time: false, range: (_, low, high) => [low - margin(low, high), high + margin(low, high)] },
      y: { distr: log ? 3 : 1, ...(wanted.range ? { range: () => wanted.range } : log ? {} : { range: (_, low, high) => [Math.min(0, low), high * 1.08 || 1] }) } },
    axes: axes(wanted.xLabel ?? "step", wanted.format, log),
    series: [{}, ...series.map((s) => plotted(s))],
    hooks: {
      setCursor: [(u) => { const i = u.cursor.idx ?? null; legend.show(i === null ? null : x[i], i); wanted.onHover?.(i); }],
      draw: [(u) => (wanted.marks?.() ?? []).forEach((mark) => drawMark(u, mark))],
    },
  }, [x, ...series.map((s) => clean(s.values))], host);
  plot.over.addEventListener("click", () => { if (plot.cursor.idx != null) wanted.onClick?.(plot.cursor.idx); });
  let pointed = null;
  const point = (i) => {
    pointed = i;
    plot.setCursor({ left: plot.valToPos(x[i], "x"), top: 0 }, false);
    legend.show(x[i], i);
  };
  new ResizeObserver(([entry]) => {
    plot.setSize({ width: Math.floor(entry.contentRect.width), height });
    if (pointed !== null) point(pointed);
  }).observe(host);
  const repaint = () => (element.isConnected ? plot.redraw(false) : window.removeEventListener("themechange", repaint));
  window.addEventListener("themechange", repaint);
  return {
    element,
    point,
    set: (values) => { values.forEach((v, k) => { series[k].values = v; }); plot.setData([x, ...values.map(clean)]); },
  };
}

function drawMark(plot, { x, label, color }) {
  const { ctx, bbox } = plot;
  const left = Math.round(plot.valToPos(x, "x", true));
  ctx.save();
  ctx.strokeStyle = ctx.fillStyle = colour(color);
  ctx.lineWidth = 2 * devicePixelRatio;
  ctx.setLineDash([5 * devicePixelRatio, 4 * devicePixelRatio]);
  ctx.beginPath();
  ctx.moveTo(left, bbox.top);
  ctx.lineTo(left, bbox.top + bbox.height);
  ctx.stroke();
  ctx.font = `600 ${12 * devicePixelRatio}px system-ui`;
  const right = left > bbox.left + bbox.width * 0.75;
  ctx.textAlign = right ? "right" : "left";
  ctx.fillText(label, left + (right ? -6 : 6) * devicePixelRatio, bbox.top + (color === "replay" ? 30 : 13) * devicePixelRatio);
  ctx.restore();
}

function summary(title, series, format = number) {
  const last = series.map((s) => `${s.label}: last ${format(s.values.filter((v) => v !== null).at(-1))}`);
  return `Chart, ${title}. ${last.join("; ") || "nothing recorded"}`;
}
