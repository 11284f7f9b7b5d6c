// What a check of rows found, in words.

import { h } from "./dom.js";
import { count } from "./words.js";

const isOfNoRows = ({ pointer }) => pointer === "/batch_inputs";

/** Whether nothing is wrong, and a sentence. */
export function summary({ ok, total_items: total, invalid_items: invalid, errors }, kind) {
  if (errors.some(isOfNoRows)) return [false, `There are no rows${kind === "csv" ? " below the header" : ""}.`];
  if (!ok && !total) return [false, "The header does not fit."];
  if (!ok) return [false, `Only ${count(total, "row")} can be read.`];
  if (invalid) return [false, `${count(invalid, "row does", "rows do")} not fit, of ${count(total)}.`];
  return [true, `All ${count(total, "row fits", "rows fit")}.`];
}

/** The column, or the place in the request, of an error. */
const placeOf = ({ pointer }) => pointer.slice(1).replace(/~1/g, "/").replace(/~0/g, "~");

/** What is wrong, by line. */
export function errorTable(errors) {
  const shown = errors.filter((error) => !isOfNoRows(error));
  if (!shown.length) return null;
  const row = (error) =>
    h(
      "tr",
      {},
      h("td", { class: "number" }, error.line ?? ""),
      h("td", {}, placeOf(error)),
      h("td", {}, error.detail),
    );
  const heads = ["Line", "Column", "What is wrong"].map((text) => h("th", { scope: "col" }, text));
  return [
    h(
      "div",
      { class: "wide", tabindex: "0", role: "group", "aria-label": "What is wrong" },
      h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, shown.map(row))),
    ),
    shown.length >= 100 && h("p", { class: "quiet" }, "The first 100 are shown."),
  ];
}
