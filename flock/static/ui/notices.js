// What happened, in words for people.

import { button, fill, h } from "./dom.js";

let saying;

/** Tell what happened, to the eye and to a screen reader. */
export function say(text) {
  clearTimeout(saying);
  fill(document.getElementById("said"), text);
  saying = setTimeout(() => fill(document.getElementById("said")), 6000);
}

/** What went wrong, and what to do about it. */
export function problem(error, again) {
  const gone = error.status === 404;
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("h2", {}, gone ? "This no longer exists" : error.title || "Something went wrong"),
    h("p", {}, error.message),
    gone && h("p", {}, "It was deleted, or the link is incomplete, or it belongs to someone else."),
    error.errors?.length > 0 &&
      h(
        "ul",
        {},
        error.errors.map((each) => h("li", {}, each.line ? `Line ${each.line}: ` : "", each.detail)),
      ),
    error.requestId && h("p", { class: "quiet" }, "Request ", h("code", {}, error.requestId)),
    again && h("p", {}, button("Try again", again)),
  );
}

/** Do what a button says, once, and tell what became of it. */
export const doing = (work) => async (event) => {
  const pressed = event.currentTarget;
  pressed.disabled = true;
  try {
    await work(event);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  }
  pressed.disabled = false;
  if (document.activeElement === document.body) pressed.focus(); // what is disabled loses the focus
};

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // a page that came over plain http has no clipboard
    const area = h("textarea", { value: text, "aria-label": what });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`${what} copied.`);
}
