// How the rows of a batch ended, as a bar, and how long they took, as bars over a logarithmic axis of time.

import { fill, h, newId } from "./dom.js";
import { SIGNS, between, count, duration, isFinal } from "./words.js";

const [HEIGHT, BARS] = [130, 24];
/** With fewer rows a distribution says less than the rows themselves. */
const FEWEST = 10;
const OUTCOMES = ["completed", "failed", "cancelled"];

/** How many rows of a batch ended in each way, and how many did not end: `[[name, number]]` without zeros. */
function outcomes(batch) {
  const { total_items: total, completed_items: ended, failed_items: failed, cancelled_items: cancelled } = batch;
  return [
    ["completed", ended - failed - cancelled],
    ["failed", failed],
    ["cancelled", cancelled],
    [isFinal(batch.status) ? "not run" : "remaining", total - ended],
  ].filter(([, number]) => number > 0);
}

/** A bar with a part for each outcome. */
export const outcomeBar = () =>
  h("div", { class: "bar", role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0 });

export function drawOutcomes(bar, batch) {
  const some = outcomes(batch);
  const words = some.map(([name, number]) => `${count(number)} ${name}`).join(", ");
  bar.setAttribute("aria-valuemax", Math.max(1, batch.total_items));
  bar.setAttribute("aria-valuenow", batch.completed_items);
  bar.setAttribute("aria-valuetext", `${count(batch.total_items, "row")}${words && `: ${words}`}`);
  return fill(
    bar,
    some.map(([name, number]) => {
      const part = h("span", { class: name });
      part.style.flexGrow = number;
      return part;
    }),
  );
}

/** The same in words, each with the sign of its outcome. */
export const outcomeWords = (batch) =>
  outcomes(batch).map(([name, number]) =>
    h(
      "span",
      { class: `outcome ${name}` },
      h("span", { "aria-hidden": "true" }, SIGNS[name] ?? SIGNS.starting),
      ` ${count(number)} ${name}`,
    ),
  );

/** `width` in pixels, so that its words are as large as others. */
export function chart(items, width) {
  const timed = items
    .filter((item) => item.started_at && item.completed_at)
    .map((item) => ({ status: item.status, took: Math.max(0.0001, between(item.started_at, item.completed_at)) }));
  if (timed.length < FEWEST) return null;
  const sorted = timed.map(({ took }) => took).sort((a, b) => a - b);
  const at = (part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
  const low = Math.log(sorted[0]),
    span = Math.max(0.5, Math.log(sorted[sorted.length - 1]) - low);
  const bars = Array.from({ length: BARS }, () => ({ completed: 0, failed: 0, cancelled: 0 }));
  for (const { status, took } of timed)
    bars[Math.min(BARS - 1, Math.floor(((Math.log(took) - low) / span) * BARS))][status]++;
  const most = Math.max(...bars.map((bar) => OUTCOMES.reduce((sum, name) => sum + bar[name], 0)));
  const step = width / BARS;
  const rects = bars.flatMap((bar, index) => {
    let top = HEIGHT - 20;
    return OUTCOMES.filter((name) => bar[name]).map((name) => {
      const height = (bar[name] / most) * (HEIGHT - 30);
      top -= height;
      return h("rect", { class: name, x: index * step + 1, y: top, width: step - 2, height });
    });
  });
  const marks = [0, 0.25, 0.5, 0.75, 1].map((part) =>
    h(
      "text",
      { x: part * width, y: HEIGHT - 5, "text-anchor": part === 0 ? "start" : part === 1 ? "end" : "middle" },
      duration(Math.exp(low + part * span)),
    ),
  );
  const heading = newId();
  return [
    h("h2", { id: heading }, "Durations"),
    h(
      "svg",
      { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-labelledby": heading },
      h("line", { x1: 0, x2: width, y1: HEIGHT - 20, y2: HEIGHT - 20 }),
      rects,
      marks,
    ),
    h(
      "p",
      { class: "quiet" },
      `Half of the ${count(timed.length)} rows measured took up to ${duration(at(0.5))}, 95 % up to ${duration(at(0.95))}; the longest took ${duration(at(1))}.`,
    ),
  ];
}
