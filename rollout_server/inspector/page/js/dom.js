/** Makes elements. Text only ever becomes a text node, so that nothing a model wrote can become markup. */

/**
 * @param {string} tag
 * @param {Record<string, any>} [properties] `class`, `on` (event -> listener), `data`; the rest are attributes, left
 *   out where null or false
 * @param {...(Node|string|number|null|undefined|Array<any>)} children
 * @returns {any}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
    else if (name === "data") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

/** @param {string} tag @param {Record<string, string|number>} attributes @param {...Node} children */
export function svg(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.append(...children);
  return element;
}

/** Calls with the last arguments once nothing was asked for `delay_ms`. @param {(...a: any[]) => void} run */
export function debounce(run, delay_ms) {
  let timer = 0;
  return (...values) => {
    clearTimeout(timer);
    timer = window.setTimeout(() => run(...values), delay_ms);
  };
}

/** A box that says what went wrong. @param {Error & {errors?: string[]}} error @param {() => void} [again] */
export function errorBox(error, again) {
  return h("div", { class: "notice error", role: "alert" },
    h("strong", {}, "That did not work. "), error.message,
    error.errors ? h("ul", {}, error.errors.map((line) => h("li", {}, line))) : null,
    again ? h("button", { type: "button", on: { click: again } }, "Try again") : null);
}

export const loading = (what) => h("p", { class: "loading", role: "status" }, `Loading ${what} …`);
export const empty = (title, hint) => h("div", { class: "empty" }, h("h2", {}, title), h("p", {}, hint));
