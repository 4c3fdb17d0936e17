/** Loads Plotly when the first chart is drawn. The service serves it from the installed Python package `plotly`. */

let loading = null;

/** @returns {Promise<any>} the library; a failed load is tried again by the next chart */
export function plotly() {
  loading ??= load().catch((error) => { loading = null; throw error; });
  return loading;
}

/**
 * The bundle adds a style element for its maps while it loads. The Content-Security-Policy refuses it with an error in
 * the console, and no map is drawn here, so it gets an inert element instead. Plotly's own rules are in css/charts.css.
 */
async function load() {
  const create = document.createElement;
  document.createElement = (tag, options) => create.call(document, tag === "style" ? "template" : tag, options);
  try {
    await import("../plotly.min.js");
  } finally {
    delete document.createElement; // the prototype's is visible again
  }
  return window.Plotly;
}
