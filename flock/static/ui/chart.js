// The outcomes of a batch as a bar, and the durations of its rows as a histogram with a logarithmic axis.

import { fill, h, newId, quiet } from "./dom.js";
import { SIGNS, between, count, duration, isFinal } from "./words.js";

const [HEIGHT, BARS] = [130, 24];
const MIN_MEASURED = 10;
const OUTCOMES = ["completed", "failed", "cancelled"];

/** Count the rows of a batch by outcome: `[[name, number]]`, without zeros. */
function outcomes(batch) {
  const { total_items: total, completed_items: ended, failed_items: failed, cancelled_items: cancelled } = batch;
  return [
    ["completed", ended - failed - cancelled],
    ["failed", failed],
    ["cancelled", cancelled],
    ["waiting", batch.waiting_items],
    [isFinal(batch.status) ? "not run" : "remaining", total - ended - batch.waiting_items],
  ].filter(([, number]) => number > 0);
}

export const outcomeBar = () => h("div.bar", { role: "progressbar", "aria-label": "Progress", "aria-valuemin": 0 });

export function drawOutcomes(bar, batch) {
  const counts = outcomes(batch);
  const words = counts.map(([name, number]) => `${count(number)} ${name}`).join(", ");
  bar.ariaValueMax = Math.max(1, batch.total_items);
  bar.ariaValueNow = batch.completed_items;
  bar.ariaValueText = `${count(batch.total_items, "row")}${words && ": "}${words}`;
  return fill(
    bar,
    counts.map(([name, number]) => {
      const segment = h("span", { class: name });
      segment.style.flexGrow = number;
      return segment;
    }),
  );
}

export const outcomeWords = (batch) =>
  outcomes(batch).map(([name, number]) =>
    h(
      "span",
      { class: `outcome ${name}` },
      h("span", { "aria-hidden": "true" }, SIGNS[name] ?? SIGNS.starting),
      ` ${count(number)} ${name}`,
    ),
  );

/** Draw the histogram. `width` is in pixels, so that its text has the same size as other text. */
export function chart(items, width) {
  const timed = items
    .filter((item) => item.started_at && item.completed_at)
    .map((item) => ({ status: item.status, took: Math.max(0.0001, between(item.started_at, item.completed_at)) }));
  if (timed.length < MIN_MEASURED) return null;
  const sorted = timed.map(({ took }) => took).sort((a, b) => a - b);
  const quantile = (part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
  const low = Math.log(sorted[0]),
    span = Math.max(0.5, Math.log(sorted.at(-1)) - low);
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
      "svg.chart",
      { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-labelledby": heading },
      h("line", { x1: 0, x2: width, y1: HEIGHT - 20, y2: HEIGHT - 20 }),
      rects,
      marks,
    ),
    quiet(
      `Half of the ${count(timed.length)} rows measured took up to ${duration(quantile(0.5))}, 95 % up to ${duration(quantile(0.95))}. The longest took ${duration(quantile(1))}.`,
    ),
  ];
}
