// A table of a million rows: only those that can be seen are elements, and only their pages are asked for.

import { fill, h } from "./dom.js";

const ROW_PX = 36;
const PAGE = 100;
const PAGES_KEPT = 40;
/** Browsers draw nothing beyond some 16 million pixels. From here on the scroll bar stands for more than it is long. */
const MAX_PX = 8_000_000;

/**
 * @param columns  [{name, least, most}]: the width in rem, and as a grid has it
 * @param start    the first row that is to be seen; goTo() scrolls there once the table is in the page
 * @param load     (page, signal) => rows of the page, each at its place
 * @param cells    (row, index) => the cells of a row; the row is undefined while it is not there
 * @param moved    told the first row that can be seen
 * @param failed   told why a page does not come
 */
export function bigTable({ label, columns, total, start, load, cells, moved, failed, signal }) {
  const rows = h("div", { class: "rows" });
  const body = h("div", { class: "body", role: "rowgroup" }, rows);
  const head = h(
    "div",
    { role: "rowgroup", class: "head" },
    h(
      "div",
      { role: "row" },
      columns.map(({ name }) => h("div", { role: "columnheader" }, name)),
    ),
  );
  const node = h(
    "div",
    {
      class: "virtual",
      role: "table",
      tabindex: "0",
      "aria-label": label,
      "aria-colcount": columns.length,
      "aria-rowcount": total + 1,
    },
    head,
    body,
  );
  node.style.setProperty("--tracks", columns.map(({ least, most }) => `minmax(${least}rem, ${most})`).join(" "));
  node.style.setProperty("--least", `${columns.reduce((sum, { least }) => sum + least, 0)}rem`);
  const height = () => Math.min(total * ROW_PX, MAX_PX);
  body.style.height = `${height()}px`; // an observer that changes it would observe itself
  const pages = new Map(),
    asked = new Map();
  let first = start,
    drawn = "",
    isOurs = false;

  const seen = () => Math.max(1, Math.floor((node.clientHeight - ROW_PX) / ROW_PX) || 12);
  const last = () => Math.max(0, total - seen());
  const isScaled = () => total * ROW_PX > MAX_PX;
  const room = () => Math.max(1, height() + ROW_PX - node.clientHeight);

  /** Which row the scroll bar means; a scroll that we made ourselves means the row that we know. */
  function scrolled() {
    if (!isOurs)
      first = isScaled()
        ? Math.round((node.scrollTop / room()) * last())
        : Math.min(last(), Math.floor(node.scrollTop / ROW_PX));
    isOurs = false;
    draw();
  }

  function goTo(row, isTold = true) {
    first = Math.max(0, Math.min(last(), row));
    const top = Math.round(isScaled() ? (first / Math.max(1, last())) * room() : first * ROW_PX);
    const before = node.scrollTop;
    body.style.height = `${height()}px`; // nobody can scroll beyond what is there
    node.scrollTop = top;
    isOurs = node.scrollTop !== before;
    draw(isTold);
  }

  function draw(isTold = true) {
    const until = Math.min(total, first + seen() + 2);
    body.style.height = `${height()}px`;
    rows.style.transform = `translateY(${isScaled() ? Math.min(node.scrollTop, Math.max(0, height() - (until - first) * ROW_PX)) : first * ROW_PX}px)`;
    const now = `${first} ${until}`;
    if (now !== drawn) {
      drawn = now;
      paint(until);
      if (isTold) moved?.(first);
    }
    want(Math.floor(first / PAGE), Math.floor(Math.max(first, until - 1) / PAGE));
  }

  function paint(until) {
    const had =
      rows.contains(document.activeElement) &&
      document.activeElement.closest("[role=row]")?.getAttribute("aria-rowindex");
    const made = [];
    for (let index = first; index < until; index++) {
      const row = pages.get(Math.floor(index / PAGE))?.[index % PAGE];
      made.push(
        h(
          "div",
          { role: "row", "aria-rowindex": index + 2 },
          cells(row, index).map((cell) => h("div", { role: "cell" }, cell)),
        ),
      );
    }
    fill(rows, made);
    if (had) (rows.querySelector(`[aria-rowindex="${had}"] a`) ?? node).focus({ preventScroll: true });
  }

  /** Ask for the pages that can be seen, and for no other any more. */
  function want(from, to) {
    for (const [page, asking] of asked)
      if (page < from || page > to) {
        asking.abort();
        asked.delete(page);
      }
    for (let page = from; page <= to; page++) if (!pages.has(page) && !asked.has(page)) ask(page);
  }

  async function ask(page) {
    const asking = new AbortController(),
      stop = () => asking.abort();
    asked.set(page, asking);
    signal.addEventListener("abort", stop, { once: true });
    try {
      await new Promise((done) => setTimeout(done, pages.size ? 60 : 0)); // who scrolls past needs none of it
      asking.signal.throwIfAborted();
      pages.set(page, await load(page, asking.signal));
      if (pages.size > PAGES_KEPT) pages.delete(pages.keys().next().value);
      drawn = "";
    } catch (error) {
      if (asking.signal.aborted) return;
      pages.set(page, []);
      failed(error);
    } finally {
      if (asked.get(page) === asking) asked.delete(page);
      signal.removeEventListener("abort", stop);
    }
    if (!asking.signal.aborted) draw();
  }

  const KEYS = {
    ArrowDown: () => first + 1,
    ArrowUp: () => first - 1,
    PageDown: () => first + seen(),
    PageUp: () => first - seen(),
    Home: () => 0,
    End: () => total,
  };
  node.addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    goTo(KEYS[event.key]());
  });
  node.addEventListener(
    "wheel",
    (event) => {
      if (!isScaled() || Math.abs(event.deltaX) > Math.abs(event.deltaY)) return;
      event.preventDefault();
      goTo(first + Math.sign(event.deltaY) * Math.max(1, Math.round(Math.abs(event.deltaY) / ROW_PX)));
    },
    { passive: false },
  );
  node.addEventListener("scroll", scrolled);
  new ResizeObserver(() => draw(false)).observe(node);

  return {
    node,
    goTo,
    /** Ask again for what may have changed. What is shown stays until the answer is there. */
    async refresh(mayChange) {
      const visible = new Set([Math.floor(first / PAGE), Math.floor((first + seen()) / PAGE)]);
      for (const [page, some] of pages) if (!visible.has(page) && mayChange(some, page)) pages.delete(page);
      for (const page of visible) {
        const some = pages.get(page);
        if (some && mayChange(some, page)) {
          try {
            pages.set(page, await load(page, signal));
          } catch (error) {
            if (signal.aborted) return;
          }
        }
      }
      drawn = "";
      draw(false);
    },
    resize(rowsNow) {
      total = rowsNow;
      node.setAttribute("aria-rowcount", total + 1);
      drawn = "";
      draw(false);
    },
  };
}

export const PAGE_ROWS = PAGE;
