/** What is due each second: one timer wakes a thread for all of it, however many volumes are there. */

const INTERVAL_MS = 1_000;

/** In the order in which they began. */
const steps = new Set<() => void>();
let timer: NodeJS.Timeout | undefined;

/** Calls `step` each second until what it returns is called. */
export function eachSecond(step: () => void): () => void {
  steps.add(step);
  timer ??= setInterval(() => {
    for (const due of steps) due();
  }, INTERVAL_MS).unref();
  return () => {
    steps.delete(step);
    if (steps.size > 0) return;
    clearInterval(timer);
    timer = undefined;
  };
}
