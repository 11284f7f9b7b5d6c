// A JSON value, formatted for reading.

import { actions, button, fill, h, quiet, table, wide } from "./dom.js";
import { isExact, isFile, isObject, pretty } from "./json.js";
import { copy } from "./notices.js";
import { fileOf } from "./reference.js";
import { saveBlob } from "./save.js";

/** The limits of the table view. The JSON view has the rest. */
const MAX_ELEMENTS = 200;
const MAX_TEXT_CHARS = 20_000;
/** The limit of the JSON view. Copies and downloads are complete. */
const MAX_JSON_CHARS = 1_000_000;

export function readable(value) {
  if (value == null) return h("span.quiet", "nothing");
  if (isExact(value)) return value.rawJSON;
  if (isFile(value)) return fileOf(value);
  if (Array.isArray(value)) return value.length ? arrayTable(value) : h("span.quiet", "none");
  if (typeof value === "object") return objectTable(value);
  if (typeof value !== "string") return String(value);
  const more =
    value.length > MAX_TEXT_CHARS
      ? h("span.quiet", ` … and ${value.length - MAX_TEXT_CHARS} more characters. The JSON view shows all.`)
      : null;
  return [h("span.text", value.slice(0, MAX_TEXT_CHARS)), more];
}

const rest = (number) =>
  number > MAX_ELEMENTS && quiet(`… and ${number - MAX_ELEMENTS} more. The JSON view shows all.`);

function objectTable(value) {
  const entries = Object.entries(value);
  if (!entries.length) return h("span.quiet", "nothing");
  const row = ([name, member]) => h("tr", h("th", { scope: "row" }, name), h("td", readable(member)));
  return [h("table.value", h("tbody", entries.slice(0, MAX_ELEMENTS).map(row))), rest(entries.length)];
}

function arrayTable(value) {
  const shown = value.slice(0, MAX_ELEMENTS);
  const names = [...new Set(shown.filter(isObject).flatMap(Object.keys))];
  const item = (each) => h("li", readable(each));
  const row = (each) => h("tr", ...names.map((name) => h("td", readable(each[name]))));
  return [shown.every((each) => isObject(each) && !isFile(each)) ? table(names, shown.map(row)) : h("ul", shown.map(item)), rest(value.length)];
}

/** Show a value as a table or as JSON, with buttons to copy and download it. */
export function result(value, fileName) {
  const container = wide("Result");
  const tabs = ["Table", "JSON"].map((name) => button(name, () => choose(name), { class: "small" }));
  const choose = (name) => {
    for (const tab of tabs) tab.ariaPressed = tab.textContent === name;
    const text = name === "JSON" && pretty(value);
    fill(
      container,
      text
        ? [
            h("pre", text.slice(0, MAX_JSON_CHARS)),
            text.length > MAX_JSON_CHARS && quiet("Download it to see all."),
          ]
        : readable(value),
    );
  };
  choose("Table");
  const save = () => saveBlob(new Blob([`${pretty(value)}\n`], { type: "application/json" }), fileName);
  return [
    actions(
      h("span.tabs", { role: "group", "aria-label": "Show as" }, tabs),
      button("Copy", () => copy(pretty(value), "Result"), { class: "small" }),
      button("Download", save, { class: "small" }),
    ),
    container,
  ];
}
