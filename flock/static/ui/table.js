// A table for a million rows. Only visible rows are elements, and only their pages are loaded.

import { fill, h } from "./dom.js";

const ROW_PX = 36;
const PAGE = 100;
const MAX_CACHED_PAGES = 40;
/** Browsers cannot draw beyond about 16 million pixels. Above this height the scroll position is scaled. */
const MAX_PX = 8_000_000;

/**
 * @param columns  [{name, min, max}]: the minimum width in rem, and the maximum as a grid track
 * @param start    the first visible row; call goTo() to scroll to it when the table is in the page
 * @param load     (page, signal) => the rows of the page, by their index in it
 * @param cells    (row, index) => the cells of a row; the row is undefined until it is loaded
 * @param onScroll called with the first visible row
 * @param onError  called with the error if a page cannot be loaded
 */
export function bigTable({ label, columns, total, start, load, cells, onScroll, onError, signal }) {
  const rows = h("div.rows");
  const body = h("div.body", { role: "rowgroup" }, rows);
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
    "div.virtual",
    { role: "table", tabindex: "0", "aria-label": label, "aria-colcount": columns.length, "aria-rowcount": total + 1 },
    head,
    body,
  );
  node.style.setProperty("--tracks", columns.map(({ min, max }) => `minmax(${min}rem, ${max})`).join(" "));
  node.style.setProperty("--min-width", `${columns.reduce((sum, { min }) => sum + min, 0)}rem`);
  const height = () => Math.min(total * ROW_PX, MAX_PX);
  body.style.height = `${height()}px`; // set here, because a resize observer would observe its own change
  const pages = new Map(),
    requests = new Map();
  let first = start,
    drawn = "",
    isProgrammatic = false;

  const visibleRows = () => Math.max(1, Math.floor((node.clientHeight - ROW_PX) / ROW_PX) || 12);
  const last = () => Math.max(0, total - visibleRows());
  const isScaled = () => total * ROW_PX > MAX_PX;
  const scrollRange = () => Math.max(1, height() + ROW_PX - node.clientHeight);

  /** Set the first row from the scroll position, unless goTo() has set it. */
  function handleScroll() {
    if (!isProgrammatic)
      first = isScaled()
        ? Math.round((node.scrollTop / scrollRange()) * last())
        : Math.min(last(), Math.floor(node.scrollTop / ROW_PX));
    isProgrammatic = false;
    draw();
  }

  function goTo(row, isReported = true) {
    first = Math.max(0, Math.min(last(), row));
    const top = Math.round(isScaled() ? (first / Math.max(1, last())) * scrollRange() : first * ROW_PX);
    const before = node.scrollTop;
    body.style.height = `${height()}px`; // the body limits how far it can scroll
    node.scrollTop = top;
    isProgrammatic = node.scrollTop !== before;
    draw(isReported);
  }

  function draw(isReported = true) {
    const end = Math.min(total, first + visibleRows() + 2);
    body.style.height = `${height()}px`;
    rows.style.transform = `translateY(${isScaled() ? Math.min(node.scrollTop, Math.max(0, height() - (end - first) * ROW_PX)) : first * ROW_PX}px)`;
    const now = `${first} ${end}`;
    if (now !== drawn) {
      drawn = now;
      paint(end);
      if (isReported) onScroll?.(first);
    }
    loadPages(Math.floor(first / PAGE), Math.floor(Math.max(first, end - 1) / PAGE));
  }

  function paint(end) {
    const focusedRow =
      rows.contains(document.activeElement) &&
      document.activeElement.closest("[role=row]")?.getAttribute("aria-rowindex");
    const elements = [];
    for (let index = first; index < end; index++) {
      const row = pages.get(Math.floor(index / PAGE))?.[index % PAGE];
      elements.push(
        h(
          "div",
          { role: "row", "aria-rowindex": index + 2 },
          cells(row, index).map((cell) => h("div", { role: "cell" }, cell)),
        ),
      );
    }
    fill(rows, elements);
    if (focusedRow) (rows.querySelector(`[aria-rowindex="${focusedRow}"] a`) ?? node).focus({ preventScroll: true });
  }

  function loadPages(from, to) {
    for (const [page, request] of requests)
      if (page < from || page > to) {
        request.abort();
        requests.delete(page);
      }
    for (let page = from; page <= to; page++) if (!pages.has(page) && !requests.has(page)) loadPage(page);
  }

  async function loadPage(page) {
    const request = new AbortController(),
      either = AbortSignal.any([signal, request.signal]);
    requests.set(page, request);
    try {
      await new Promise((done) => setTimeout(done, pages.size ? 60 : 0)); // skip pages that are only scrolled past
      either.throwIfAborted();
      pages.set(page, await load(page, either));
      if (pages.size > MAX_CACHED_PAGES) pages.delete(pages.keys().next().value);
      drawn = "";
    } catch (error) {
      if (either.aborted) return;
      pages.set(page, []);
      onError(error);
    } finally {
      if (requests.get(page) === request) requests.delete(page);
    }
    if (!either.aborted) draw();
  }

  const KEYS = {
    ArrowDown: () => first + 1,
    ArrowUp: () => first - 1,
    PageDown: () => first + visibleRows(),
    PageUp: () => first - visibleRows(),
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
  node.addEventListener("scroll", handleScroll);
  new ResizeObserver(() => draw(false)).observe(node);

  return {
    node,
    goTo,
    /** Reload the pages that may have changed. The old rows stay until the new ones are loaded. */
    async refresh(mayChange) {
      const visible = new Set([Math.floor(first / PAGE), Math.floor((first + visibleRows()) / PAGE)]);
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
      node.ariaRowCount = total + 1;
      drawn = "";
      draw(false);
    },
  };
}

export const PAGE_ROWS = PAGE;
