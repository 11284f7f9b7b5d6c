// A JSON value, formatted for reading.

import { button, fill, h, saveAs } from "./dom.js";
import { isExact, pretty } from "./json.js";
import { copy } from "./notices.js";

/** The limits of the table view. The JSON view has the rest. */
const MAX_ELEMENTS = 200;
const MAX_TEXT_CHARS = 20_000;
/** The limit of the JSON view. Copies and downloads are complete. */
const MAX_JSON_CHARS = 1_000_000;

export function readable(value) {
  if (value === null || value === undefined) return h("span", { class: "quiet" }, "nothing");
  if (isExact(value)) return value.rawJSON;
  if (Array.isArray(value)) return value.length ? arrayTable(value) : h("span", { class: "quiet" }, "none");
  if (typeof value === "object") return objectTable(value);
  if (typeof value !== "string") return String(value);
  const more =
    value.length > MAX_TEXT_CHARS
      ? h("span", { class: "quiet" }, ` … and ${value.length - MAX_TEXT_CHARS} more characters. The JSON view shows all.`)
      : null;
  return [h("span", { class: "text" }, value.slice(0, MAX_TEXT_CHARS)), more];
}

function objectTable(value) {
  const entries = Object.entries(value),
    rest = entries.length - MAX_ELEMENTS;
  const rows = entries
    .slice(0, MAX_ELEMENTS)
    .map(([name, member]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, readable(member))));
  if (!rows.length) return h("span", { class: "quiet" }, "nothing");
  return [
    h("table", { class: "value" }, h("tbody", {}, rows)),
    rest > 0 ? h("p", { class: "quiet" }, `… and ${rest} more. The JSON view shows all.`) : null,
  ];
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value) && !isExact(value);

function arrayTable(value) {
  const shown = value.slice(0, MAX_ELEMENTS),
    rest = value.length - shown.length;
  const more = rest > 0 ? h("p", { class: "quiet" }, `… and ${rest} more. The JSON view shows all.`) : null;
  if (!shown.every(isObject))
    return [
      h(
        "ul",
        {},
        shown.map((each) => h("li", {}, readable(each))),
      ),
      more,
    ];
  const names = [...new Set(shown.flatMap(Object.keys))];
  return [
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          names.map((name) => h("th", { scope: "col" }, name)),
        ),
      ),
      h(
        "tbody",
        {},
        shown.map((each) =>
          h(
            "tr",
            {},
            names.map((name) => h("td", {}, readable(each[name]))),
          ),
        ),
      ),
    ),
    more,
  ];
}

/** Show a value as a table or as JSON, with buttons to copy and download it. */
export function result(value, fileName) {
  const container = h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Result" });
  const tabs = ["Table", "JSON"].map((name) => button(name, () => choose(name), { class: "small" }));
  const choose = (name) => {
    tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.textContent === name)));
    const text = name === "JSON" && pretty(value);
    fill(
      container,
      text
        ? [
            h("pre", {}, text.slice(0, MAX_JSON_CHARS)),
            text.length > MAX_JSON_CHARS &&
              h("p", { class: "quiet" }, "Only the start is shown. Download the result to see all of it."),
          ]
        : readable(value),
    );
  };
  choose("Table");
  const save = () => {
    const href = URL.createObjectURL(new Blob([`${pretty(value)}\n`], { type: "application/json" }));
    saveAs(href, fileName);
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  };
  return [
    h(
      "p",
      { class: "actions" },
      h("span", { class: "tabs", role: "group", "aria-label": "Show as" }, tabs),
      button("Copy", () => copy(pretty(value), "Result"), { class: "small" }),
      button("Download", save, { class: "small" }),
    ),
    container,
  ];
}
