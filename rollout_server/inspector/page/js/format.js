/** Numbers and times as people read them. null is a dash. */
const DASH = "–";

export const count = (value) => (value === null || value === undefined ? DASH : value.toLocaleString("en"));
export const percent = (value, digits = 1) => (value === null || value === undefined ? DASH : `${(100 * value).toFixed(digits)}%`);

/** Three significant digits. @param {number|null|undefined} value */
export function number(value) {
  if (value === null || value === undefined) return DASH;
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.0005) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}

export const nats = (value) => (value === null || value === undefined ? DASH : `${number(value)} nats`);

/** @param {string} iso */
export function ago(iso) {
  const seconds = Math.max(0, (Date.now() - Date.parse(iso)) / 1000);
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    const amount = Math.floor(seconds / size);
    if (amount >= 1) return `${amount} ${unit}${amount > 1 ? "s" : ""} ago`;
  }
  return "just now";
}
