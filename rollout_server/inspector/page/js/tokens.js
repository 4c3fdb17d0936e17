/** A sequence as text: who wrote each token, how far the models were apart, and the numbers behind it. */

import { h } from "./dom.js";
import { nats, number, percent } from "./format.js";

const LEVELS = [0.02, 0.1, 0.5, 1, 2, 4]; // nats from which a token is shaded one degree darker

const level = (divergence) => (divergence === null ? 0 : LEVELS.filter((bound) => divergence >= bound).length);

/** What cannot be seen gets a sign. @param {string} text */
export function visible(text) {
  if (text === "") return "∅";
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

/**
 * The tokens in a row; arrow keys, hover and click choose one.
 * @param {any[]} tokens @param {(i: number) => void} chosen
 * @returns {{element: HTMLElement, choose: (i: number) => void, markReplay: (i: number|null) => void, append: (t: any) => void}}
 */
export function tokenText(tokens, chosen) {
  const spans = tokens.map(spanOf);
  let at = -1;
  const choose = (i) => {
    if (i === at || i < 0 || i >= spans.length) return;
    spans[at]?.setAttribute("aria-selected", "false");
    spans[i].setAttribute("aria-selected", "true");
    element.setAttribute("aria-activedescendant", `token-${i}`);
    at = i;
    chosen(i);
  };
  const under = (event) => { const span = event.target.closest?.(".token"); if (span) choose(Number(span.dataset.i)); };
  const key = (event) => {
    const move = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (move === undefined) return;
    event.preventDefault();
    choose(move);
    spans[at]?.scrollIntoView({ block: "nearest" });
  };
  const element = h("div", { class: "tokens", role: "listbox", tabindex: 0, "aria-label": "Tokens. Arrow keys go from one to the next.",
    on: { pointerover: under, click: under, keydown: key } }, spans);
  const markReplay = (i) => spans.forEach((span, k) => span.classList.toggle("replayed", k === i));
  const append = (t) => { spans.push(spanOf(t, spans.length)); element.append(spans.at(-1)); };
  return { element, choose, markReplay, append };
}

const spanOf = (t, i) => h("span", {
  class: `token ${t.source} d${level(t.divergence)}${t.is_switch ? " switch" : ""}`, role: "option", id: `token-${i}`, "aria-selected": "false",
  "aria-label": `${i}: ${t.text || "empty"}, ${t.source}${t.is_switch ? ", switch" : ""}`, data: { i },
}, visible(t.text));

/** What the colours mean. */
export function legend() {
  return h("div", { class: "legend" }, h("span", { class: "key student" }, "student"), h("span", { class: "key teacher" }, "teacher"),
    h("span", { class: "scale" }, "divergence ", [0, 1, 2, 3, 4, 5, 6].map((d) => h("i", { class: `d${d}` })), " 4 nats"));
}

/** All that was known of one token when it was decided. @param {any} t */
export function tokenDetail(t) {
  const rows = [["divergence", nats(t.divergence)], ["moving average", nats(t.moving_average)], ["threshold", nats(t.threshold)],
    ["student's log-prob", logprob(t.student_logprob)], ["teacher's log-prob", logprob(t.teacher_logprob)],
    ["proposal's rank with the teacher", t.student_rank === null ? "–" : String(t.student_rank)], ["weight version", t.weight_version === null ? "–" : String(t.weight_version)],
    ["lists cover", `${percent(t.student_covered_mass)} · ${percent(t.teacher_covered_mass)}`]];
  return [h("h2", {}, h("span", { class: `token ${t.source}` }, visible(t.text)), " ", h("small", {}, `position ${t.position} · id ${t.token_id} · ${t.source}${t.is_switch ? " takes over" : ""}`)),
    h("dl", { class: "pairs" }, rows.map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
    h("div", { class: "tops" }, top("Student", "student", t.student_top, t.token_id), top("Teacher", "teacher", t.teacher_top, t.token_id))];
}

const logprob = (value) => (value === null ? "–" : `${number(value)} (${percent(Math.exp(value))})`);

function top(title, source, alternatives, written) {
  if (!alternatives) return h("div", {}, h("h3", {}, title), h("p", { class: "muted" }, "proposed nothing here"));
  return h("div", {}, h("h3", {}, title), h("ol", { class: `best ${source}` }, alternatives.slice(0, 8).map((a) => {
    const bar = h("i", { "aria-hidden": "true" });
    bar.style.width = `${100 * Math.exp(a.logprob)}%`;
    return h("li", { class: a.token_id === written ? "written" : "" }, bar, h("span", {}, a.text === null ? `#${a.token_id}` : visible(a.text)), h("b", {}, percent(Math.exp(a.logprob))));
  })));
}
