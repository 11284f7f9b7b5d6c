// The result of a check of rows, in words.

import { h, quiet, table, wide } from "./dom.js";
import { count } from "./words.js";

const isNoRowsError = ({ pointer }) => pointer === "/batch_inputs";

export function summary({ ok, total_items: total, invalid_items: invalid, errors }, kind) {
  if (errors.some(isNoRowsError)) return [false, `There are no rows${kind === "csv" ? " below the header" : ""}.`];
  if (!ok && !total) return [false, "The header is invalid."];
  if (!ok) return [false, `Only ${count(total, "row")} could be read.`];
  if (invalid) return [false, `${count(invalid)} of ${count(total, "row")} ${invalid === 1 ? "is" : "are"} invalid.`];
  return [true, total === 1 ? "The row is valid." : `All ${count(total)} rows are valid.`];
}

const locationOf = ({ pointer }) => pointer.slice(1).replace(/~1/g, "/").replace(/~0/g, "~");

export function errorTable(errors) {
  const shown = errors.filter((error) => !isNoRowsError(error));
  if (!shown.length) return null;
  const row = (error) => h("tr", h("td.number", error.line ?? ""), h("td", locationOf(error)), h("td", error.detail));
  return [
    wide("Errors", table(["Line", "Column", "Error"], shown.map(row))),
    shown.length >= 100 && quiet("Only the first 100 are shown."),
  ];
}
