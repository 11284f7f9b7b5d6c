// Storage in this browser.

import { url } from "./address.js";
import { parse } from "./json.js";

const PREFIX = `flock:${url("").pathname}`;

/** Wrap a storage that may be full or blocked. Each path prefix of a server has its own names. */
const safeStorage = (storage) => ({
  get: (name) => {
    try {
      return storage().getItem(`${PREFIX}:${name}`);
    } catch {
      return null;
    }
  },
  set: (name, value) => {
    try {
      if (value === null || value === "") storage().removeItem(`${PREFIX}:${name}`);
      else storage().setItem(`${PREFIX}:${name}`, value);
    } catch {
      /* the page works without storage */
    }
  },
});
export const session = safeStorage(() => sessionStorage);
export const local = safeStorage(() => localStorage);

/** Return a value that was stored as JSON in this tab, or null. */
export function stored(name) {
  try {
    return parse(session.get(name));
  } catch {
    return null;
  }
}

export function clearStorage() {
  for (const storage of [sessionStorage, localStorage])
    for (const name of Object.keys(storage)) if (name.startsWith(`${PREFIX}:`)) storage.removeItem(name);
  return indexedDB.deleteDatabase(PREFIX);
}
