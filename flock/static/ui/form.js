// A form made from a JSON Schema.
//
// A field is {node, read(), errors(pointer)}: what is shown, what it holds (undefined where it is left out), and the
// element beside which something that is wrong at a JSON pointer is told.

import { button, fill, h, newId } from "./dom.js";
import { isExact, parse } from "./json.js";
import { localTime } from "./words.js";

/** The fields of an object schema; `value` is what they begin with. `error(pointer, text)` is true if it found a place. */
export function form(schema, value) {
  const whole = members(schema, value ?? {}, "", schema);
  return {
    node: h("div", {}, whole.nodes),
    read: whole.read,
    clear: () => whole.each((field) => field.error?.("")),
    error: (pointer, text) => {
      // The nearest place around it: what is wrong in a list of numbers is told beside the list.
      for (let at = pointer; at; at = at.slice(0, at.lastIndexOf("/"))) {
        let found = null;
        whole.each((field) => {
          if (field.pointer() === at && field.error) found = field;
        });
        if (found) {
          found.error(text);
          return found.control;
        }
      }
      return null;
    },
  };
}

/** A reference looked up, and null taken out of a union: what is left, and whether nothing is a value. */
export function plain(schema, root) {
  if (schema.$ref) return plain({ ...schema, ...at(root, schema.$ref), $ref: undefined }, root);
  const union = schema.anyOf ?? schema.oneOf;
  const some = union?.filter((member) => member.type !== "null");
  if (union && some.length === 1)
    return {
      ...plain({ ...schema, anyOf: undefined, oneOf: undefined, ...some[0] }, root),
      isNullable: some.length < union.length,
    };
  if (Array.isArray(schema.type)) {
    const types = schema.type.filter((type) => type !== "null");
    if (types.length === 1) return { ...schema, type: types[0], isNullable: types.length < schema.type.length };
  }
  if (schema.enum?.includes(null))
    return { ...schema, enum: schema.enum.filter((each) => each !== null), isNullable: true };
  return schema;
}

const at = (root, reference) =>
  reference
    .slice(2)
    .split("/")
    .reduce((place, name) => place?.[name.replace(/~1/g, "/").replace(/~0/g, "~")], root) ?? {};

