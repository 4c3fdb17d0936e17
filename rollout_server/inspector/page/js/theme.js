/** Light or dark: as the system says, unless the button was used. */
const KEY = "adaswitch-theme";
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function apply(button) {
  const chosen = localStorage.getItem(KEY);
  const theme = chosen ?? (dark.matches ? "dark" : "light");
  document.documentElement.dataset.theme = theme;
  button.textContent = theme === "dark" ? "☀ Light" : "☾ Dark";
  button.setAttribute("aria-label", `Switch to ${theme === "dark" ? "light" : "dark"} colours`);
  window.dispatchEvent(new Event("themechange"));
}

/** @param {HTMLElement} button */
export function startTheme(button) {
  apply(button);
  dark.addEventListener("change", () => apply(button));
  button.addEventListener("click", () => {
    localStorage.setItem(KEY, document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    apply(button);
  });
}
