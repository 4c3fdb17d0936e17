/** A sequence's divergences over its positions, with what the policy compared them with. */

import { chart } from "./charts.js";
import { h } from "./dom.js";
import { thresholds } from "./judge.js";
import { note } from "./place.js";

/** Divergence, average and threshold over the positions, redrawn as the settings change. */
export function curveOf(tokens, policy, judged, startsLog, clicked) {
  const divergences = tokens.map((t) => t.divergence);
  const now = () => thresholds(divergences, policy);
  const marks = () => {
    const own = tokens.filter((t) => t.is_switch).map((t, i) => ({ x: t.position, label: i ? "" : "switch", color: "teacher" }));
    const isOther = judged.position !== null && judged.position !== tokens.find((t) => t.is_switch)?.position;
    return isOther ? [...own, { x: judged.position, label: "with these settings", color: "replay" }] : own;
  };
  let at = 0;
  const make = (log) => {
    const { average, threshold } = now();
    return chart({ log, title: "Divergence, nats", x: tokens.map((t) => t.position), height: 240, xLabel: "position", from: "position", marks, onClick: clicked,
    series: [{ label: "divergence", values: divergences, color: "student", kind: "bars" }, { label: "moving average", values: average, color: "q50" }, { label: "threshold", values: threshold, color: "loss", dash: [6, 4] }] });
  };
  let made = make(startsLog);
  const update = () => { const { average: m, threshold: t } = now(); made.set([divergences, m, t]); };
  const rescale = (event) => {
    const old = made.element;
    made = make(event.target.checked);
    old.replaceWith(made.element);
    made.point(at);
    note({ scale: event.target.checked ? null : "linear" });
  };
  const scale = h("label", { class: "switchable" }, h("input", { type: "checkbox", checked: startsLog, on: { change: rescale } }), "log scale");
  return { element: h("div", {}, scale, made.element), point: (i) => { at = i; made.point(i); }, update };
}
