// A form made from a JSON Schema.
//
// A field is {node, control, pointer(), read(), error(text), each(visit)}. `read` returns the value, or undefined if it
// is omitted. `error` shows an error at the field. `each` visits the field and the fields inside it.

import { Problem, send } from "./api.js";
import { button, fill, h, newId, quiet, select } from "./dom.js";
import { isExact, parse, textOf } from "./json.js";
import { busyWhile, problem } from "./notices.js";
import { session } from "./storage.js";
import { localTime, sizeOf } from "./words.js";

/** Create the form of an object schema. A field has the `label` of its property, or else its name. `error(pointer, text)`
 * shows an error and returns the control of its field. */
export function form(schema, value) {
  const root = members(schema, value ?? {}, "", schema);
  return {
    node: h("div", root.nodes),
    read: root.read,
    clear: () => root.each((field) => field.error?.("")),
    error: (pointer, text) => {
      // If no field has this pointer, use the nearest parent: an error in a list of numbers is shown at the list.
      for (let at = pointer; at; at = at.slice(0, at.lastIndexOf("/"))) {
        let found = null;
        root.each((field) => {
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

/** Store the value of a form in this tab, unless it is invalid. */
export function keep(name, fields) {
  try {
    session.set(name, JSON.stringify(fields.read()));
  } catch {
    /* the field shows the error */
  }
}

/** Prepare a form to be sent. `read` returns its value, or undefined if it is invalid. `send(work)` returns a click handler
 * that passes the value to `work`. Errors of the server at `at` are shown at their fields, and the others in `wrong`. */
export function sending(fields, at) {
  const wrong = h("div");
  const read = () => {
    fields.clear();
    fill(wrong);
    try {
      return fields.read();
    } catch (error) {
      fields.error(error.pointer, error.message)?.focus();
      return undefined;
    }
  };
  const showAtField = ({ pointer, detail }) =>
    pointer.startsWith(`${at}/`) ? fields.error(pointer.slice(at.length), detail) : null;
  const send = (work) =>
    busyWhile(async () => {
      const value = read();
      if (value === undefined) return;
      try {
        await work(value);
      } catch (error) {
        if (!(error instanceof Problem)) throw error;
        const withoutField = error.errors.filter((each) => !showAtField(each));
        const first = error.errors.map(showAtField).find(Boolean);
        if (!error.errors.length || withoutField.length)
          fill(wrong, problem({ ...error, title: error.title, message: error.message, errors: withoutField }));
        first?.focus();
      }
    });
  return { wrong, read, send };
}

/** Resolve references and remove null from a union. Sets `isNullable` if null is allowed. */
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

/** The input of an agent that a message of a chat is for, as {name, isList}: the only one that is required, a text or a
 * list of messages, or else the only text. The others may be null or left out. Returns null if there is none. */
export function chatInput(schema) {
  const inputs = Object.entries(schema.properties ?? {}).map(([name, property]) => {
    const { type, enum: values, format, items, isNullable } = plain(property, schema);
    const isList = type === "array" && plain(items ?? {}, schema).title === "ChatMessage";
    const isRequired = schema.required?.includes(name) && !isNullable;
    return { name, isList, isRequired, isChat: isList || (type === "string" && !values && !format) };
  });
  const required = inputs.filter((each) => each.isRequired),
    possible = required.length ? required : inputs.filter((each) => each.isChat);
  return possible.length === 1 && possible[0].isChat ? possible[0] : null;
}

const at = (root, reference) =>
  reference
    .slice(2)
    .split("/")
    .reduce((node, name) => node?.[name.replace(/~1/g, "/").replace(/~0/g, "~")], root) ?? {};

const escapePointer = (name) => String(name).replace(/~/g, "~0").replace(/\//g, "~1");

function members(schema, value, pointer, root) {
  const required = new Set(schema.required ?? []);
  const fields = Object.entries(schema.properties ?? {}).map(([name, property]) => [
    name,
    field(
      name,
      property,
      value?.[name],
      () => `${typeof pointer === "function" ? pointer() : pointer}/${escapePointer(name)}`,
      required.has(name),
      root,
    ),
  ]);
  return {
    nodes: fields.length ? fields.map(([, each]) => each.node) : [quiet("No inputs.")],
    read: () =>
      Object.fromEntries(fields.map(([name, each]) => [name, each.read()]).filter(([, read]) => read !== undefined)),
    each: (visit) => fields.forEach(([, each]) => each.each(visit)),
  };
}

function field(name, rawSchema, value, pointer, isRequired, root, isItem = false) {
  const schema = plain(rawSchema, root);
  const initial = value !== undefined ? value : schema.default;
  const spec = { name, schema, initial, pointer, isRequired, isItem, root, id: newId() };
  if (schema.title in ACCEPTED && Array.isArray(schema.type)) return upload(spec);
  if (schema.enum || schema.const !== undefined) return choice(spec);
  if (schema.type === "boolean")
    return schema.isNullable || (!isRequired && schema.default === undefined)
      ? choice({ ...spec, schema: { ...schema, enum: [true, false] } })
      : checkbox(spec);
  if (schema.type === "integer" || schema.type === "number") return numeric(spec);
  if (schema.type === "string") return text(spec);
  if (schema.type === "array" && schema.items && !schema.prefixItems) return list(spec);
  if (schema.type === "object" && schema.properties && !schema.isNullable) return nested(spec);
  return json(spec);
}

/** The input type for a format of JSON Schema, and how its value is converted for the API. */
const INPUT_TYPES = { date: "date", time: "time", "date-time": "datetime-local", email: "email", uri: "url" };
const TO_API = {
  time: (value) => (value.length === 5 ? `${value}:00` : value),
  "datetime-local": (value) => withOffset(new Date(value)),
};
const LATEST = { date: "9999-12-31", "datetime-local": "9999-12-31T23:59:59" };

/** Format a time as RFC 3339, in the time zone of the browser. */
function withOffset(date) {
  const minutes = -date.getTimezoneOffset(),
    two = (number) => String(Math.floor(Math.abs(number))).padStart(2, "0");
  return `${localTime(date)}${minutes < 0 ? "-" : "+"}${two(minutes / 60)}:${two(minutes % 60)}`;
}

function labelled({ name, schema, id, pointer, isRequired, isItem }, control, read, details = "") {
  const wrong = h("p.error", { id: `${id}-error`, hidden: true });
  const shown =
    schema.default == null || schema.default === "" ? "" : `Default: ${textOf(schema.default)}.`;
  const hint = [schema.description, details, shown]
    .filter(Boolean)
    .map((words) => (/[.!?]$/.test(words) ? words : `${words}.`))
    .join(" ");
  control.id = id;
  control.setAttribute("aria-describedby", `${id}-hint ${id}-error`);
  const isBox = control.type === "checkbox";
  const label = [schema.label ?? name, isRequired && !isItem && !isBox && h("span.quiet", " (required)")];
  const self = {
    control,
    pointer,
    read,
    node: h(
      "div.field",
      h("label", { for: id }, isBox ? [control, label] : label),
      h("p.hint", { id: `${id}-hint`, hidden: !hint }, hint),
      isBox ? null : control,
      wrong,
    ),
    error: (text) => {
      fill(wrong, text).hidden = !text;
      control.ariaInvalid = text ? true : null;
    },
    each: (visit) => visit(self),
  };
  return self;
}

const emptyValue = ({ schema, isRequired }) =>
  schema.isNullable && (isRequired || schema.default != null) ? null : undefined;

function choice(spec) {
  const options = spec.schema.enum ?? [spec.schema.const];
  const blank = !spec.isRequired || spec.schema.isNullable || spec.initial === undefined;
  const words = (option) => (option === true ? "yes" : option === false ? "no" : textOf(option));
  const isChosen = (option) => JSON.stringify(option) === JSON.stringify(spec.initial);
  const isNeeded = spec.isRequired && !spec.schema.isNullable;
  const control = select(
    [
      ...(blank ? [["", isNeeded ? "Choose …" : "–"]] : []),
      ...options.map((each, index) => [String(index), words(each)]),
    ],
    String(options.findIndex(isChosen)),
    { required: isNeeded },
  );
  return labelled(spec, control, () => (control.value === "" ? emptyValue(spec) : options[Number(control.value)]));
}

function checkbox(spec) {
  const control = h("input", { type: "checkbox", checked: spec.initial === true });
  return labelled(spec, control, () => control.checked);
}

const NUMBER_RULES = {
  integer: "Use digits only, such as 42.",
  number: "Use a point for decimals, such as 0.5, and no commas or spaces.",
};

const PARTIAL_NUMBER = /^[+-]?\d*\.?\d*(e[+-]?\d*)?$/i;

const notANumber = (text, type) =>
  `“${text}” is not a ${type === "integer" ? "whole " : ""}number. ${NUMBER_RULES[type]}`;

/** Parse a number with all its digits. Throws an error for the user if `text` is not a number. */
function parseNumber(text, type) {
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
    throw new Error("This number has too many digits for this browser. Use the API.");
  return number;
}

function boundsError(schema, value) {
  const [number, minimum, above, maximum, below] = [
    value,
    schema.minimum,
    schema.exclusiveMinimum,
    schema.maximum,
    schema.exclusiveMaximum,
  ].map((each) => (isExact(each) ? BigInt(each.rawJSON) : each));
  if (number < minimum) return `It must be at least ${minimum}.`;
  if (number <= above) return `It must be more than ${above}.`;
  if (number > maximum) return `It must be at most ${maximum}.`;
  if (number >= below) return `It must be less than ${below}.`;
  return "";
}

/** Create a text input for a number. An input of type "number" drops unknown characters: 119,50 would become 11950. */
function numeric(spec) {
  const { schema, isRequired, initial, pointer } = spec;
  const control = h("input", {
    inputmode: schema.type === "integer" ? "numeric" : "decimal",
    autocomplete: "off",
    required: isRequired && !schema.isNullable,
    value: initial == null ? "" : textOf(initial),
    // Not on blur: if the layout shifts between press and release, the click on a button is lost.
    oninput: () => field.error(PARTIAL_NUMBER.test(control.value.trim()) ? "" : notANumber(control.value, schema.type)),
  });
  const read = () => {
    if (control.value.trim() === "") return emptyValue(spec);
    try {
      const number = parseNumber(control.value, schema.type);
      const wrong = boundsError(schema, number);
      if (wrong) throw new Error(wrong);
      return number;
    } catch (error) {
      throw Object.assign(error, { pointer: pointer() });
    }
  };
  const field = labelled(spec, control, read, schema.type === "integer" ? "A whole number." : "A number.");
  return field;
}

function text(spec) {
  const { schema, isRequired, initial } = spec;
  const type = INPUT_TYPES[schema.format];
  const initialText = typeof initial === "string" ? initial : "";
  const { minLength: minlength, maxLength: maxlength } = schema;
  const common = { required: isRequired && !schema.isNullable, minlength, maxlength };
  if (!type) {
    const control = h("textarea", { ...common, rows: 1, value: initialText, oninput: grow });
    const details =
      schema.format === "duration"
        ? "ISO 8601, such as PT1H30M."
        : schema.format
          ? `Format: ${schema.format}.`
          : schema.contentEncoding
            ? `Encoded as ${schema.contentEncoding}.`
            : "";
    return labelled(
      spec,
      control,
      () =>
        control.value === "" && (!isRequired || schema.isNullable) && schema.default !== ""
          ? emptyValue(spec)
          : control.value,
      details,
    );
  }
  const control = h("input", {
    ...common,
    type,
    step: type === "date" ? undefined : "any",
    max: LATEST[type],
    value: type === "datetime-local" && initialText ? localTime(initialText) : initialText,
  });
  // A value that the picker cannot show is edited as text.
  if (initialText && !control.value) Object.assign(control, { type: "text", value: initialText });
  const before = control.value;
  const read = () => {
    if (control.value === "") return emptyValue(spec);
    if (control.value === before) return initialText; // a picker would lose microseconds and the time zone
    return TO_API[control.type]?.(control.value) ?? control.value;
  };
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return labelled(spec, control, read, control.type === "datetime-local" ? `In your time zone, ${zone}.` : "");
}

/** Grow a text area with its text, if the browser does not do it. */
function grow({ target }) {
  if (CSS.supports("field-sizing", "content")) return;
  target.style.height = "auto";
  target.style.height = `${target.scrollHeight + 2}px`;
}

function list(spec) {
  const { name, schema, initial, pointer, isRequired, root } = spec;
  let number = 0;
  const items = [],
    rows = h("ul.list");
  const add = (value) => {
    const label = `${name} ${++number}`;
    const item = field(label, schema.items, value, () => `${pointer()}/${items.indexOf(item)}`, true, root, true);
    const row = h(
      "li",
      item.node,
      button(
        "Remove",
        () => {
          items.splice(items.indexOf(item), 1);
          row.remove();
          addButton.focus();
          addButton.dispatchEvent(new Event("input", { bubbles: true }));
        },
        { class: "small", "aria-label": `Remove ${label}` },
      ),
    );
    items.push(item);
    rows.append(row);
    return item;
  };
  const addButton = button("Add", () => add().node.querySelector("input, select, textarea, button")?.focus(), {
    class: "small",
    "aria-label": `Add to ${name}`,
  });
  for (const value of Array.isArray(initial) ? initial : []) add(value);
  const isOmitted = () => items.length === 0 && !isRequired && schema.default === undefined;
  const read = () => (isOmitted() ? undefined : items.map((item) => item.read() ?? null));
  return group(spec, items, read, rows, addButton);
}

function nested(spec) {
  const { schema, initial, pointer, isRequired, root } = spec;
  const inner = members(schema, initial, pointer, root);
  const read = () => {
    const read = inner.read();
    return !isRequired && Object.keys(read).length === 0 ? undefined : read;
  };
  return group(spec, [inner], read, inner.nodes);
}

/** Wrap fields with the name, hint and error of all. */
function group({ name, schema, isRequired, id, pointer }, fields, read, ...children) {
  const wrong = h("p.error", { tabindex: "-1", hidden: true });
  const self = {
    control: wrong,
    pointer,
    read,
    node: h(
      "fieldset",
      { "aria-describedby": `${id}-hint` },
      h("legend", name, isRequired && h("span.quiet", " (required)")),
      h("p.hint", { id: `${id}-hint`, hidden: !schema.description }, schema.description),
      children,
      wrong,
    ),
    error: (text) => {
      fill(wrong, text).hidden = !text;
    },
    each: (visit) => {
      visit(self);
      for (const field of fields) field.each(visit);
    },
  };
  return self;
}

/** Create a box for a file that is dropped or pasted, which `choose(file)` gets. It refuses folders and several files. */
export function dropBox(choose, ...children) {
  const wrong = h("p.error", { role: "alert", hidden: true });
  const say = (text) => {
    fill(wrong, text).hidden = !text;
  };
  const chooseFrom = ({ files, items }) => {
    if (!files.length) return;
    const isFolder = Array.from(items, (item) => item.webkitGetAsEntry?.()).some((entry) => entry?.isDirectory);
    const several = files.length > 1 ? "These are several files. Choose one." : "";
    const text = isFolder ? "This is a folder. Choose a file." : several;
    say(text);
    if (!text) choose(files[0]);
  };
  const box = h(
    "div.drop",
    {
      ondragover: (event) => {
        event.preventDefault();
        box.classList.add("over");
      },
      ondragleave: () => box.classList.remove("over"),
      ondrop: (event) => {
        event.preventDefault();
        box.classList.remove("over");
        chooseFrom(event.dataTransfer);
      },
      onpaste: (event) => chooseFrom(event.clipboardData),
      onchange: () => say(""),
    },
    children,
    wrong,
  );
  return box;
}

/** What a file picker offers for the types of files. The server checks the content. */
const ACCEPTED = { Image: "image/*", Audio: "audio/*", Document: ".pdf,text/*", File: "" };

/** Send the content of a file, and return its record. */
export async function sendFile(body, signal) {
  // Browsers take other types from the ending of the name, and from what is installed.
  const headers = { "Content-Type": /^(image|audio)\//.test(body.type) ? body.type : "application/octet-stream" };
  return parse(await send("files", { method: "POST", canRetry: false, headers, body, signal }));
}

/** Create an input for a file, which is chosen, dropped, pasted or photographed, and sent at once. Its value is the reference. */
function upload(spec) {
  const { name, schema, initial, isRequired, pointer } = spec;
  const chosen = quiet({ role: "status" });
  let value = initial ?? undefined,
    busy = null;
  const control = h("input", { type: "file", accept: ACCEPTED[schema.title], onchange: () => choose(control.files[0]) });
  const takePhoto = () => {
    control.setAttribute("capture", "environment");
    control.click();
  };
  const read = () => {
    if (busy) throw Object.assign(new Error("The file is still being sent."), { pointer: pointer() });
    return value === undefined ? emptyValue(spec) : value;
  };
  const description = schema.description === "A data URL, or a file_id." ? "" : schema.description; // not for people
  const shown = { ...spec, schema: { ...schema, description } };
  const self = labelled(shown, control, read, "Choose a file, or drop or paste it here.");
  control.addEventListener("click", (event) => event.isTrusted && control.removeAttribute("capture"));
  const box = dropBox(choose);
  control.replaceWith(box);
  const photo = schema.title === "Image" ? [button("Take a photo", takePhoto, { class: "small camera" })] : [];
  box.prepend(control, ...photo, chosen);

  async function choose(file) {
    if (!file) return;
    busy?.abort();
    const current = (busy = new AbortController());
    value = undefined;
    control.value = ""; // so that the same file can be chosen again
    self.error("");
    draw(`Sending ${file.name} …`);
    let text = "";
    try {
      const sent = await sendFile(file, current.signal);
      if (busy === current) value = { ...sent, name: file.name };
    } catch (error) {
      text = error.message;
    }
    if (busy !== current) return;
    busy = null;
    self.error(text);
    draw();
    box.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function draw(text = "") {
    control.required = isRequired && !schema.isNullable && value === undefined && !busy;
    const file = value && [h("strong", value.name || name), value.size && `, ${value.media_type}, ${sizeOf(value.size)} `];
    const remove = () => {
      value = undefined;
      control.value = "";
      draw();
      control.focus();
      box.dispatchEvent(new Event("input", { bubbles: true }));
    };
    const label = `Remove the file of ${name}`; // a list has a button that removes the whole item
    fill(chosen, text || (file && [file, button("Remove", remove, { class: "small", "aria-label": label })]));
  }

  draw();
  return self;
}

/** Create a JSON input, for types without their own control. If the type allows text, invalid JSON is text. */
function json(spec) {
  const { schema, isRequired, initial } = spec;
  const takesText = !schema.type && (!schema.anyOf || schema.anyOf.some((member) => member.type === "string"));
  const control = h("textarea", {
    rows: 1,
    class: "mono",
    required: isRequired && !schema.isNullable,
    value: initial == null ? "" : JSON.stringify(initial),
    oninput: (event) => {
      control.setCustomValidity("");
      grow(event);
    },
  });
  const read = () => {
    if (control.value.trim() === "") return emptyValue(spec);
    try {
      return parse(control.value);
    } catch (error) {
      if (takesText) return control.value;
      throw Object.assign(new Error(`This is not valid JSON: ${error.message}.`), { pointer: spec.pointer() });
    }
  };
  return labelled(
    spec,
    control,
    read,
    takesText ? "JSON or text." : schema.type === "array" ? "JSON, such as [1, 2]." : 'JSON, such as {"name": 1}.',
  );
}
