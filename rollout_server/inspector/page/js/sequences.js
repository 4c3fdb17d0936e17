/** The list of sequences: filters, order and pages, all of them in the address. */

import { get, runPath } from "./api.js";
import { debounce, empty, errorBox, h, loading } from "./dom.js";
import { count, number, percent } from "./format.js";
import { address, note } from "./place.js";

const PAGE = 25;
const FILTERS = ["first_step", "last_step", "switched", "first_switch_min", "first_switch_max", "finish_reason", "text"];
const COLUMNS = [["step", "Step"], [null, "Sequence"], ["num_tokens", "Tokens"], ["num_teacher_tokens", "Teacher"], ["first_switch", "First switch"], ["mean_divergence", "Divergence"], [null, "End"]];

/** @param {Record<string, string>} place @param {any} detail @param {AbortSignal} signal */
export async function sequencesTab(place, detail, signal) {
  const now = { order: "step", descending: "false", ...place };
  const pages = [null]; // cursors of the pages so far
  const list = h("div", { class: "list" });
  const news = h("button", { type: "button", class: "news", hidden: true, on: { click: () => { news.hidden = true; restart(); } } }, "New sequences have come. Show them");
  window.addEventListener("runchange", () => { news.hidden = false; }, { signal });

  async function show() {
    const filters = Object.fromEntries(FILTERS.map((name) => [name, now[name]]));
    list.setAttribute("aria-busy", "true");
    try {
      const found = await get(runPath(place.run, "/sequences"), { ...filters, order: now.order, descending: now.descending, limit: PAGE, cursor: pages.at(-1) }, signal);
      list.replaceChildren(...result(found));
    } catch (error) {
      if (!signal.aborted) list.replaceChildren(errorBox(error, show));
    }
    list.removeAttribute("aria-busy");
  }
  function restart() {
    pages.splice(0, pages.length, null);
    note(Object.fromEntries([...FILTERS, "order", "descending"].map((name) => [name, now[name] || null])));
    return show();
  }
  function result({ sequences, num_matching, next_cursor }) {
    if (!sequences.length) return [empty("No sequence matches", "Take a filter away, or wait for the next step.")];
    const first = (pages.length - 1) * PAGE + 1;
    const turn = (move) => () => { move(); show(); list.scrollIntoView({ block: "nearest" }); };
    return [table(sequences, place.run, now, (order) => {
      now.descending = String(now.order === order ? now.descending !== "true" : order !== "step");
      now.order = order;
      restart();
    }), h("div", { class: "pager" },
      h("button", { type: "button", disabled: pages.length === 1, on: { click: turn(() => pages.pop()) } }, "← Previous"),
      h("span", { role: "status" }, `${count(first)} to ${count(first + sequences.length - 1)} of ${count(num_matching)}`),
      h("button", { type: "button", disabled: next_cursor === null, on: { click: turn(() => pages.push(next_cursor)) } }, "Next →"))];
  }
  list.append(loading("sequences"));
  show();
  return h("div", {}, filterForm(now, detail, debounce(restart, 250)), news, list);
}

function filterForm(now, detail, changed) {
  const set = (name) => (event) => { now[name] = event.target.value; changed(); };
  const field = (name, label, attributes) => h("label", {}, label, h("input", { value: now[name] ?? "", name, on: { input: set(name) }, ...attributes }));
  const choice = (name, label, options) => h("label", {}, label, h("select", { name, on: { change: set(name) } },
    options.map(([value, text]) => h("option", { value, selected: (now[name] ?? "") === value }, text))));
  const place = { type: "number", min: 0, inputmode: "numeric", placeholder: "any" };
  return h("form", { class: "filters", role: "search", on: { submit: (event) => event.preventDefault() } },
    field("text", "Text", { type: "search", placeholder: "in prompt or completion", maxlength: 200 }),
    choice("switched", "Switched", [["", "any"], ["true", "yes"], ["false", "no"]]),
    choice("finish_reason", "Ended by", [["", "any"], ...detail.finish_reasons.map((r) => [r, r])]),
    field("first_step", "Step from", place), field("last_step", "Step to", place),
    field("first_switch_min", "Switch from", place), field("first_switch_max", "Switch to", place));
}

function table(sequences, run, now, sort) {
  const heads = COLUMNS.map(([order, title]) => {
    if (!order) return h("th", { scope: "col" }, title);
    const active = now.order === order;
    return h("th", { scope: "col", "aria-sort": active ? (now.descending === "true" ? "descending" : "ascending") : null },
      h("button", { type: "button", class: "sort", on: { click: () => sort(order) } }, title, active ? (now.descending === "true" ? " ↓" : " ↑") : ""));
  });
  return h("table", { class: "sequences" }, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, sequences.map((s) => row(s, run))));
}

function row(s, run) {
  const cell = (label, value) => h("td", { data: { label } }, value);
  const share = s.num_teacher_tokens / s.num_tokens;
  return h("tr", {}, cell("step", count(s.step)),
    h("td", { class: "texts" }, h("a", { href: address({ run, sequence: s.sequence_id }), "data-link": true },
      h("span", { class: "prompt" }, s.prompt_text || "(no prompt)"), h("span", { class: "completion" }, s.completion_text || "(nothing written)"))),
    cell("tokens", count(s.num_tokens)), cell("teacher", percent(share, 0)),
    h("td", { data: { label: "first switch" } }, s.first_switch === null ? h("span", { class: "muted" }, "none") : h("span", { class: "badge" }, count(s.first_switch))),
    cell("divergence", number(s.mean_divergence)), cell("end", s.finish_reason));
}
