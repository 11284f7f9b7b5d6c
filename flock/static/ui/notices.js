// Messages for the user.

import { button, fill, h, quiet } from "./dom.js";

let hiding;

/** Show a message for a few seconds. Screen readers announce it. */
export function notify(text) {
  clearTimeout(hiding);
  fill(document.getElementById("notice"), text);
  hiding = setTimeout(() => fill(document.getElementById("notice")), 6000);
}

export function problem(error, retry) {
  const isGone = error.status === 404;
  return h(
    "div.problem",
    { role: "alert" },
    h("h2", isGone ? "This no longer exists" : error.title || "Something went wrong"),
    h("p", error.message),
    isGone && h("p", "It was deleted, or the link is incomplete, or it belongs to someone else."),
    error.errors?.length > 0 &&
      h(
        "ul",
        error.errors.map((each) => h("li", each.line ? `Line ${each.line}: ` : "", each.detail)),
      ),
    error.requestId && quiet("Request ", h("code", error.requestId)),
    retry && h("p", button("Try again", retry)),
  );
}

/** Return a click handler that disables its button while `work` runs, and shows its error. */
export const busyWhile = (work) => async (event) => {
  const pressed = event.currentTarget;
  pressed.disabled = true;
  try {
    await work(event);
  } catch (error) {
    if (error.name !== "AbortError") notify(error.message);
  }
  pressed.disabled = false;
  if (document.activeElement === document.body) pressed.focus(); // a disabled button loses the focus
};

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // there is no clipboard API on plain http
    const area = h("textarea", { value: text, "aria-label": what });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  notify(`${what} copied.`);
}
