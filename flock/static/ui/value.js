// A value of JSON, to be read.

import { button, copy, fill, h, pretty, saveAs } from "./app.js";

/** How many elements of an array are shown as a table; all of them are in the JSON. */
const MOST = 200;

export function readable(value) {
  if (value === null || value === undefined) return h("span", { class: "quiet" }, "nothing");
  if (value.rawJSON) return value.rawJSON;
  if (Array.isArray(value)) return value.length ? many(value) : h("span", { class: "quiet" }, "none");
  if (typeof value === "object") return one(value);
  return typeof value === "string" ? h("span", { class: "text" }, value) : String(value);
}

function one(value) {
  const rows = Object.entries(value).map(([name, its]) => h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, readable(its))));
  return rows.length ? h("table", { class: "value" }, h("tbody", {}, rows)) : h("span", { class: "quiet" }, "nothing");
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value) && !value.rawJSON;

function many(value) {
  const shown = value.slice(0, MOST), rest = value.length - shown.length;
  const more = rest > 0 ? h("p", { class: "quiet" }, `… and ${rest} more, which are in the JSON.`) : null;
  if (!shown.every(isObject)) return [h("ul", {}, shown.map((each) => h("li", {}, readable(each)))), more];
  const names = [...new Set(shown.flatMap(Object.keys))];
  return [h("table", {}, h("thead", {}, h("tr", {}, names.map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, shown.map((each) => h("tr", {}, names.map((name) => h("td", {}, readable(each[name]))))))), more];
}

/** A value as a table or as JSON, to copy or to keep as a file. */
export function result(value, fileName) {
  const place = h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Result" });
  const tabs = ["Table", "JSON"].map((name) => button(name, () => choose(name), { class: "small" }));
  const choose = (name) => {
    tabs.forEach((tab) => tab.setAttribute("aria-pressed", String(tab.textContent === name)));
    fill(place, name === "Table" ? readable(value) : h("pre", {}, pretty(value)));
  };
  choose("Table");
  const save = () => {
    const href = URL.createObjectURL(new Blob([`${pretty(value)}\n`], { type: "application/json" }));
    saveAs(href, fileName);
    setTimeout(() => URL.revokeObjectURL(href), 60_000);
  };
  return [h("p", { class: "actions" }, h("span", { class: "tabs", role: "group", "aria-label": "Show as" }, tabs), button("Copy", () => copy(pretty(value), "Result"), { class: "small" }), button("Download", save, { class: "small" })), place];
}
