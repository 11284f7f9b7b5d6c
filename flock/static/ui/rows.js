// Rows of CSV and NDJSON, read from a file a slice at a time: however long it is, little of it is held.

import { NUMBER_RULES, outOfBounds, plain } from "./form.js";
import { isExact, parse } from "./json.js";

/** What a file or a text seems to be: `{kind: "csv", delimiter}` or `{kind: "ndjson"}`. */
export async function sniff(blob) {
  const head = (await blob.slice(0, 65536).text()).replace(/^\ufeff/, "");
  if (/\.(ndjson|jsonl)$/i.test(blob.name ?? "") || head.trimStart().startsWith("{")) return { kind: "ndjson" };
  const line = head.split(/[\r\n]/, 1)[0].replace(/"[^"]*"/g, "");
  const often = [",", ";", "\t", "|"].map((delimiter) => [line.split(delimiter).length, delimiter]);
  return { kind: "csv", delimiter: often.reduce((best, each) => (each[0] > best[0] ? each : best))[1] };
}

/** A row that cannot be read. */
class Unreadable extends Error {
  constructor(message, line) {
    super(message);
    this.line = line;
  }
}

async function* texts(blob, signal, at) {
  const reader = blob
    .stream()
    .pipeThrough(new TextDecoderStream("utf-8", { fatal: true }))
    .getReader();
  try {
    for (;;) {
      signal?.throwIfAborted();
      const { value, done } = await reader.read().catch((error) => {
        throw error instanceof TypeError
          ? new Unreadable("This is not UTF-8. Save the file as “CSV UTF-8” and choose it again.", at())
          : error;
      });
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

const [BEGIN, BARE, QUOTED, CLOSED] = [0, 1, 2, 3];

/** Records of CSV (RFC 4180), many at once, as `{line, cells}`; empty lines are none. */
async function* csvRecords(blob, delimiter, signal) {
  let state = BEGIN,
    line = 1,
    begun = 1,
    cells = [],
    cell = "",
    wasCR = false;
  for await (const text of texts(blob, signal, () => line)) {
    const records = [];
    let from = 0; // where what is not yet in `cell` begins
    for (let i = 0; i < text.length; i++) {
      const c = text[i];
      if (wasCR && c === "\n") {
        // the second half of a line's end
        wasCR = false;
        if (state === QUOTED) continue;
        from = i + 1;
        continue;
      }
      wasCR = c === "\r";
      if (state === QUOTED) {
        if (c === '"') {
          cell += text.slice(from, i);
          state = CLOSED;
        } else if (c === "\n" || c === "\r") line++;
        continue;
      }
      if (c === '"' && state === BEGIN) {
        state = QUOTED;
        from = i + 1;
      } else if (c === '"' && state === CLOSED) {
        cell += '"';
        state = QUOTED;
        from = i + 1;
      } else if (c === delimiter || c === "\n" || c === "\r") {
        if (state === BARE) cell += text.slice(from, i);
        const isEmpty = state === BEGIN && !cells.length && c !== delimiter;
        if (!isEmpty) cells.push(cell);
        cell = "";
        state = BEGIN;
        from = i + 1;
        if (c !== delimiter) {
          line++;
          if (cells.length) records.push({ line: begun, cells });
          cells = [];
          begun = line;
        }
      } else if (state === CLOSED) {
        throw new Unreadable("A closing quote must be followed by a delimiter. Write a quote inside quotes twice.", begun);
      } else if (state === BEGIN) {
        state = BARE;
        from = i;
      }
    }
    if (state === BARE || state === QUOTED) cell += text.slice(from);
    yield records;
  }
  if (state === QUOTED) throw new Unreadable("A quote is opened here and never closed.", begun);
  if (state !== BEGIN || cells.length) yield [{ line: begun, cells: [...cells, cell] }];
}

async function* ndjsonRecords(blob, signal) {
  let line = 0,
    rest = "";
  const read = (lines) =>
    lines.flatMap((text) => {
      line++;
      if (!text.trim()) return [];
      try {
        const members = parse(text);
        if (!TYPES.object(members)) return [{ line, error: "A line must be one JSON object." }];
        return [{ line, members }];
      } catch (error) {
        return [{ line, error: `This is not valid JSON: ${error.message}.` }];
      }
    });
  for await (const text of texts(blob, signal, () => line + 1)) {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    yield read(lines);
  }
  if (rest) yield read([rest]);
}

const records = (blob, format, signal) =>
  format.kind === "csv" ? csvRecords(blob, format.delimiter, signal) : ndjsonRecords(blob, signal);

/** The columns, and the first rows as lists of texts in their order. */
export async function preview(blob, format, rows = 5) {
  let columns = null;
  const found = [];
  for await (const some of records(blob, format)) {
    for (const record of some) {
      if (format.kind === "csv" && !columns) columns = record.cells.map((name) => name.trim());
      else if (!record.error) found.push(record.cells ?? record.members);
      if (found.length >= 100) break;
    }
    if (found.length >= (format.kind === "csv" ? rows : 100)) break;
  }
  columns ??= [...new Set(found.flatMap(Object.keys))];
  const cells = (row) =>
    Array.isArray(row)
      ? row
      : columns.map((name) =>
          row[name] === undefined ? "" : typeof row[name] === "string" ? row[name] : JSON.stringify(row[name]),
        );
  return { columns, rows: found.slice(0, rows).map(cells) };
}

// --- What is wrong with a row, as far as it is simple: the server has the last word --------------------------------

function describe(schema) {
  if (schema.enum)
    return `one of ${schema.enum.map((each) => (typeof each === "string" ? each : JSON.stringify(each))).join(", ")}`;
  const words = {
    string: "text",
    integer: "a whole number",
    number: "a number",
    boolean: "true or false",
    array: "a list, as JSON",
    object: "an object, as JSON",
  };
  if (FORMATS[schema.format]) return FORMATS[schema.format].words;
  return words[schema.type] ?? "a value that this input accepts";
}

const FORMATS = {
  date: { words: "a date such as 2026-11-30", start: /^\d{4}-\d\d-\d\d$/ },
  "date-time": { words: "a date and time such as 2026-11-30T09:00:00Z", start: /^\d{4}-\d\d-\d\d[Tt ]\d\d:/ },
  time: { words: "a time such as 09:00:00", start: /^\d\d:\d\d/ },
  duration: { words: "a duration such as PT1H30M", start: /^[+-]?P/i },
};

const TYPES = {
  string: (value) => typeof value === "string",
  boolean: (value) => typeof value === "boolean",
  null: (value) => value === null,
  integer: (value) => Number.isInteger(value) || isExact(value),
  number: (value) => typeof value === "number" || isExact(value),
  array: Array.isArray,
  object: (value) => value !== null && typeof value === "object" && !Array.isArray(value) && !isExact(value),
};

/** What is wrong with a value, or "". */
function wrongWith(raw, value, root) {
  const schema = plain(raw, root);
  if (value === null && schema.isNullable) return "";
  const union = schema.anyOf ?? schema.oneOf;
  if (union)
    return union.some((member) => !wrongWith(member, value, root)) ? "" : "It is not a value that this input accepts.";
  const shown = JSON.stringify(value) ?? "nothing";
  const rule = typeof value === "string" && /\d/.test(value) && NUMBER_RULES[schema.type];
  const not = `${shown.length > 60 ? `${shown.slice(0, 60)}…` : shown} is not ${describe(schema)}.${rule ? ` ${rule}` : ""}`;
  if (schema.enum) return schema.enum.some((each) => JSON.stringify(each) === shown) ? "" : not;
  if (schema.type && TYPES[schema.type] && !TYPES[schema.type](value)) return not;
  const format = FORMATS[schema.format];
  if (format && !format.start.test(value)) return not;
  if (schema.format === "date" && Number.isNaN(Date.parse(value))) return not;
  const bounds = outOfBounds(schema, value);
  if (bounds) return bounds;
  if (typeof value === "string" && [...value].length < schema.minLength)
    return `It is shorter than ${schema.minLength} characters.`;
  if (typeof value === "string" && [...value].length > schema.maxLength)
    return `It is longer than ${schema.maxLength} characters.`;
  if (schema.type === "array" && schema.items)
    return value.map((each) => wrongWith(schema.items, each, root)).find(Boolean) ?? "";
  if (schema.type === "object" && schema.properties) return Object.values(wrongMembers(schema, value, root))[0] ?? "";
  return "";
}

/** What is wrong with the members of an object, by name. */
function wrongMembers(schema, members, root) {
  const found = {};
  for (const name of schema.required ?? [])
    if (!Object.hasOwn(members, name)) found[name] = `The input '${name}' is required.`;
  for (const [name, value] of Object.entries(members)) {
    const its = schema.properties?.[name];
    const wrong = its
      ? wrongWith(its, value, root)
      : schema.additionalProperties === false
        ? `There is no input '${name}'.`
        : "";
    if (wrong) found[name] = wrong;
  }
  return found;
}

/** A cell as the server reads it: text where the input takes text, otherwise what it says as JSON. */
function valueOf(cell, schema, isRequired, hasStatic) {
  if (cell === "") return hasStatic || !isRequired ? undefined : schema.isNullable ? null : "";
  if (schema.type === "string") return cell;
  const text = cell.trim();
  if (schema.type === "boolean" && /^(true|false)$/i.test(text)) return text.toLowerCase() === "true";
  if (schema.enum?.includes(cell)) return cell;
  try {
    return parse(text);
  } catch {
    return cell;
  }
}

/** Read all rows and tell what is wrong, line by line.
 *
 * `told` is called now and then with {rows, wrong, bytes, errors}; of the errors 100 are kept. */
export async function check(blob, format, { schema, mapping, statics, told, signal }) {
  const found = { rows: 0, wrong: 0, bytes: 0, errors: [], isDone: false };
  const required = new Set(schema.required ?? []),
    isInput = (name) => Object.hasOwn(schema.properties ?? {}, name);
  const columnOf = Object.fromEntries(
    Object.entries(mapping)
      .filter(([, input]) => isInput(input))
      .map(([name, input]) => [input, name]),
  );
  const error = (line, detail, input) => {
    if (found.errors.length < 100) found.errors.push({ line, detail, column: columnOf[input] ?? input });
  };
  let columns = null,
    last = 0;
  try {
    for await (const some of records(blob, format, signal)) {
      for (const record of some) {
        if (format.kind === "csv" && !columns) {
          columns = record.cells.map((name) => {
            const input = mapping[name.trim()];
            return (
              isInput(input) && {
                column: name.trim(),
                input,
                schema: plain(schema.properties[input], schema),
                isRequired: required.has(input),
                hasStatic: input in statics,
              }
            );
          });
          columns.length = record.cells.length;
          continue;
        }
        found.rows++;
        let wrongs = {};
        if (record.error) wrongs[""] = record.error;
        else if (format.kind === "csv" && record.cells.length !== columns.length)
          wrongs[""] = `This row has ${record.cells.length} cells, and the header has ${columns.length}.`;
        else {
          const inputs = { ...statics };
          if (columns)
            columns.forEach((column, index) => {
              const value = column
                ? valueOf(record.cells[index], column.schema, column.isRequired, column.hasStatic)
                : undefined;
              if (value !== undefined) inputs[column.input] = value;
            });
          else
            for (const [name, value] of Object.entries(record.members))
              if (isInput(mapping[name] ?? name)) inputs[mapping[name] ?? name] = value;
          wrongs = wrongMembers(schema, inputs, schema);
        }
        const places = Object.entries(wrongs);
        if (places.length) found.wrong++;
        for (const [place, detail] of places) error(record.line, detail, place);
      }
      if (performance.now() - last > 100) {
        last = performance.now();
        told({ ...found });
        await new Promise((done) => setTimeout(done)); // the page stays at hand
      }
    }
  } catch (failure) {
    if (!(failure instanceof Unreadable)) throw failure;
    found.wrong++;
    found.isUnreadable = true;
    error(failure.line, failure.message, "");
  }
  if (format.kind === "csv" && !columns && !found.isUnreadable)
    error(1, "There is no header. The first line must name the columns.", "");
  told({ ...found, isDone: true });
}

/** The same rows without some columns, each in the line where it was: the API would keep them. */
export async function without(blob, format, leftOut, signal) {
  const parts = [];
  let line = 1,
    header = null,
    kept = null;
  const quote = (cell) =>
    /["\r\n]/.test(cell) || cell.includes(format.delimiter) || cell === "" ? `"${cell.replaceAll('"', '""')}"` : cell;
  for await (const some of records(blob, format, signal)) {
    let text = "";
    for (const record of some) {
      while (line < record.line) {
        text += "\n";
        line++;
      }
      if (format.kind === "csv") {
        if (!header) kept = (header = record.cells).map((name) => !leftOut.has(name.trim()));
        let cells = record.cells.filter((_, index) => kept[index] ?? true);
        if (record.cells.length !== header.length && cells.length === kept.filter(Boolean).length)
          cells = [...cells, ""]; // it stays wrong
        const row = cells.map(quote).join(format.delimiter);
        text += `${row}\n`;
        line += row.split(/\r\n|\r|\n/).length;
      } else {
        text += `${record.error ? "null" : JSON.stringify(Object.fromEntries(Object.entries(record.members).filter(([name]) => !leftOut.has(name))))}\n`;
        line++;
      }
    }
    parts.push(new Blob([text]));
  }
  return new Blob(parts);
}
