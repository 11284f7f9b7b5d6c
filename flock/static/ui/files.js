// A file that somebody chose, kept over a reload: in IndexedDB, for nothing else in a browser holds one.

import { session, url } from "./app.js";

/** A longer one would be copied for too long; it is asked for again. */
const MAX_BYTES = 64 * 1024 * 1024;
const DAY_MS = 24 * 3600 * 1000;

async function within(mode, work) {
  const opening = indexedDB.open(`flock:${url("").pathname}`, 1);
  opening.onupgradeneeded = () => opening.result.createObjectStore("files");
  const database = await settled(opening);
  try {
    return await settled(work(database.transaction("files", mode).objectStore("files")));
  } finally {
    database.close();
  }
}

const settled = (request) =>
  new Promise((done, fail) => {
    request.onsuccess = () => done(request.result);
    request.onerror = () => fail(request.error);
  });

/** The file of this tab. Those of tabs that were closed are forgotten after a day, if not before.
 *
 * A private window may have none of this, and the page works without. */
export async function recall() {
  try {
    const keys = await within("readonly", (files) => files.getAllKeys());
    for (const key of keys)
      if (Number.parseInt(key, 10) < Date.now() - DAY_MS) await within("readwrite", (files) => files.delete(key));
    return session.get("batch file") && (await within("readonly", (files) => files.get(session.get("batch file"))));
  } catch {
    return undefined;
  }
}

export async function remember(file) {
  try {
    if (session.get("batch file")) await within("readwrite", (files) => files.delete(session.get("batch file")));
    session.set("batch file", null);
    if (!file || file.size > MAX_BYTES) return;
    const key = `${Date.now()} ${Math.random()}`;
    await within("readwrite", (files) => files.put(file, key));
    session.set("batch file", key);
  } catch {
    /* it has to be chosen again after a reload */
  }
}
