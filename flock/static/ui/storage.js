// What is kept in this browser.

import { url } from "./address.js";

const OURS = `flock:${url("").pathname}`;

/** Storage that may be full or forbidden; a second flock under another prefix has its own. */
const kept = (storage) => ({
  get: (name) => {
    try {
      return storage().getItem(`${OURS}:${name}`);
    } catch {
      return null;
    }
  },
  set: (name, value) => {
    try {
      if (value === null || value === "") storage().removeItem(`${OURS}:${name}`);
      else storage().setItem(`${OURS}:${name}`, value);
    } catch {
      /* the page works without */
    }
  },
});
export const session = kept(() => sessionStorage);
export const local = kept(() => localStorage);

/** Also drafts and the chosen file. */
export function forget() {
  for (const storage of [sessionStorage, localStorage])
    for (const name of Object.keys(storage)) if (name.startsWith(`${OURS}:`)) storage.removeItem(name);
  return indexedDB.deleteDatabase(OURS);
}
