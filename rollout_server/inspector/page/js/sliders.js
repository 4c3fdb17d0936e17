/** Sliders for K, L and floor. They start from the address, else from the run's own policy. */

import { h } from "./dom.js";
import { note } from "./place.js";

const KNOBS = [
  ["multiplier", "K", "times the moving average", 0.5, 10, 0.1],
  ["window", "L", "positions in the average", 1, 64, 1],
  ["floor", "floor", "nats, the threshold is never lower", 0, 4, 0.01],
];

/** @param {Record<string, string>} place @param {any} detail @returns {any} an adaswitch policy */
export function startPolicy(place, detail) {
  const own = detail.policy?.type === "adaswitch" ? detail.policy : { type: "adaswitch", multiplier: 3, window: 10, floor: 0 };
  const divergence = own.divergence ?? detail.policy?.divergence ?? (detail.divergence ? { type: detail.divergence } : undefined);
  const policy = { ...own, ...(divergence ? { divergence } : {}) };
  for (const [name] of KNOBS) {
    const given = Number(place[name]);
    if (place[name] && Number.isFinite(given)) policy[name] = given;
  }
  return policy;
}

/** @param {any} policy changed in place @param {() => void} changed @param {any} recorded what the run used, to go back to */
export function sliders(policy, changed, recorded) {
  const rows = KNOBS.map(([name, label, hint, min, max, step]) => {
    const output = h("output", {}, String(policy[name]));
    const input = h("input", { type: "range", name, min, max: Math.max(max, policy[name]), step, value: policy[name], "aria-label": `${label}: ${hint}` });
    const set = (value) => { policy[name] = value; output.textContent = String(value); };
    input.addEventListener("input", () => {
      set(Number(input.value));
      if (policy.warmup && policy.warmup < policy.window) policy.warmup = null;
      note({ [name]: policy[name] });
      changed();
    });
    return { element: h("label", { class: "slider" }, h("span", {}, h("b", {}, label), " ", h("small", {}, hint)), output, input),
      reset: () => { set(recorded[name]); input.value = recorded[name]; note({ [name]: null }); } };
  });
  const back = h("button", { type: "button", class: "quiet", on: { click: () => { rows.forEach((row) => row.reset()); policy.warmup = recorded.warmup; changed(); } } }, "Back to the run's");
  return h("div", { class: "sliders" }, rows.map((row) => row.element), back);
}
