// Elements of the page.

const SVG = new Set(["svg", "rect", "line", "text"]);

/** Create an element. Other values than elements are added as text, so data is never parsed as HTML. */
export function h(tag, props = {}, ...children) {
  const element = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "open", "disabled", "hidden", "selected"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const fill = (element, ...children) => {
  element.replaceChildren(
    ...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
};

export const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);

let ids = 0;
export const newId = () => `e${++ids}`;

export function saveAs(href, name) {
  const link = h("a", { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

export const title = (text, ...more) => h("div", { class: "title" }, h("h1", { tabindex: "-1" }, text), more);
