/** All runs: what each is, how it went in one line, and the way to compare two. */

import { get, runPath } from "./api.js";
import { empty, h, svg } from "./dom.js";
import { ago, count, percent } from "./format.js";
import { address, go } from "./place.js";

const NUM_SPARKLINES = 24; // runs whose curves are asked for

/** @param {AbortSignal} signal */
export async function runsView(signal) {
  const { runs, next_cursor } = await get("/runs", { limit: 100 }, signal);
  if (!runs.length) return empty("No runs yet", "A run appears here once it has written its first step.");
  const chosen = new Set();
  const compare = h("button", { type: "button", disabled: true, on: { click: () => { const [a, b] = chosen; go({ run: a, with: b }); } } }, "Compare two runs");
  const choose = (run) => (event) => {
    if (event.target.checked) chosen.add(run.name); else chosen.delete(run.name);
    compare.disabled = chosen.size !== 2;
    compare.textContent = chosen.size === 1 ? "Choose one more to compare" : "Compare two runs";
  };
  const cards = runs.map((run, i) => card(run, choose(run), i < NUM_SPARKLINES, signal));
  return h("div", {}, h("div", { class: "head" }, h("h1", {}, "Runs"), h("span", { class: "grow" }), compare),
    h("ul", { class: "runs" }, cards),
    next_cursor ? h("p", { class: "muted" }, "The 100 runs that changed last are shown.") : null);
}

function card(run, choose, withCurves, signal) {
  const curves = h("div", { class: "sparks" });
  if (withCurves) fill(run.name, curves, signal);
  return h("li", { class: "card run" },
    h("label", { class: "pick", title: "Choose for comparison" }, h("input", { type: "checkbox", "aria-label": `Compare ${run.name}`, on: { change: choose } })),
    h("a", { href: address({ run: run.name }), "data-link": true, class: "name" }, run.name),
    h("p", { class: "muted" }, [run.policy ?? "policy not known", run.last_step === null ? "no steps" : `step ${count(run.last_step)}`,
      run.finished ? "finished" : "not finished", ago(run.modified)].join(" · ")),
    curves);
}

async function fill(name, host, signal) {
  try {
    const { steps } = await get(runPath(name, "/steps"), {}, signal);
    host.append(spark("accuracy", steps.map((s) => s.accuracy), percent, "accuracy"), spark("switch rate", steps.map((s) => s.switch_rate), percent, "switch"),
      spark("loss", steps.map((s) => s.loss), (v) => v.toFixed(3), "loss"));
  } catch {
    if (!signal.aborted) host.append(h("span", { class: "muted" }, "Its curves can't be read."));
  }
}

function spark(label, all, format, color) {
  const values = all.filter((v) => v !== null);
  if (!values.length) return h("span", { class: "spark muted" }, `${label} –`);
  const top = Math.max(...values, 1e-9);
  const points = values.map((v, i) => `${(100 * i) / Math.max(values.length - 1, 1)},${28 - (26 * v) / top}`).join(" ");
  return h("span", { class: "spark" }, h("span", {}, label, " ", h("b", {}, format(values.at(-1)))),
    svg("svg", { viewBox: "0 0 100 30", preserveAspectRatio: "none", "aria-hidden": "true", class: color }, svg("polyline", { points })));
}
