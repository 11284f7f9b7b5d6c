// Elements of the page.

const SVG = new Set(["svg", "rect", "line", "text"]);
const PROPERTIES = new Set(["value", "checked", "open", "disabled", "hidden", "selected"]);

const isShown = (child) => child != null && child !== false;

/** Create an element, such as `h("p.quiet", { id }, "Hello")`. The properties can be omitted. Children that are not
 * elements are added as text, so data is never parsed as HTML. */
export function h(name, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  if (classes.length) element.classList.add(...classes);
  const props = children[0]?.constructor === Object ? children.shift() : {};
  for (const [name, value] of Object.entries(props)) {
    if (!isShown(value)) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  return fill(element, children);
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(9).filter(isShown));
  return element;
}

export const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);

export const quiet = (...children) => h("p.quiet", ...children);
export const actions = (...children) => h("p.actions", ...children);
export const title = (text, ...more) => h("div.title", h("h1", { tabindex: "-1" }, text), more);

/** One entry of a list of facts. */
export const fact = (name, ...value) => h("div", h("dt", name), h("dd", value));

/** A box that scrolls sideways, also by keyboard. */
export const wide = (label, ...children) =>
  h("div.wide", { tabindex: "0", role: "group", "aria-label": label }, children);

/** A table with a row of headings. `body` is its rows, or an element that has them. */
export const table = (names, body) => {
  const heads = names.map((name) => h("th", { scope: "col" }, name));
  return h("table", h("thead", h("tr", heads)), Array.isArray(body) ? h("tbody", body) : body);
};

/** A control to choose one of `options`, each a text or `[value, text]`. */
export const select = (options, chosen, props = {}) => {
  const option = (each) => {
    const [value, text = value] = [each].flat();
    return h("option", { value, selected: value === chosen }, text);
  };
  return h("select", props, options.map(option));
};

/** A handler of a form that is sent. `work` gets an event with the button, as after a click. */
export const submitting = (work) => (event) => {
  event.preventDefault();
  work({ currentTarget: event.submitter });
};

let ids = 0;
export const newId = () => `e${++ids}`;

export function withLabel(text, control, hint) {
  control.id ||= newId();
  return h("div.field", h("label", { for: control.id }, text), hint && h("p.hint", hint), control);
}
