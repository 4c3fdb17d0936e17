/** Two runs side by side: their numbers, and each curve in one chart. */

import { get, runPath } from "./api.js";
import { chart, SHARES } from "./charts.js";
import { h } from "./dom.js";
import { count, nats, number, percent } from "./format.js";
import { address } from "./place.js";

const CURVES = [["loss", "Loss, nats per token"], ["accuracy", "Held-out accuracy", SHARES], ["switch_rate", "Switch rate", SHARES],
  ["teacher_share", "Teacher's tokens", SHARES], ["divergence_p90", "Divergence, 90%, nats"], ["mean_first_switch", "Mean position of the first switch"]];

/** @param {Record<string, string>} place @param {AbortSignal} signal */
export async function compareView(place, signal) {
  const names = [place.run, place.with];
  const both = await Promise.all(names.map(async (name) => ({ detail: await get(runPath(name), {}, signal), steps: (await get(runPath(name, "/steps"), {}, signal)).steps })));
  const x = [...new Set(both.flatMap(({ steps }) => steps.map((s) => s.step)))].sort((a, b) => a - b);
  const curves = CURVES.map(([key, title, settings]) => {
    const series = both.map(({ steps }, i) => {
      const at = new Map(steps.map((s) => [s.step, s[key]]));
      return { label: names[i], color: i ? "teacher" : "student", values: x.map((step) => at.get(step) ?? null) };
    });
    return h("div", { class: "card" }, chart({ title, x, series, ...settings }).element);
  });
  return h("div", {}, h("div", { class: "head" }, h("h1", {}, names.map((name, i) => [i ? " and " : "", h("a", { href: address({ run: name }), "data-link": true }, name)]))),
    h("div", { class: "card wide" }, numbers(names, both.map((b) => b.detail))), h("div", { class: "charts" }, curves));
}

function numbers(names, details) {
  const rows = [["policy", (d) => d.policy?.type ?? "–"], ["switch rate", (d) => percent(d.switch_rate)], ["teacher's tokens", (d) => percent(d.teacher_share)],
    ["mean first switch", (d) => number(d.mean_first_switch)], ["mean divergence", (d) => nats(d.mean_divergence)], ["sequences", (d) => count(d.num_sequences)],
    ["student tokens dropped", (d) => count(d.num_wasted_tokens)]];
  return h("table", { class: "numbers" }, h("thead", {}, h("tr", {}, h("td", {}), names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, rows.map(([name, of]) => h("tr", {}, h("th", { scope: "row" }, name), details.map((d) => h("td", {}, of(d)))))));
}
