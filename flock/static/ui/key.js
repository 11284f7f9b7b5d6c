// The API key.

import { fill } from "./dom.js";
import { session } from "./storage.js";

export const hasKey = () => session.get("key") !== null;
export const authorization = () => (hasKey() ? { Authorization: `Bearer ${session.get("key")}` } : {});

let pendingDialog = null;

/** Ask for a key, once for all requests that need it. Does not ask if `rejectedKey` was replaced in the meantime. */
export function askForKey(rejectedKey) {
  if (session.get("key") !== rejectedKey) return pendingDialog;
  pendingDialog ??= new Promise((done) => {
    const dialog = document.getElementById("ask"),
      input = document.getElementById("ask-key");
    const unknown = "The server does not know this key. Did you copy all of it?";
    fill(
      document.getElementById("ask-why"),
      rejectedKey ? unknown : "Ask an administrator for a key. It is stored until you close this tab.",
    ).classList.toggle("error", Boolean(rejectedKey));
    input.value = "";
    input.toggleAttribute("aria-invalid", Boolean(rejectedKey));
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      // A header cannot have other characters. With "?" instead, the server rejects the key.
      session.set("key", input.value.trim().replace(/[^\x21-\x7e]/g, "?"));
      input.value = "";
      pendingDialog = null;
      showKey();
      done();
    };
    dialog.showModal();
    input.focus();
  });
  return pendingDialog;
}

export function showKey() {
  document.getElementById("remove-key").hidden = !hasKey();
}
