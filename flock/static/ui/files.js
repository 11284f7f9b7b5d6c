// Rows from a file or from pasted text. They survive a reload. Files are stored in IndexedDB, since no other storage of a
// browser can hold one.

import { url } from "./address.js";
import { button, fill, h, newId, quiet, withLabel } from "./dom.js";
import { dropBox } from "./form.js";
import { session } from "./storage.js";
import { sizeOf } from "./words.js";

/** Larger files take too long to copy and are not stored. */
const MAX_STORED_BYTES = 64 * 1024 * 1024;
/** Longer pasted text is treated as a file: it is too long for a text area and for `sessionStorage`. */
const MAX_PASTED_CHARS = 500_000;
const TYPING_MS = 250;
const DAY_MS = 24 * 3600 * 1000;

async function inDatabase(mode, work) {
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

/** Return the stored file of this tab, and delete files that are older than a day.
 *
 * Private windows may have no IndexedDB. The page works without it. */
async function storedFile() {
  try {
    const keys = await inDatabase("readonly", (files) => files.getAllKeys());
    for (const key of keys)
      if (Number.parseInt(key, 10) < Date.now() - DAY_MS) await inDatabase("readwrite", (files) => files.delete(key));
    return session.get("batch file") && (await inDatabase("readonly", (files) => files.get(session.get("batch file"))));
  } catch {
    return undefined;
  }
}

let storing = Promise.resolve();

/** Store files one after the other, so that the last one is kept. */
const storeFile = (file) => (storing = storing.then(() => replaceFile(file)));

async function replaceFile(file) {
  try {
    if (session.get("batch file")) await inDatabase("readwrite", (files) => files.delete(session.get("batch file")));
    session.set("batch file", null);
    if (!file || file.size > MAX_STORED_BYTES) return;
    const key = `${Date.now()} ${Math.random()}`;
    await inDatabase("readwrite", (files) => files.put(file, key));
    session.set("batch file", key);
  } catch {
    /* the user must choose it again after a reload */
  }
}

/** Create the input for rows: {node, rows(), clear()}. `onChange` is called when the rows change. */
export async function chooser(onChange) {
  let chosen = (await storedFile()) ?? null,
    typing;
  const file = h("input", {
    type: "file",
    id: newId(),
    onchange: () => choose(file.files[0]),
  });
  const pasted = h("textarea", {
    rows: 6,
    class: "mono pasted",
    placeholder: "text\nThis is great!\nThis is terrible.",
    value: session.get("batch text") ?? "",
    oninput: () => {
      clearTimeout(typing);
      typing = setTimeout(paste, TYPING_MS);
    },
  });
  const selected = quiet({ role: "status" });
  const drop = dropBox(
    choose,
    h("label", { for: file.id }, h("strong", "Drop a CSV, XLSX, Parquet or JSON file here"), " or choose one"),
    h("p", file),
    selected,
  );

  function choose(newFile) {
    chosen = newFile ?? null;
    if (chosen) pasted.value = "";
    else file.value = "";
    store();
  }

  function paste() {
    if (pasted.value.length > MAX_PASTED_CHARS) return choose(new File([pasted.value], "pasted rows"));
    if (pasted.value) {
      chosen = null;
      file.value = "";
    }
    store();
  }

  function store() {
    session.set("batch text", pasted.value);
    storeFile(chosen);
    draw();
    onChange();
  }

  function draw() {
    fill(
      selected,
      chosen && [
        "Selected: ",
        chosen.name,
        ` (${sizeOf(chosen.size)}) `,
        button(
          "Remove",
          () => {
            choose(null);
            file.focus();
          },
          { class: "small" },
        ),
      ],
    );
  }

  draw();
  return {
    node: h(
      "div.columns",
      drop,
      withLabel(
        "or paste rows",
        pasted,
        "CSV with a header, cells of a spreadsheet, or a JSON object per line.",
      ),
    ),
    rows: () => chosen ?? (pasted.value.trim() ? new Blob([pasted.value]) : null),
    clear: () => {
      session.set("batch text", null);
      return storeFile(null);
    },
  };
}
