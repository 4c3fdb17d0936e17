/** Replay: what another K, L or floor would have done to the whole run, and to one sequence. */

import { post, runPath } from "./api.js";
import { chart } from "./charts.js";
import { debounce, errorBox, h } from "./dom.js";
import { count, number, percent } from "./format.js";
import { note } from "./place.js";
import { sliders, startPolicy } from "./sliders.js";

export const REPLAY_AFTER_MS = 150;

/** @param {Record<string, string>} place @param {any} detail @param {AbortSignal} signal */
export async function replayTab(place, detail, signal) {
  const policy = startPolicy(place, detail);
  const steps = { first_step: place.first_step || null, last_step: place.last_step || null };
  const report = h("div", { class: "report", "aria-live": "polite" });
  const ask = replayer(place.run, report, signal);
  const changed = debounce(() => ask(policy, steps), REPLAY_AFTER_MS);
  const bound = (name, label) => h("label", {}, label, h("input", { type: "number", min: 0, placeholder: "any", value: steps[name] ?? "",
    on: { input: (event) => { steps[name] = event.target.value || null; note({ [name]: steps[name] }); changed(); } } }));
  ask(policy, steps);
  return h("div", { class: "whatif" },
    h("section", { class: "card" }, h("h2", {}, "Another threshold"), h("p", { class: "muted" }, "Judged anew on the recorded divergences. No model is asked."),
      sliders(policy, changed, startPolicy({}, detail)), h("div", { class: "filters steps" }, bound("first_step", "Step from"), bound("last_step", "Step to"))),
    h("section", { class: "card" }, report));
}

/** Asks for the run's report and shows it; a newer question ends an older one. */
export function replayer(run, host, leave) {
  let current = new AbortController();
  leave.addEventListener("abort", () => current.abort());
  return async function ask(policy, steps = {}) {
    current.abort();
    current = new AbortController();
    const { signal } = current;
    host.setAttribute("aria-busy", "true");
    try {
      const given = Object.fromEntries(Object.entries(steps).filter(([, v]) => v !== null).map(([k, v]) => [k, Number(v)]));
      const report = await post(runPath(run, "/replay"), { policy, bins: 200, max_differences: 0, ...given }, signal);
      host.replaceChildren(...reportParts(report));
    } catch (error) {
      if (!signal.aborted) host.replaceChildren(errorBox(error));
    }
    if (!signal.aborted) host.removeAttribute("aria-busy");
  };
}

function reportParts(r) {
  if (!r.num_sequences) return [h("p", { class: "muted" }, "No sequences to judge.")];
  const row = (name, recorded, replayed) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, recorded), h("td", {}, replayed));
  return [
    h("h2", {}, `The run, ${count(r.num_sequences)} sequences`),
    h("table", { class: "numbers" }, h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, "recorded"), h("th", { scope: "col" }, "with these"))),
      h("tbody", {}, row("switch rate", percent(r.recorded_switch_rate), percent(r.switch_rate)),
        row("bounds", "", `${percent(r.switch_rate_min)} to ${percent(r.switch_rate_max)}`),
        row("mean first switch", number(r.mean_recorded_first_switch), number(r.mean_first_switch)),
        row("can't be judged", "", `${count(r.num_unknown)} (${percent(r.num_unknown / r.num_sequences, 0)})`))),
    bar(r),
    histogram(r),
    r.num_unknown ? h("p", { class: "muted" }, "Can't be judged: the teacher had taken over before these settings would have, and what the student would have written then was never recorded. Such sequences are part of no rate; the bounds say what they could change.") : null,
  ].filter(Boolean);
}

function bar(r) {
  const part = (name, n) => { const e = h("i", { class: name }); e.style.flexGrow = String(n); return e; };
  const groups = [["earlier", r.num_earlier], ["same", r.num_same], ["later or never", r.num_later_or_never], ["can't be judged", r.num_unknown]];
  return h("div", { class: "split" }, h("div", { class: "bar", "aria-hidden": "true" }, groups.map(([name, n]) => part(name.replaceAll(/[^a-z]/g, ""), n))),
    h("div", { class: "legend" }, groups.map(([name, n]) => h("span", { class: `key ${name.replaceAll(/[^a-z]/g, "")}` }, name, " ", h("b", {}, count(n))))));
}

/** Both histograms over the same bins. Those asked for are at most one position wide up to position 200, so exact. */
function histogram(r) {
  const end = Math.ceil(Math.max(r.recorded_histogram.edges.at(-1) ?? 0, r.histogram.edges.at(-1) ?? 0));
  const size = Math.max(1, Math.ceil((end + 1) / 24));
  const x = Array.from({ length: Math.ceil((end + 1) / size) }, (_, i) => i * size);
  const counts = ({ edges, counts: all }) => {
    const sums = x.map(() => 0);
    all.forEach((n, i) => {
      const position = i === all.length - 1 ? Math.floor(edges[i + 1]) : Math.ceil(edges[i + 1] - 1e-9) - 1;
      sums[Math.floor(position / size)] += n;
    });
    return sums;
  };
  return chart({ title: "Where the first switch falls", x, height: 170, xLabel: "position", from: "position",
    series: [{ label: "with these", values: counts(r.histogram), color: "replay", kind: "bars" }, { label: "recorded", values: counts(r.recorded_histogram), color: "switch" }] }).element;
}
