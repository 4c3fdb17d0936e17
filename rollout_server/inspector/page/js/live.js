/** Try a prompt on a run that is being trained: its tokens appear as they are decided. */

import { get, stream } from "./api.js";
import { h } from "./dom.js";
import { count, nats } from "./format.js";
import { curveOf } from "./curve.js";
import { sliders, startPolicy } from "./sliders.js";
import { legend, tokenDetail, tokenText } from "./tokens.js";

const POLICIES = [["run", "as the run"], ["adaswitch", "AdaSwitch with"], ["on_policy", "the student alone"], ["off_policy", "the teacher alone"]];

/** Whether a run can be tried. @param {string} run @param {AbortSignal} signal */
export async function isLive(run, signal) {
  const live = await get("/live", {}, signal).catch(() => ({ runs: [] }));
  return live.runs.includes(run);
}

/** @param {Record<string, string>} place @param {any} detail @param {AbortSignal} leave */
export function liveTab(place, detail, leave) {
  const policy = startPolicy(place, detail);
  const knobs = sliders(policy, () => {}, startPolicy({}, detail));
  const prompt = h("textarea", { name: "prompt", rows: 3, required: true, "aria-label": "Prompt", placeholder: "A prompt, as the run's own are written", spellcheck: "false" }, place.prompt ?? "");
  const kind = h("select", { name: "policy", "aria-label": "Who writes" }, POLICIES.map(([value, text]) => h("option", { value }, text)));
  const number = (name, label, attributes) => h("label", {}, label, h("input", { type: "number", name, ...attributes }));
  const fields = h("div", { class: "filters" }, h("label", {}, "Policy", kind), number("temperature", "Temperature", { min: 0, max: 2, step: 0.1, placeholder: "run's" }),
    number("max_new_tokens", "Most tokens", { min: 1, placeholder: "run's" }), number("seed", "Seed", { min: 0, value: 0 }));
  const go = h("button", { class: "primary" }, "Write");
  const stop = h("button", { type: "button", hidden: true }, "Stop");
  const result = h("div", { class: "sequence" });
  const show = () => { knobs.hidden = kind.value !== "adaswitch"; };
  kind.addEventListener("change", show);
  show();

  async function write(event) {
    event.preventDefault();
    const current = new AbortController();
    leave.addEventListener("abort", () => current.abort());
    stop.onclick = () => current.abort();
    const shown = watched(policy);
    result.replaceChildren(shown.element);
    [go.disabled, stop.hidden] = [true, false];
    try {
      for await (const [name, data] of stream("/generate", wanted(place.run, form, kind.value, policy), current.signal)) shown.take(name, data);
    } catch (error) {
      shown.say(current.signal.aborted ? "Stopped." : [error.message, ...(error.errors ?? [])].join(" "), !current.signal.aborted);
    }
    [go.disabled, stop.hidden] = [false, true];
  }
  const form = h("form", { class: "card try", on: { submit: write } }, h("h2", {}, "Try a prompt"),
    h("p", { class: "muted" }, "Written by the run's own engines, with the weights they hold now, beside the training and no part of it."),
    prompt, fields, knobs, h("div", { class: "buttons" }, go, stop));
  return h("div", { class: "trying" }, form, result);
}

/** The body of the question; what is left empty is the run's. */
function wanted(run, form, kind, policy) {
  const given = Object.fromEntries(["temperature", "max_new_tokens", "seed"].map((name) => [name, form.elements[name].value]).filter(([, v]) => v !== "").map(([k, v]) => [k, Number(v)]));
  const chosen = { run: null, adaswitch: policy, on_policy: { type: "on_policy" }, off_policy: { type: "off_policy" } }[kind];
  return { run, prompt: form.elements.prompt.value, ...given, ...(chosen ? { policy: chosen } : {}) };
}

/** What has come so far: tokens, the chosen one's numbers, and at the end the curve. */
function watched(policy) {
  const tokens = [];
  const status = h("p", { class: "muted", role: "status" }, "The engines begin …");
  const asked = h("p", { class: "asked" });
  const info = h("aside", { class: "card info" });
  const curve = h("div", {});
  let point = () => {};
  let used = policy;
  const text = tokenText(tokens, (i) => { info.replaceChildren(...tokenDetail(tokens[i])); point(i); });
  const say = (message, isError) => { status.textContent = message; status.className = isError ? "notice error" : "muted"; };
  const finish = (end) => {
    const who = end.switches.length ? `switch at ${end.switches.slice(0, 8).join(", ")}` : "no switch";
    say(`${count(end.num_tokens)} tokens in ${end.seconds.toFixed(1)} s · ${count(end.num_teacher_tokens)} by the teacher · ${who} · mean ${nats(end.mean_divergence)} · ended by ${end.finish_reason} · weight version ${end.weight_version_max ?? "–"}`);
    const drawn = curveOf(tokens, { window: 0, multiplier: 0, floor: 0, ...used }, { position: null }, true, (i) => text.choose(i));
    curve.replaceChildren(h("section", { class: "card" }, drawn.element));
    point = drawn.point;
    if (tokens.length) text.choose(end.switches[0] ?? 0);
  };
  const take = (name, data) => {
    if (name === "start") { used = data.policy; asked.textContent = data.prompt_text; }
    else if (name === "token") { tokens.push(data); text.append(data); if (tokens.length === 1) text.choose(0); say(`${count(tokens.length)} tokens …`); }
    else if (name === "summary") finish(data);
    else if (name === "problem") say(data.detail, true);
  };
  const element = h("div", { class: "reading" }, h("div", { class: "left" }, h("section", { class: "card" }, legend(), asked, text.element, status), curve), info);
  return { element, take, say };
}
