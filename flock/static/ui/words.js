// Statuses, times, numbers, batches and hand-offs as text.

import { link } from "./address.js";
import { h, quiet } from "./dom.js";

export const SIGNS = { starting: "○", running: "◐", waiting: "?", completed: "✓", failed: "✕", cancelled: "⊘" };

export const badge = (status) =>
  h("span", { class: `badge ${status}` }, h("span", { "aria-hidden": "true" }, SIGNS[status]), ` ${status}`);

export const STATUSES = Object.keys(SIGNS);
export const isFinal = (status) => ["completed", "failed", "cancelled"].includes(status);
export const isBusy = (status) => status === "starting" || status === "running";

const WHEN = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
export const when = (time) => (time ? h("time", { datetime: time, title: time }, WHEN.format(new Date(time))) : "–");

/** Convert a time of the API to the format of a datetime-local input. */
export function localTime(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime())
    ? ""
    : new Date(date - date.getTimezoneOffset() * 60_000)
        .toISOString()
        .slice(0, 23)
        .replace(/\.000Z?$/, "");
}

export function duration(seconds) {
  if (seconds == null || Number.isNaN(seconds)) return "–";
  if (seconds > 0 && seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

/** Return the seconds from one time of the API to another, or to now. */
export const between = (from, to) => (from ? ((to ? new Date(to) : new Date()) - new Date(from)) / 1000 : null);

const NUMBER = new Intl.NumberFormat();
export const count = (number, one, many = `${one}s`) =>
  NUMBER.format(number) + (one ? ` ${number === 1 ? one : many}` : "");

export const aboutBatches = () => quiet("A batch runs one agent on every row of a table, each as a run.");

export function handOff(agent) {
  if (agent.next_agent)
    return quiet("Hands off to ", h("a", { href: link(`agent/${agent.next_agent}`) }, agent.next_agent), ".");
  return agent.next_agent === null ? quiet("Its result decides which agent runs next.") : null;
}

export function sizeOf(bytes) {
  const [unit, factor] = [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
    ["bytes", 1],
  ].find(([, factor]) => bytes >= factor) ?? ["bytes", 1];
  return `${Number((bytes / factor).toPrecision(3))} ${unit}`;
}
