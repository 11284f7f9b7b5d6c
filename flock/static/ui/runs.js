// All runs that are no items of batches, a page at a time.

import {
  STATUSES,
  badge,
  between,
  button,
  duration,
  every,
  fill,
  get,
  h,
  keep,
  link,
  localTime,
  session,
  title,
  when,
} from "./app.js";

const PAGE = 50;
const REFRESH_MS = 2000;

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "runs",
    signal,
    params,
    filters: [
      choice("status", "Status", STATUSES),
      agentChoice(agents, params),
      time("created_after", "From"),
      time("created_before", "To"),
    ],
    columns: ["Run", "Agent", "Status", "Accepted", "Took", "Error"],
    empty: ["No run fits. ", h("a", { href: link("agents") }, "Start one with an agent.")],
    row: (run) => [
      h("a", { href: link(`run/${run.run_id}`), class: "mono" }, run.run_id.slice(-12)),
      run.agent_name,
      badge(run.status),
      when(run.created_at),
      duration(run.started_at && between(run.started_at, run.completed_at)),
      h("span", {}, run.error ?? ""),
    ],
    id: (run) => run.run_id,
  });
}

/** Also an agent that is not there any more may be looked for. */
export function agentChoice(agents, params) {
  const names = new Set(agents.map(({ name }) => name));
  if (params.get("agent_name")) names.add(params.get("agent_name"));
  return choice("agent_name", "Agent", [...names]);
}

export const choice = (name, label, options) => ({
  name,
  label,
  make: (value) =>
    h(
      "select",
      {},
      h("option", { value: "" }, "All"),
      options.map((option) => h("option", { value: option, selected: option === value }, option)),
    ),
});
const time = (name, label) => ({
  name,
  label,
  make: (value) => h("input", { type: "datetime-local", step: 1, value: value ? localTime(value) : "" }),
  read: (text) => (text ? new Date(text).toISOString() : ""),
});

/** A list that is filtered, paged and refreshed; what it shows stands in the address. */
export async function list(main, { kind, signal, params, filters, columns, empty, row, id, beside }) {
  const shown = Object.fromEntries(params);
  const body = h("tbody"),
    known = new Map();
  const none = h("p", { class: "empty", hidden: true }, empty);
  const table = h(
    "div",
    { class: "wide", tabindex: "0", role: "group", "aria-label": `Table of ${kind}` },
    h(
      "table",
      { class: "rows-list" },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          columns.map((text) => h("th", { scope: "col" }, text)),
        ),
      ),
      body,
    ),
  );
  // The cursor leads forwards only, so the way back is kept.
  const back = () => JSON.parse(session.get(`pages ${kind}`) ?? "{}");
  let next = null,
    looking = null;

  async function look() {
    looking?.abort();
    looking = new AbortController();
    const stop = looking,
      onAbort = () => stop.abort();
    signal.addEventListener("abort", onAbort, { once: true });
    try {
      const query = new URLSearchParams({
        limit: PAGE,
        ...Object.fromEntries(Object.entries(shown).filter(([, value]) => value)),
      });
      const page = await get(`${kind}?${query}`, stop.signal);
      draw(page[kind]);
      next = page.next;
    } catch (error) {
      if (!stop.signal.aborted) throw error;
    } finally {
      signal.removeEventListener("abort", onAbort);
    }
    older.disabled = !next;
    clear.hidden = !filters.some(({ name }) => shown[name]);
    newer.disabled = newest.disabled = !shown.after;
  }

  function draw(items) {
    const nodes = items.map((item) => {
      const text = JSON.stringify(item),
        isOpen = !item.completed_at;
      const before = known.get(id(item));
      // A row that has not changed stays the same element, with its focus.
      if (before?.text === text && !isOpen) return before.node;
      const cells = row(item).map((cell) => h("td", {}, cell));
      if (before) {
        const had = before.node.contains(document.activeElement);
        fill(before.node, cells);
        if (had) before.node.querySelector("a")?.focus();
        before.text = text;
        return before.node;
      }
      const node = h("tr", {}, cells);
      known.set(id(item), { text, node });
      return node;
    });
    if (nodes.length !== body.children.length || nodes.some((node, index) => body.children[index] !== node)) {
      const had = document.activeElement;
      body.replaceChildren(...nodes);
      if (body.contains(had)) had.focus();
    }
    for (const key of known.keys()) if (!items.some((item) => id(item) === key)) known.delete(key);
    none.hidden = items.length > 0;
    table.hidden = items.length === 0;
  }

  const turn = async (after) => {
    shown.after = after;
    keep(kind, shown);
    await look();
  };
  const newest = button("Newest", () => turn(""));
  const newer = button("Newer", () => turn(back()[shown.after] ?? ""));
  const older = button("Older", () => {
    const after = new URLSearchParams(next.split("?")[1]).get("after");
    session.set(`pages ${kind}`, JSON.stringify({ ...back(), [after]: shown.after ?? "" }));
    return turn(after);
  });
  const controls = filters.map(({ name, label, make, read = (text) => text }) => {
    const control = make(shown[name]);
    control.addEventListener("change", () => {
      shown[name] = read(control.value);
      turn("");
    });
    return h("label", {}, label, control);
  });
  const clear = button(
    "Clear filters",
    () => {
      location.hash = link(kind);
    },
    { hidden: true },
  );
  const heading = title(kind[0].toUpperCase() + kind.slice(1), beside);
  main.append(
    heading,
    h("div", { class: "filters", role: "search", "aria-label": `Filter ${kind}` }, controls, clear),
    table,
    none,
    h("p", { class: "actions", role: "group", "aria-label": "Pages" }, newest, newer, older),
  );
  await look();
  every(REFRESH_MS, look, signal).catch((error) => {
    if (!signal.aborted) fill(none, error.message).hidden = false;
  });
}
