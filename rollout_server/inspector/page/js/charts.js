/** Charts by Plotly, with a cursor of the page's own and a legend that shows the values under it. */

import { h } from "./dom.js";
import { CONFIG, figure, scales } from "./figure.js";
import { number, percent } from "./format.js";
import { plotly } from "./plotly.js";

/** @typedef {import("./figure.js").Series} Series */

/** Settings of a chart of shares. */
export const SHARES = { range: [0, 1.05], format: (v) => percent(v, 0), ticks: ".0%" };

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

/** A line at one position and a dot on each series. Elements of the page: Plotly draws nothing while the mouse moves. */
function makeCursor(x, series) {
  const line = h("div", { class: "cursor", hidden: true });
  const dots = series.map(() => h("i", { class: "dot", hidden: true }));
  dots.forEach((dot, k) => { dot.style.background = `var(--${series[k].color})`; });
  const show = (i, scale) => {
    line.hidden = i === null;
    dots.forEach((dot, k) => { dot.hidden = i === null || series[k].values[i] === null; });
    if (i === null) return;
    Object.assign(line.style, { left: `${scale.left(x[i])}px`, top: `${scale.top}px`, height: `${scale.plot.height}px` });
    dots.forEach((dot, k) => { if (!dot.hidden) Object.assign(dot.style, { left: `${scale.left(x[i])}px`, top: `${scale.y(series[k].values[i])}px` }); });
  };
  return { elements: [line, ...dots], show };
}

/**
 * @param {{title: string, x: number[], series: Series[], xLabel?: string, log?: boolean, range?: [number, number],
 *   format?: (v: number) => string, ticks?: string, height?: number, marks?: () => {x: number, label: string, color: string}[],
 *   onClick?: (i: number) => void, from?: string}} wanted `ticks`: a format of d3 for the numbers at the y axis
 * @returns {{element: HTMLElement, point: (i: number) => void, set: (values: (number|null)[][]) => void}}
 */
export function chart(wanted) {
  const { title, x, series, height = 190 } = wanted;
  const legend = makeLegend(series, wanted.format ?? number, wanted.from ?? "step");
  const host = h("div", { class: "plot" });
  const shown = series.filter((s) => s.values.some((v) => v !== null));
  const element = h("figure", { class: "chart", role: "group", "aria-label": summary(title, shown, wanted.format) },
    h("figcaption", {}, h("h3", {}, title), legend.element), host);
  if (!x.length || !shown.length) {
    host.replaceChildren(h("p", { class: "nothing" }, "Nothing recorded yet"));
    return { element, point: () => {}, set: () => {} };
  }
  const picture = h("div", { "aria-hidden": "true" }); // the figure's label says what a screen reader needs
  const cursor = makeCursor(x, series);
  host.append(picture, ...cursor.elements);
  host.style.height = `${height}px`;
  let [library, scale, pointed, frame] = [null, null, null, 0];

  const point = (i) => {
    pointed = i;
    legend.show(i === null ? null : x[i], i);
    if (scale) cursor.show(i, scale);
  };
  const draw = () => {
    const width = Math.floor(host.clientWidth);
    if (!library || !width) return;
    scale = scales(wanted, width, height);
    library.react(picture, ...figure(wanted, scale, width, height), CONFIG);
    point(pointed);
  };
  const under = (event) => nearest(x, scale.x(event.clientX - host.getBoundingClientRect().left));
  host.addEventListener("pointermove", (event) => { if (scale) point(under(event)); });
  host.addEventListener("pointerleave", () => point(null));
  host.addEventListener("click", (event) => { if (scale) wanted.onClick?.(under(event)); });
  new ResizeObserver(draw).observe(host);
  const repaint = () => (element.isConnected ? draw() : window.removeEventListener("themechange", repaint));
  window.addEventListener("themechange", repaint);
  plotly().then((loaded) => { library = loaded; draw(); }, () => host.replaceChildren(
    h("p", { class: "nothing" }, "No chart: plotly.min.js could not be loaded. Is the Python package plotly installed where the inspector runs?")));
  return {
    element,
    point,
    set: (values) => {
      values.forEach((v, k) => { series[k].values = v; });
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(draw);
    },
  };
}

/** Index of the value of sorted `x` that is nearest to `at`. */
function nearest(x, at) {
  let [low, high] = [0, x.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (x[middle] <= at) low = middle;
    else high = middle;
  }
  return at - x[low] <= x[high] - at ? low : high;
}

function summary(title, series, format = number) {
  const last = series.map((s) => `${s.label}: last ${format(s.values.filter((v) => v !== null).at(-1))}`);
  return `Chart, ${title}. ${last.join("; ") || "nothing recorded"}`;
}
