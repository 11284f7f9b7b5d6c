// A value of JSON, to be read.

import { button, fill, h, saveAs } from "./dom.js";
import { isExact, pretty } from "./json.js";
import { copy } from "./notices.js";

/** How many elements, and characters, are shown in a table; all of them are in the JSON. */
const MOST = 200;
const LONGEST = 20_000;
/** How much JSON is shown; all of it is copied and downloaded. */
const LONGEST_JSON = 1_000_000;

export function readable(value) {
  if (value === null || value === undefined) return h("span", { class: "quiet" }, "nothing");
  if (isExact(value)) return value.rawJSON;
  if (Array.isArray(value)) return value.length ? many(value) : h("span", { class: "quiet" }, "none");
  if (typeof value === "object") return one(value);
  if (typeof value !== "string") return String(value);
  const more =
    value.length > LONGEST
      ? h("span", { class: "quiet" }, ` … and ${value.length - LONGEST} characters more, which are in the JSON.`)
      : null;
  return [h("span", { class: "text" }, value.slice(0, LONGEST)), more];
}

function one(value) {
  const entries = Object.entries(value),
    rest = entries.length - MOST;
  const rows = entries
    .slice(0, MOST)
    .map(([name, its]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, readable(its))));
  if (!rows.length) return h("span", { class: "quiet" }, "nothing");
  return [
    h("table", { class: "value" }, h("tbody", {}, rows)),
    rest > 0 ? h("p", { class: "quiet" }, `… and ${rest} more, which are in the JSON.`) : null,
  ];
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value) && !isExact(value);

function many(value) {
  const shown = value.slice(0, MOST),
    rest = value.length - shown.length;
  const more = rest > 0 ? h("p", { class: "quiet" }, `… and ${rest} more, which are in the JSON.`) : null;
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

/** A value as a table or as JSON, to copy or to keep as a file. */
export function result(value, fileName) {
  const place = h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Result" });
  const tabs = ["Table", "JSON"].map((name) => button(name, () => choose(name), { class: "small" }));
  const choose = (name) => {
    tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.textContent === name)));
    const text = name === "JSON" && pretty(value);
    fill(
      place,
      text
        ? [
            h("pre", {}, text.slice(0, LONGEST_JSON)),
            text.length > LONGEST_JSON && h("p", { class: "quiet" }, "Only the start is shown. Download it to see all."),
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
    place,
  ];
}
