/** The switch rule on recorded divergences: what the chart draws while the service's answer is on its way. */

/**
 * Moving average of the last `window` divergences before each position, and the threshold max(K * average, floor).
 * null where the average is not filled or the student proposed nothing.
 * @param {(number|null)[]} divergences nats
 * @param {{multiplier: number, window: number, floor: number}} policy
 * @returns {{average: (number|null)[], threshold: (number|null)[]}}
 */
export function thresholds(divergences, { multiplier, window, floor }) {
  const average = divergences.map((d, i) => {
    const last = i < window || d === null ? [null] : divergences.slice(i - window, i);
    return last.includes(null) ? null : last.reduce((sum, v) => sum + v, 0) / window;
  });
  return { average, threshold: average.map((m) => (m === null ? null : Math.max(multiplier * m, floor))) };
}
