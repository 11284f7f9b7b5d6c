// Files that the rows of a table name. They are chosen here and sent, and their names are replaced by references.

import { button, fill, h, quiet, withLabel } from "./dom.js";
import { sendFile } from "./form.js";
import { isObject, parse } from "./json.js";
import { isLines } from "./upload.js";
import { count } from "./words.js";

const UPLOADS_AT_ONCE = 4;
const SHOWN_NAMES = 20;
const TYPES = ["Image", "Audio", "Document", "File"];

const isFileType = ({ title, type, items, anyOf } = {}) =>
  (TYPES.includes(title) && Array.isArray(type)) || [items, ...(anyOf ?? [])].some((each) => each && isFileType(each));

/** Return the text of a table, with the names in its cells replaced by `change(name)`. `columns` says which have files. */
function changed(text, { kind, delimiter }, columns, change) {
  if (kind === "ndjson") return text.split("\n").map((line) => changedLine(line, columns, change)).join("\n");
  const cell = new RegExp(`("[^"]*(?:""[^"]*)*"|[^\\${delimiter}\r\n]*)(\\${delimiter}|\r\n?|\n|$)`, "g");
  let at = 0,
    isHead = true;
  return text.replace(cell, (whole, raw, end) => {
    const { isFile } = columns[at] ?? {},
      isRow = !isHead;
    at = end === delimiter ? at + 1 : 0;
    if (at === 0) isHead = false;
    if (!isRow || !isFile) return whole;
    const value = raw.startsWith('"') ? raw.slice(1, -1).replaceAll('""', '"') : raw;
    const now = changedCell(value.trim(), change);
    return now === value ? whole : `"${(typeof now === "string" ? now : JSON.stringify(now)).replaceAll('"', '""')}"${end}`;
  });
}

function changedLine(line, columns, change) {
  let row;
  try {
    row = parse(line, () => true);
  } catch {
    /* the check says so */
  }
  if (!isObject(row)) return line;
  for (const { name, isFile } of columns) if (isFile && name in row) row[name] = changedCell(row[name], change);
  return JSON.stringify(row);
}

/** A cell is a name or a list of names. What is a reference already stays. */
function changedCell(value, change) {
  if (typeof value === "string" && value.startsWith("["))
    try {
      return changedCell(JSON.parse(value), change);
    } catch {
      /* a name */
    }
  if (Array.isArray(value)) return value.map((each) => changedCell(each, change));
  return typeof value !== "string" || /^$|^[0-9a-f]{64}$|^data:|^\{/.test(value) ? value : change(value);
}

/** A path as browsers write it. */
const pathOf = (name) => name.replaceAll("\\", "/").replace(/^\.\//, "");

export class TableFiles {
  node = h("section", { "aria-label": "Files" });
  status = h("div", { role: "status" });
  /** the paths that the rows name, the files that were chosen, and the references to those that were sent */
  named = [];
  chosen = new Map();
  references = new Map();
  sending = new AbortController();

  /** `onSent` is called when all files are sent. */
  constructor(onSent, signal) {
    Object.assign(this, { onSent, signal });
    const input = (props) => {
      const onchange = ({ target }) => this.choose(target.files);
      return h("input", { type: "file", multiple: true, ...props, onchange });
    };
    const ondrop = (event) => {
      event.preventDefault();
      this.choose(event.dataTransfer.files);
    };
    this.box = h(
      "div.drop",
      { ondragover: (event) => event.preventDefault(), ondrop },
      h(
        "div.columns",
        withLabel("Choose the files, or drop them here", input({})),
        withLabel("or choose their folder", input({ webkitdirectory: true })),
      ),
      this.status,
    );
  }

  /** Return rows and format with references in place of names, or null while files are missing. */
  async resolve(given, mapping, schema) {
    const isFile = (name) => isFileType(schema.properties?.[mapping.chosen[name]]);
    const columns = mapping.columns.map((name) => ({ name, isFile: isFile(name) }));
    const found = new Set();
    let text = "";
    if (isLines(given.format) && columns.some((column) => column.isFile)) {
      text = new TextDecoder(given.format.encoding).decode(await given.rows.arrayBuffer());
      changed(text, given.format, columns, (name) => found.add(pathOf(name)) && name);
    }
    this.named = [...found];
    if (!found.size) {
      fill(this.node);
      return given;
    }
    if (!this.node.firstChild) fill(this.node, h("h2", "Files"), this.box);
    this.draw();
    if (this.left().length) {
      if (!this.isSending && !this.failure) this.send(); // the rows may have changed
      return null;
    }
    const rows = new Blob([changed(text, given.format, columns, (name) => this.references.get(pathOf(name)))]);
    return { rows, format: { ...given.format, encoding: "utf-8" } };
  }

  left = () => this.named.filter((path) => !this.references.has(path));

  choose(files) {
    for (const file of files) {
      const path = file.webkitRelativePath.split("/").slice(1).join("/") || file.name;
      this.chosen.set(path, file);
      this.references.delete(path);
    }
    return this.send();
  }

  /** Send each file once, unless one is missing. What was sent before a failure is not sent again. */
  async send() {
    this.sending.abort();
    this.isSending = false;
    const current = (this.sending = new AbortController());
    this.failure = null;
    const signal = AbortSignal.any([this.signal, current.signal]);
    this.draw();
    const left = this.left();
    if (left.some((path) => !this.chosen.has(path))) return;
    this.isSending = true;
    const all = await Promise.allSettled(Array.from({ length: UPLOADS_AT_ONCE }, () => this.sendEach(left, signal)));
    if (signal.aborted) return;
    this.isSending = false;
    this.failure = all.find(({ reason }) => reason)?.reason.message;
    this.draw();
    if (!this.failure) this.onSent();
  }

  async sendEach(left, signal) {
    for (let path; (path = left.pop()) !== undefined; ) {
      const body = this.chosen.get(path);
      try {
        const { file_id } = await sendFile(body, signal);
        this.references.set(path, { file_id, name: body.name });
      } catch (error) {
        left.length = 0; // the others finish what they send
        throw new Error(`${path}: ${error.message}`);
      }
      this.draw();
    }
  }

  draw() {
    const missing = this.left().filter((path) => !this.chosen.has(path));
    const [all, left] = [this.named.length, this.left().length];
    if (this.failure) {
      const again = button("Try again", () => this.send());
      return fill(this.status, h("p.error", this.failure), quiet(`${count(all - left)} of ${count(all, "file")} sent. `, again));
    }
    if (!missing.length) {
      const words = left ? `Sending ${count(all, "file")} … ` : `${count(all, "file")} sent.`;
      // A status that is filled again is announced again, so only the bar changes.
      if (this.status.textContent !== words) fill(this.status, h("label", words, left > 0 && h("progress", { max: all })));
      if (left) this.status.querySelector("progress").value = all - left;
      return null;
    }
    const more = missing.length - SHOWN_NAMES;
    return fill(
      this.status,
      h("p.error", `Missing: ${count(missing.length)} of ${count(all, "file")} that the rows name.`),
      h("ul", missing.slice(0, SHOWN_NAMES).map((path) => h("li.text", path))),
      more > 0 && quiet(`… and ${count(more, "more file")}.`),
    );
  }
}
