// How long items took, and how they ended: bars over a logarithmic axis of time.

import { between, count, duration, h } from "./app.js";

const [HEIGHT, BARS] = [130, 24];
const OUTCOMES = ["completed", "failed", "cancelled"];

/** `width` in pixels, so that its words are as large as others. */
export function chart(items, width) {
  const timed = items
    .filter((item) => item.started_at && item.completed_at)
    .map((item) => ({ status: item.status, took: Math.max(0.0001, between(item.started_at, item.completed_at)) }));
  if (!timed.length) return null;
  const sorted = timed.map(({ took }) => took).sort((a, b) => a - b);
  const at = (part) => sorted[Math.min(sorted.length - 1, Math.floor(part * sorted.length))];
  const low = Math.log(sorted[0]),
    span = Math.max(0.5, Math.log(sorted[sorted.length - 1]) - low);
  const bars = Array.from({ length: BARS }, () => ({ completed: 0, failed: 0, cancelled: 0 }));
  for (const { status, took } of timed)
    bars[Math.min(BARS - 1, Math.floor(((Math.log(took) - low) / span) * BARS))][status]++;
  const most = Math.max(...bars.map((bar) => OUTCOMES.reduce((sum, name) => sum + bar[name], 0)));
  const step = width / BARS;
  const outcomes = OUTCOMES.map((name) => [name, timed.filter(({ status }) => status === name).length]).filter(
    ([, number]) => number,
  );
  const words = `${count(timed.length, "row")} looked at: half took up to ${duration(at(0.5))}, 95 % up to ${duration(at(0.95))}, the longest ${duration(at(1))}. ${outcomes.map(([name, number]) => `${count(number)} ${name}`).join(", ")}.`;
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
  return [
    h("h2", {}, "Durations and outcomes"),
    h(
      "svg",
      { class: "chart", viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": words },
      h("line", { x1: 0, x2: width, y1: HEIGHT - 20, y2: HEIGHT - 20 }),
      rects,
      marks,
    ),
    h("p", { class: "quiet" }, words),
  ];
}
