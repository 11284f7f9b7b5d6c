// A file that somebody chose, kept over a reload: in IndexedDB, for nothing else in a browser holds one.

import { url } from "./app.js";

/** A longer one would be copied for too long; it is asked for again. */
const MAX_BYTES = 64 * 1024 * 1024;

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

const settled = (request) => new Promise((done, fail) => {
  request.onsuccess = () => done(request.result);
  request.onerror = () => fail(request.error);
});

/** A private window may have none of this, and the page works without. */
export const recall = () => within("readonly", (files) => files.get("rows")).catch(() => undefined);
export const remember = (file) => within("readwrite", (files) => (file && file.size <= MAX_BYTES ? files.put(file, "rows") : files.delete("rows"))).catch(() => undefined);
