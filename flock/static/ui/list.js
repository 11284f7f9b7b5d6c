// A list of runs or batches.

import { link, updateAddress } from "./address.js";
import { get } from "./api.js";
import { actions, button, fill, h, select, table, title, wide } from "./dom.js";
import { isFile, isObject, textOf } from "./json.js";
import { session, stored } from "./storage.js";
import { every } from "./wait.js";

const PAGE_SIZE = 50;
const REFRESH_MS = 2000;
/** Inputs and results can be long, so they are loaded in small pages, and once for each state of a run. */
const PREVIEWS_PER_PAGE = 10;
const PREVIEW_CHARS = 200;

/** The start of inputs, arguments or a result as text. A single member has no name there, unless `isNamed`. */
export function previewOf(members, isNamed = false) {
  const entries = Object.entries(members ?? {});
  const [[, only] = []] = entries;
  const isBare = entries.length === 1 && !isNamed;
  if (isBare && isObject(only) && !isFile(only)) return previewOf(only);
  const words = entries.map(([name, value]) => (isBare ? "" : `${name}: `) + textOf(value)).join(", ");
  return words.length > PREVIEW_CHARS ? `${words.slice(0, PREVIEW_CHARS)} …` : words;
}

/** A filter by agent. An agent in the address is listed even if it no longer exists. */
export function agentChoice(agents, params) {
  const names = new Set(agents.map(({ name }) => name));
  if (params.get("agent_name")) names.add(params.get("agent_name"));
  return choice("agent_name", "Agent", [...names]);
}

export const choice = (name, label, options) => ({
  name,
  label,
  make: (value) => select([["", "All"], ...options], value),
});

/** Show a list with filters and pages that refreshes itself. Its filters and page are stored in the address. */
export async function list(
  main,
  {
    kind,
    view = kind,
    heading = kind[0].toUpperCase() + kind.slice(1),
    signal,
    params,
    filters,
    columns,
    noneYet,
    row,
    id,
    about,
    start,
    hasPreviews,
    isLive = () => false,
  },
) {
  const shown = Object.fromEntries(params);
  const body = h("tbody"),
    known = new Map();
  const none = h("p.empty", { hidden: true });
  const rows = table(columns, body);
  rows.className = "rows-list";
  const box = wide(`Table of ${view}`, rows);
  // The cursor only leads forwards, so the previous pages are stored.
  const previousPages = () => stored(`pages ${view}`) ?? {};
  let next = null,
    request = null;

  async function refresh() {
    request?.abort();
    request = new AbortController();
    const either = AbortSignal.any([signal, request.signal]);
    try {
      const page = await get(`${kind}?${query({ limit: PAGE_SIZE })}`, either);
      next = page.next;
      draw(page[kind]);
      drawPager();
      if (hasPreviews) await preview(page[kind], either);
    } catch (error) {
      if (!either.aborted) throw error;
    }
  }

  const query = (more) =>
    new URLSearchParams(Object.entries({ ...shown, ...more }).filter(([, value]) => value)).toString();

  function drawPager() {
    older.disabled = !next;
    newer.disabled = newest.disabled = !shown.after;
    pager.hidden = !next && !shown.after;
    clear.hidden = !filters.some(({ name }) => shown[name]);
  }

  const previews = new Map();
  async function preview(items, signal) {
    const stateOf = (item) => `${item.status} ${item.attempt}`;
    const isKnown = (item) => previews.get(id(item))?.state === stateOf(item);
    for (const key of previews.keys()) if (!items.some((item) => id(item) === key)) previews.delete(key);
    for (const [index, item] of items.entries()) {
      if (isKnown(item)) continue;
      const after = index ? id(items[index - 1]) : shown.after;
      const page = await get(`${kind}?${query({ limit: PREVIEWS_PER_PAGE, after, include: "inputs,result" })}`, signal);
      for (const each of page[kind])
        previews.set(id(each), {
          state: stateOf(each),
          inputs: previewOf(each.inputs),
          result: previewOf(each.result),
        });
      draw(items);
    }
  }

  function draw(items) {
    const nodes = items.map((item) => {
      const { inputs, result } = previews.get(id(item)) ?? {};
      const text = JSON.stringify([item, inputs, result]);
      const before = known.get(id(item));
      // Reuse the element of an unchanged row, so that it keeps the focus.
      if (before?.text === text && !isLive(item)) return before.node;
      const cells = row({ ...item, inputs, result }).map((cell) => h("td", cell));
      if (before) {
        const hadFocus = before.node.contains(document.activeElement);
        fill(before.node, cells);
        if (hadFocus) before.node.querySelector("a")?.focus();
        before.text = text;
        return before.node;
      }
      const node = h("tr", cells);
      known.set(id(item), { text, node });
      return node;
    });
    if (nodes.length !== body.children.length || nodes.some((node, index) => body.children[index] !== node)) {
      const focused = document.activeElement;
      body.replaceChildren(...nodes);
      if (body.contains(focused)) focused.focus();
    }
    for (const key of known.keys()) if (!items.some((item) => id(item) === key)) known.delete(key);
    fill(none, filters.some(({ name }) => shown[name]) ? "Nothing matches these filters." : noneYet).hidden = items.length > 0;
    box.hidden = items.length === 0;
  }

  const goToPage = async (after) => {
    shown.after = after;
    updateAddress(view, shown);
    await refresh();
  };
  const newest = button("Newest", () => goToPage(""));
  const newer = button("Newer", () => goToPage(previousPages()[shown.after] ?? ""));
  const older = button("Older", () => {
    const after = new URLSearchParams(next.split("?")[1]).get("after");
    session.set(`pages ${view}`, JSON.stringify({ ...previousPages(), [after]: shown.after ?? "" }));
    return goToPage(after);
  });
  const controls = filters.map(({ name, label, make, read = (text) => text }) => {
    const control = make(shown[name]);
    control.addEventListener("change", () => {
      shown[name] = read(control.value);
      goToPage("");
    });
    return h("label", label, control);
  });
  const clear = button(
    "Clear filters",
    () => {
      location.hash = link(view);
    },
    { hidden: true },
  );
  const pager = actions({ role: "group", "aria-label": "Pagination", hidden: true }, newest, newer, older);
  main.append(
    title(heading, start),
    about ?? "",
    h("div.filters", { role: "search", "aria-label": `Filter ${view}` }, controls, clear),
    box,
    none,
    pager,
  );
  await refresh();
  every(REFRESH_MS, refresh, signal).catch((error) => {
    if (!signal.aborted) fill(none, error.message).hidden = false;
  });
}
