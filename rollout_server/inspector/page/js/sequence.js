/** One sequence: its text token by token, the curve beneath, and where other settings would have switched. */

import { get, post, runPath, sequencePath } from "./api.js";
import { curveOf } from "./curve.js";
import { debounce, h } from "./dom.js";
import { count, nats, percent } from "./format.js";
import { REPLAY_AFTER_MS, replayer } from "./replay.js";
import { sliders, startPolicy } from "./sliders.js";
import { legend, tokenDetail, tokenText } from "./tokens.js";

const MOST_DIFFERENCES = 1000; // the service names no more
const REASONS = {
  policy: "", student_finished: "the student finished first", length_limit: "the length limit came first",
  given_answer: "the text is a given answer", teacher_had_taken_over: "the teacher had taken over before",
};

/** @param {Record<string, string>} place @param {AbortSignal} signal */
export async function sequenceView(place, signal) {
  const { run, sequence: id } = place;
  const [sequence, { tokens }, detail] = await Promise.all([get(sequencePath(run, id), {}, signal),
    get(sequencePath(run, id, "/tokens"), {}, signal), get(runPath(run), {}, signal)]);
  const recorded = startPolicy({}, detail);
  const policy = startPolicy(place, detail);
  const judged = { outcome: null, position: null };
  const info = h("aside", { class: "card info", "aria-live": "polite" });
  const curve = curveOf(tokens, policy, judged, place.scale !== "linear", (i) => text.choose(i));
  const text = tokenText(tokens, (i) => { info.replaceChildren(...tokenDetail(tokens[i])); curve.point(i); });
  const verdict = h("p", { class: "verdict", role: "status" });
  const report = h("section", { class: "card report" });
  const whole = replayer(run, report, signal);
  const one = judgeOne(run, sequence, judged, signal, (message) => {
    verdict.replaceChildren(...message);
    text.markReplay(judged.position === sequence.first_switch ? null : judged.position);
    curve.update();
  });
  const ask = debounce(() => { one(policy); whole(policy); }, REPLAY_AFTER_MS);
  const changed = () => { curve.update(); ask(); };
  ask();
  text.choose(sequence.first_switch ?? 0);
  return h("div", { class: "sequence" }, head(sequence),
    h("div", { class: "reading" },
      h("div", { class: "left" }, h("section", { class: "card" }, legend(), h("p", { class: "asked" }, sequence.prompt_text), text.element, answer(sequence)),
        h("section", { class: "card" }, curve.element)), info),
    h("div", { class: "whatif" }, h("section", { class: "card" }, h("h2", {}, "What if?"), sliders(policy, changed, recorded), verdict), report));
}

function head(s) {
  const facts = [`step ${count(s.step)}`, `${count(s.num_tokens)} tokens`, `${percent(s.num_teacher_tokens / s.num_tokens, 0)} by the teacher`,
    s.first_switch === null ? "no switch" : `switch at ${s.switches.slice(0, 8).join(", ")}${s.switches.length > 8 ? " …" : ""}`,
    `mean ${nats(s.mean_divergence)}`, `${count(s.num_wasted_tokens)} dropped`, `ended by ${s.finish_reason}`];
  return h("div", { class: "head" }, h("h1", {}, `Sequence ${s.sequence_id}`), h("ul", { class: "chips" }, facts.map((fact) => h("li", {}, fact))));
}

const answer = (s) => (s.answer === null ? null : h("p", { class: "muted" }, "Expected: ", h("b", {}, s.answer)));

/** Asks the service where the policy would have switched in this one sequence. */
function judgeOne(run, sequence, judged, leave, say) {
  let current = new AbortController();
  leave.addEventListener("abort", () => current.abort());
  return async (policy) => {
    current.abort();
    current = new AbortController();
    const { signal } = current;
    const { step, sequence_id, first_switch } = sequence;
    try {
      const report = await post(runPath(run, "/replay"), { policy, first_step: step, last_step: step, max_differences: MOST_DIFFERENCES }, signal);
      const other = report.differences.find((d) => d.sequence_id === sequence_id);
      if (!other && report.differences.length === MOST_DIFFERENCES) throw new Error("Too many sequences of this step change for the service to name this one.");
      judged.outcome = other?.outcome ?? "same";
      judged.position = other ? other.replayed_first_switch : first_switch;
      say(verdictOf(judged, other, first_switch));
    } catch (error) {
      if (signal.aborted) return;
      Object.assign(judged, { outcome: null, position: null });
      say([error.message]);
    }
  };
}

function verdictOf({ outcome, position }, other, recorded) {
  const was = recorded === null ? "no switch" : `a switch at ${recorded}`;
  if (outcome === "same") return ["As recorded: ", h("b", {}, was), "."];
  if (outcome === "switch") return ["Would switch at ", h("b", {}, String(position)), `; recorded: ${was}.`];
  if (outcome === "no_switch") return [h("b", {}, "Would not switch"), `: ${REASONS[other.reason]}; recorded: ${was}.`];
  return [h("b", {}, "Can't be judged"), `: ${REASONS[other.reason]}, at ${recorded}. The threshold is not crossed before.`];
}