export const escapePointer = (name) => String(name).replace(/~/g, "~0").replace(/\//g, "~1");

function members(schema, value, pointer, root) {
  const required = new Set(schema.required ?? []);
  const fields = Object.entries(schema.properties ?? {}).map(([name, its]) => [
    name,
    field(
      name,
      its,
      value?.[name],
      () => `${typeof pointer === "function" ? pointer() : pointer}/${escapePointer(name)}`,
      required.has(name),
      root,
    ),
  ]);
  return {
    nodes: fields.length ? fields.map(([, each]) => each.node) : [h("p", { class: "quiet" }, "It has no inputs.")],
    read: () =>
      Object.fromEntries(fields.map(([name, each]) => [name, each.read()]).filter(([, read]) => read !== undefined)),
    each: (look) => fields.forEach(([, each]) => each.each(look)),
  };
}

function field(name, schema, value, pointer, isRequired, root, isItem = false) {
  const its = plain(schema, root);
  const start = value !== undefined ? value : its.default;
  const made = { name, its, start, pointer, isRequired, isItem, root, id: newId() };
  if (its.enum || its.const !== undefined) return choice(made);
  if (its.type === "boolean")
    return its.isNullable || (!isRequired && its.default === undefined)
      ? choice({ ...made, its: { ...its, enum: [true, false] } })
      : checkbox(made);
  if (its.type === "integer" || its.type === "number") return numeric(made);
  if (its.type === "string") return text(made);
  if (its.type === "array" && its.items && !its.prefixItems) return list(made);
  if (its.type === "object" && its.properties && !its.isNullable) return nested(made);
  return json(made);
}

/** The control for a format of JSON Schema, and how what it holds is written for the API where that differs. */
const CONTROLS = { date: "date", time: "time", "date-time": "datetime-local", email: "email", uri: "url" };
const WRITTEN = {
  time: (value) => (value.length === 5 ? `${value}:00` : value),
  "datetime-local": (value) => withOffset(new Date(value)),
};
const LATEST = { date: "9999-12-31", "datetime-local": "9999-12-31T23:59:59" };

/** A moment as RFC 3339 has it, in the time zone of the browser. */
function withOffset(date) {
  const minutes = -date.getTimezoneOffset(),
    two = (number) => String(Math.floor(Math.abs(number))).padStart(2, "0");
  return `${localTime(date)}${minutes < 0 ? "-" : "+"}${two(minutes / 60)}:${two(minutes % 60)}`;
}

/** What stands around one control: its label, what it is for, and what is wrong with it. */
function around({ name, its, id, pointer, isRequired, isItem }, control, read, more = "") {
  const wrong = h("p", { class: "error", id: `${id}-error`, hidden: true });
  const shown =
    its.default === undefined || its.default === null || its.default === ""
      ? ""
      : `Default: ${typeof its.default === "string" ? its.default : JSON.stringify(its.default)}.`;
  const hint = [its.description, more, shown]
    .filter(Boolean)
    .map((words) => (/[.!?]$/.test(words) ? words : `${words}.`))
    .join(" ");
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
  const isBox = control.type === "checkbox";
  const label = [name, isRequired && !isItem && !isBox && h("span", { class: "quiet" }, " (required)")];
  const made = {
    control,
    pointer,
    read,
    node: h(
      "div",
      { class: "field" },
      h("label", { for: id }, isBox ? [control, label] : label),
      h("p", { class: "hint", id: `${id}-hint`, hidden: !hint }, hint),
      isBox ? null : control,
      wrong,
    ),
    error: (text) => {
      fill(wrong, text).hidden = !text;
      control.toggleAttribute("aria-invalid", Boolean(text));
      if (text) control.setAttribute("aria-invalid", "true");
    },
    each: (look) => look(made),
  };
  return made;
}

/** What an empty control means. */
const empty = ({ its, isRequired }) => (its.isNullable && (isRequired || its.default != null) ? null : undefined);

function choice(made) {
  const options = made.its.enum ?? [made.its.const];
  const blank = !made.isRequired || made.its.isNullable || made.start === undefined;
  const words = (option) =>
    option === true ? "yes" : option === false ? "no" : typeof option === "string" ? option : JSON.stringify(option);
  const control = h(
    "select",
    { required: made.isRequired && !made.its.isNullable },
    blank && h("option", { value: "" }, made.isRequired && !made.its.isNullable ? "Choose …" : "–"),
    options.map((option, index) =>
      h(
        "option",
        {
          value: String(index),
          selected: made.start !== undefined && JSON.stringify(option) === JSON.stringify(made.start),
        },
        words(option),
      ),
    ),
  );
  return around(made, control, () => (control.value === "" ? empty(made) : options[Number(control.value)]));
}

function checkbox(made) {
  const control = h("input", { type: "checkbox", checked: made.start === true });
  return around(made, control, () => control.checked);
}

/** How a number is written, by its type in a schema. */
const NUMBER_RULES = {
  integer: "Write digits only, as in 42.",
  number: "Use a point for decimals, as in 0.5, and no commas or spaces.",
};

/** What may become a number while somebody types. */
const MAY_BE_NUMBER = /^[+-]?\d*\.?\d*(e[+-]?\d*)?$/i;

const notANumber = (text, type) =>
  `“${text}” is not a ${type === "integer" ? "whole " : ""}number. ${NUMBER_RULES[type]}`;

/** The number that `text` says, with all its digits. Throws an error for people if it says none. */
function numberOf(text, type) {
  const plainText = text
    .trim()
    .replace(/^\+/, "")
    .replace(/^(-?)0+(?=\d)/, "$1")
    .replace(/^(-?)\./, (_, sign) => `${sign}0.`);
  let number;
  try {
    number = parse(plainText);
  } catch {
    /* not a number */
  }
  const isWhole = isExact(number) || Number.isInteger(number);
  if (!(isExact(number) || Number.isFinite(number)) || (type === "integer" && !isWhole))
    throw new Error(notANumber(text, type));
  if (typeof number === "number" && isWhole && !Number.isSafeInteger(number) && /^-?\d+$/.test(plainText))
    throw new Error("This browser cannot keep so many digits. Use the API, or a newer browser.");
  return number;
}

/** What is wrong with a number that its schema's bounds exclude, or "". */
function outOfBounds(schema, value) {
  const [number, least, above, most, below] = [
    value,
    schema.minimum,
    schema.exclusiveMinimum,
    schema.maximum,
    schema.exclusiveMaximum,
  ].map((each) => (isExact(each) ? BigInt(each.rawJSON) : each));
  if (number < least) return `It must be at least ${least}.`;
  if (number <= above) return `It must be more than ${above}.`;
  if (number > most) return `It must be at most ${most}.`;
  if (number >= below) return `It must be less than ${below}.`;
  return "";
}

/** A text input: one of type "number" drops what it does not know, so that 119,50 becomes 11950. */
function numeric(made) {
  const { its, isRequired, start, pointer } = made;
  const control = h("input", {
    inputmode: its.type === "integer" ? "numeric" : "decimal",
    autocomplete: "off",
    required: isRequired && !its.isNullable,
    value: start === undefined || start === null ? "" : String(isExact(start) ? start.rawJSON : start),
    // At once, and not when it is left: a page that moves between press and release loses the click on a button.
    oninput: () => field.error(MAY_BE_NUMBER.test(control.value.trim()) ? "" : notANumber(control.value, its.type)),
  });
  const read = () => {
    if (control.value.trim() === "") return empty(made);
    try {
      const number = numberOf(control.value, its.type);
      const wrong = outOfBounds(its, number);
      if (wrong) throw new Error(wrong);
      return number;
    } catch (error) {
      throw Object.assign(error, { pointer: pointer() });
    }
  };
  const field = around(made, control, read, its.type === "integer" ? "A whole number." : "A number.");
  return field;
}

function text(made) {
  const { its, isRequired, start } = made;
  const type = CONTROLS[its.format];
  const given = typeof start === "string" ? start : "";
  const common = { required: isRequired && !its.isNullable, minlength: its.minLength, maxlength: its.maxLength };
  if (!type) {
    const control = h("textarea", { ...common, rows: 1, value: given, oninput: grow });
    const more =
      its.format === "duration"
        ? "ISO 8601, such as PT1H30M for 1 hour and 30 minutes."
        : its.format
          ? `Format: ${its.format}.`
          : its.contentEncoding
            ? `Encoded as ${its.contentEncoding}.`
            : "";
    return around(
      made,
      control,
      () =>
        control.value === "" && (!isRequired || its.isNullable) && its.default !== "" ? empty(made) : control.value,
      more,
    );
  }
  const control = h("input", {
    ...common,
    type,
    step: type === "date" ? undefined : "any",
    max: LATEST[type],
    value: type === "datetime-local" && given ? localTime(given) : given,
  });
  if (given && !control.value) Object.assign(control, { type: "text", value: given }); // the picker cannot show it
  const before = control.value;
  const read = () => {
    if (control.value === "") return empty(made);
    if (control.value === before) return given; // a picker has no microseconds, and no other time zone
    return WRITTEN[control.type]?.(control.value) ?? control.value;
  };
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return around(made, control, read, control.type === "datetime-local" ? `In your time zone, ${zone}.` : "");
}

/** Where the browser does not let a text area grow by itself. */
function grow({ target }) {
  if (CSS.supports("field-sizing", "content")) return;
  target.style.height = "auto";
  target.style.height = `${target.scrollHeight + 2}px`;
}

function list(made) {
  const { name, its, start, pointer, isRequired, root } = made;
  let number = 0;
  const items = [],
    rows = h("ul", { class: "list" });
  const wrong = h("p", { class: "error", hidden: true });
  const add = (value) => {
    const called = `${name} ${++number}`;
    const item = field(called, its.items, value, () => `${pointer()}/${items.indexOf(item)}`, true, root, true);
    const row = h(
      "li",
      {},
      item.node,
      button(
        "Remove",
        () => {
          items.splice(items.indexOf(item), 1);
          row.remove();
          more.focus();
          more.dispatchEvent(new Event("input", { bubbles: true }));
        },
        { class: "small", "aria-label": `Remove ${called}` },
      ),
    );
    items.push(item);
    rows.append(row);
    return item;
  };
  const more = button("Add", () => add().node.querySelector("input, select, textarea, button")?.focus(), {
    class: "small",
    "aria-label": `Add to ${name}`,
  });
  for (const value of Array.isArray(start) ? start : []) add(value);
  const made_ = {
    control: more,
    pointer,
    node: group(made, rows, more, wrong),
    read: () =>
      items.length === 0 && !isRequired && its.default === undefined
        ? undefined
        : items.map((item) => item.read() ?? null),
    error: (text) => {
      fill(wrong, text).hidden = !text;
    },
    each: (look) => {
      look(made_);
      items.forEach((item) => item.each(look));
    },
  };
  return made_;
}

function group({ name, its, isRequired, id }, ...children) {
  return h(
    "fieldset",
    { "aria-describedby": `${id}-hint` },
    h("legend", {}, name, isRequired ? h("span", { class: "quiet" }, " (required)") : null),
    h("p", { class: "hint", id: `${id}-hint`, hidden: !its.description }, its.description),
    ...children,
  );
}

function nested(made) {
  const { its, start, pointer, isRequired, root } = made;
  const inner = members(its, start, pointer, root);
  const wrong = h("p", { class: "error", tabindex: "-1", hidden: true });
  const made_ = {
    control: wrong,
    pointer,
    node: group(made, inner.nodes, wrong),
    read: () => {
      const read = inner.read();
      return !isRequired && Object.keys(read).length === 0 ? undefined : read;
    },
    error: (text) => {
      fill(wrong, text).hidden = !text;
    },
    each: (look) => {
      look(made_);
      inner.each(look);
    },
  };
  return made_;
}

/** Whatever has no form of its own is written as JSON; where text may be meant, what is no JSON is text. */
function json(made) {
  const { its, isRequired, start } = made;
  const takesText = !its.type && (!its.anyOf || its.anyOf.some((member) => member.type === "string"));
  const control = h("textarea", {
    rows: 1,
    class: "mono",
    required: isRequired && !its.isNullable,
    value: start === undefined || start === null ? "" : JSON.stringify(start),
    oninput: (event) => {
      control.setCustomValidity("");
      grow(event);
    },
  });
  const read = () => {
    if (control.value.trim() === "") return empty(made);
    try {
      return parse(control.value);
    } catch (error) {
      if (takesText) return control.value;
      throw Object.assign(new Error(`This is not valid JSON: ${error.message}.`), { pointer: made.pointer() });
    }
  };
  return around(
    made,
    control,
    read,
    takesText ? "JSON, or text." : its.type === "array" ? "JSON, such as [1, 2]." : 'JSON, such as {"name": 1}.',
  );
}
