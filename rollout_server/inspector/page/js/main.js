/** Start here: reads the address, shows the view it names, and cleans up the one before. */

import { Problem, hasToken, setToken } from "./api.js";
import { compareView } from "./compare.js";
import { empty, errorBox, h, loading } from "./dom.js";
import { runView } from "./run.js";
import { runsView } from "./runs.js";
import { sequenceView } from "./sequence.js";
import { listen, query } from "./place.js";
import { startTheme } from "./theme.js";

const view = /** @type {HTMLElement} */ (document.getElementById("view"));
const crumbs = /** @type {HTMLElement} */ (document.getElementById("crumbs"));
let leave = new AbortController();

/** @returns {[string, (signal: AbortSignal) => Promise<Node>, Record<string, any>[]]} title, view, crumbs */
function wanted(place) {
  if (place.run && place.sequence) {
    return [place.sequence, (signal) => sequenceView(place, signal), [{ run: place.run }, { run: place.run, tab: "sequences" }]];
  }
  if (place.run && place.with) return ["compare", (signal) => compareView(place, signal), [{ run: place.run }]];
  if (place.run) return [place.run, (signal) => runView(place, signal), [{ run: place.run }]];
  return ["runs", runsView, []];
}

async function show() {
  leave.abort();
  leave = new AbortController();
  const { signal } = leave;
  const [title, make, trail] = wanted(query());
  document.title = `${title} · AdaSwitch inspector`;
  document.getElementById("live")?.replaceChildren();
  crumbs.replaceChildren(...trail.map((place) => h("a", { href: `?${new URLSearchParams(place)}`, "data-link": true }, place.tab ?? place.run)));
  view.replaceChildren(loading(title));
  try {
    const content = await make(signal);
    if (!signal.aborted) view.replaceChildren(content);
  } catch (error) {
    if (!signal.aborted) view.replaceChildren(failure(error));
  }
}

function failure(error) {
  if (!(error instanceof Problem)) return errorBox(error, show);
  if (error.status === 401) return tokenForm(hasToken());
  if (error.status === 404) return empty("Not here", error.message);
  return errorBox(error, show);
}

function tokenForm(wasWrong) {
  const field = h("input", { type: "password", name: "token", required: true, autocomplete: "off", "aria-label": "Token" });
  const use = (event) => { event.preventDefault(); setToken(field.value.trim()); show(); };
  return h("form", { class: "empty", on: { submit: use } }, h("h2", {}, "A token is needed"),
    h("p", {}, "Whoever started this service set one. It is kept in this tab only."),
    wasWrong ? h("p", { role: "alert" }, "That was not it.") : null, field, h("button", {}, "Go on"));
}

startTheme(/** @type {HTMLElement} */ (document.getElementById("theme")));
listen(show);
show();
