/** Where the page is: all of it is in the address, so that a view can be shared and the back button works. */

export const query = () => Object.fromEntries(new URLSearchParams(location.search));

/** @param {Record<string, any>} values */
export function address(values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const text = new URLSearchParams(given).toString();
  return text ? `?${text}` : "./";
}

/** Go to a view. @param {Record<string, any>} values */
export function go(values) {
  history.pushState(null, "", address(values));
  window.dispatchEvent(new Event("place"));
}

/** Note a setting in the address without a new entry in the history. @param {Record<string, any>} values */
export const note = (values) => history.replaceState(null, "", address({ ...query(), ...values }));

/** Links marked data-link stay on the page. @param {() => void} show */
export function listen(show) {
  window.addEventListener("popstate", show);
  window.addEventListener("place", show);
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element ? event.target.closest("a[data-link]") : null;
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button !== 0) return;
    event.preventDefault();
    history.pushState(null, "", link.getAttribute("href"));
    show();
  });
}
