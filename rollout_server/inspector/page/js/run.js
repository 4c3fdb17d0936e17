/** One run: its tabs, and the overview with the numbers and curves, kept up to date while the run goes on. */

import { follow, get, runPath } from "./api.js";
import { chart, SHARES } from "./charts.js";
import { empty, h } from "./dom.js";
import { count, nats, number, percent } from "./format.js";
import { isLive, liveTab } from "./live.js";
import { address } from "./place.js";
import { replayTab } from "./replay.js";
import { sequencesTab } from "./sequences.js";

const TABS = [["overview", "Overview"], ["sequences", "Sequences"], ["replay", "Replay"]];
const LIVE_TAB = ["live", "Try it"]; // where the run goes on and this service is attached to its cluster

/** @param {Record<string, string>} place @param {AbortSignal} signal */
export async function runView(place, signal) {
  const [detail, live] = await Promise.all([get(runPath(place.run), {}, signal), isLive(place.run, signal)]);
  const tab = place.tab ?? "overview";
  const tabs = h("nav", { class: "tabs", "aria-label": "Parts of the run" }, (live ? [...TABS, LIVE_TAB] : TABS).map(([key, title]) =>
    h("a", { href: address({ run: place.run, tab: key === "overview" ? null : key }), "data-link": true, "aria-current": key === tab ? "page" : null }, title)));
  const body = h("div", {});
  const page = h("div", {}, h("div", { class: "head" }, h("h1", {}, place.run), h("span", { class: "muted" }, headline(detail))), notices(detail), tabs, body);
  if (tab === "sequences") body.append(await sequencesTab(place, detail, signal));
  else if (tab === "replay") body.append(await replayTab(place, detail, signal));
  else if (tab === "live") body.append(live ? liveTab(place, detail, signal) : empty("Nothing to try here", "The run has ended, or this service was not started with --attach."));
  else await overview(body, place.run, detail, signal);
  keepUp(place.run, signal, async () => {
    if (tab === "overview") await overview(body, place.run, await get(runPath(place.run), {}, signal), signal);
    else window.dispatchEvent(new Event("runchange"));
  });
  return page;
}

function headline(detail) {
  const p = detail.policy;
  const settings = p?.type === "adaswitch" ? ` · K ${p.multiplier} · L ${p.window} · floor ${p.floor}` : "";
  return `${p?.type ?? "policy not known"}${settings} · ${detail.finished ? "finished" : "not finished"}`;
}

function notices(detail) {
  const lines = [...detail.skipped.map((s) => `${s.name}: ${s.reason}`), ...detail.problems];
  if (!lines.length) return null;
  const title = detail.skipped.length ? `${detail.skipped.length} broken ${detail.skipped.length === 1 ? "part" : "parts"} of the trace left out` : "Not everything could be read";
  return h("details", { class: "notice" }, h("summary", {}, title, ". What is shown is without them."), h("ul", {}, lines.map((line) => h("li", {}, line))));
}

async function overview(body, run, detail, signal) {
  const { steps } = await get(runPath(run, "/steps"), {}, signal);
  const measured = steps.map((s) => s.accuracy).filter((v) => v !== null);
  const accuracy = measured.length > 1 ? `${percent(measured[0])} → ${percent(measured.at(-1))}` : percent(measured[0]);
  const facts = [["held-out accuracy", accuracy], ["switch rate", percent(detail.switch_rate)], ["teacher's tokens", percent(detail.teacher_share)],
    ["mean first switch", number(detail.mean_first_switch)], ["mean divergence", nats(detail.mean_divergence)], ["sequences", count(detail.num_sequences)], ["tokens", count(detail.num_tokens)]];
  body.replaceChildren(h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    h("div", { class: "charts" }, curves(steps)),
    detail.config_text ? h("details", { class: "config" }, h("summary", {}, "Settings of this run"), h("pre", {}, detail.config_text)) : null);
}

/** @param {any[]} steps */
function curves(steps) {
  const x = steps.map((s) => s.step);
  const of = (key, label, color, dash) => ({ label, color, dash, values: steps.map((s) => s[key]) });
  return [
    chart({ title: "Loss, nats per token", x, series: [of("loss", "loss", "loss")] }),
    chart({ title: "Held-out accuracy", x, series: [of("accuracy", "accuracy", "accuracy")], ...SHARES }),
    chart({ title: "Switching", x, ...SHARES, series: [of("switch_rate", "sequences that switch", "switch"), of("teacher_share", "teacher's tokens", "teacher")] }),
    chart({ title: "Divergence per token, nats (log)", x, log: true, series: [of("divergence_p50", "median", "q50"), of("divergence_p90", "90%", "q90"), of("divergence_p99", "99%", "q99")] }),
    chart({ title: "Mean position of the first switch", x, series: [of("mean_first_switch", "position", "switch")] }),
    chart({ title: "Tokens per second in rollout", x, series: [of("tokens_per_s", "tokens/s", "student")] }),
  ].map((made) => h("div", { class: "card" }, made.element));
}

/** Calls `changed` when steps came after the view was made, until it is left; connects again when the stream ends. */
async function keepUp(run, signal, changed) {
  const light = /** @type {HTMLElement} */ (document.getElementById("live"));
  while (!signal.aborted) {
    try {
      let first = true;
      for await (const event of follow(run, signal)) {
        light.textContent = `live · ${count(event.num_sequences)} sequences`;
        if (!first) await changed();
        first = false;
      }
    } catch {
      if (!signal.aborted) light.textContent = "not connected";
    }
    await new Promise((resume) => setTimeout(resume, 3000));
  }
}
