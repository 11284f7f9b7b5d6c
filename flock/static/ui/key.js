// The key that the server asks for.

import { fill } from "./dom.js";
import { session } from "./storage.js";

export const hasKey = () => session.get("key") !== null;
export const authorization = () => (hasKey() ? { Authorization: `Bearer ${session.get("key")}` } : {});

let asking = null;

/** Ask for a key once, however many requests need one. One that was replaced meanwhile is not asked for again. */
export function askForKey(refused) {
  if (session.get("key") !== refused) return asking;
  asking ??= new Promise((done) => {
    const dialog = document.getElementById("ask"),
      input = document.getElementById("ask-key");
    const wrong = "The server does not know this key. Check that you copied all of it.";
    fill(
      document.getElementById("ask-why"),
      refused ? wrong : "The people who run the server can give you one. It is kept until you close this tab.",
    ).classList.toggle("error", Boolean(refused));
    input.value = "";
    input.toggleAttribute("aria-invalid", Boolean(refused));
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      // What no header can hold is no key, and the server shall say so.
      session.set("key", input.value.trim().replace(/[^\x21-\x7e]/g, "?"));
      input.value = "";
      asking = null;
      showKey();
      done();
    };
    dialog.showModal();
    input.focus();
  });
  return asking;
}

export function showKey() {
  document.getElementById("forget").hidden = !hasKey();
}
