// Rows that somebody chose, dropped or pasted, kept over a reload: a file in IndexedDB, since nothing else in a browser
// holds one.

import { url } from "./address.js";
import { button, fill, h, newId } from "./dom.js";
import { session } from "./storage.js";

/** A longer one would be copied for too long; it is asked for again. */
const MAX_BYTES = 64 * 1024 * 1024;
/** What is pasted and longer is taken for a file: neither a text area nor `sessionStorage` is made for it. */
const MAX_PASTED = 500_000;
const TYPING_MS = 250;
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
async function recall() {
  try {
    const keys = await within("readonly", (files) => files.getAllKeys());
    for (const key of keys)
      if (Number.parseInt(key, 10) < Date.now() - DAY_MS) await within("readwrite", (files) => files.delete(key));
    return session.get("batch file") && (await within("readonly", (files) => files.get(session.get("batch file"))));
  } catch {
    return undefined;
  }
}

let remembering = Promise.resolve();

/** One after the other, so that the last one stays. */
const remember = (file) => (remembering = remembering.then(() => replace(file)));

async function replace(file) {
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

/** A place to drop, choose or paste: {node, rows(), forget()}. `changed` is called when there are other rows. */
export async function chooser(changed) {
  let dropped = (await recall()) ?? null,
    typing;
  const file = h("input", {
    type: "file",
    id: newId(),
    accept: ".csv,.tsv,.txt,.ndjson,.jsonl,text/csv,application/x-ndjson",
    onchange: () => choose(file.files[0]),
  });
  const pasted = h("textarea", {
    id: newId(),
    rows: 6,
    class: "mono pasted",
    placeholder: "text\nThis is great!\nThis is terrible.",
    value: session.get("batch text") ?? "",
    oninput: () => {
      clearTimeout(typing);
      typing = setTimeout(paste, TYPING_MS);
    },
  });
  const named = h("p", { class: "quiet", role: "status" });
  const drop = h(
    "div",
    {
      class: "drop",
      ondragover: (event) => {
        event.preventDefault();
        drop.classList.add("over");
      },
      ondragleave: () => drop.classList.remove("over"),
      ondrop: (event) => {
        event.preventDefault();
        drop.classList.remove("over");
        choose(event.dataTransfer.files[0]);
      },
    },
    h("label", { for: file.id }, h("strong", {}, "Drop a CSV or NDJSON file here"), " or choose one"),
    h("p", {}, file),
    named,
  );

  function choose(one) {
    dropped = one ?? null;
    if (dropped) pasted.value = "";
    else file.value = "";
    keep();
  }

  function paste() {
    if (pasted.value.length > MAX_PASTED) return choose(new File([pasted.value], "pasted rows"));
    if (pasted.value) {
      dropped = null;
      file.value = "";
    }
    keep();
  }

  function keep() {
    session.set("batch text", pasted.value);
    remember(dropped);
    draw();
    changed();
  }

  function draw() {
    fill(
      named,
      dropped && [
        "Chosen: ",
        dropped.name,
        ` (${size(dropped.size)}) `,
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
      "div",
      { class: "columns" },
      drop,
      h(
        "div",
        { class: "field" },
        h("label", { for: pasted.id }, "or paste rows"),
        h("p", { class: "hint" }, "CSV with a header, cells copied from a spreadsheet, or one JSON object on each line."),
        pasted,
      ),
    ),
    rows: () => dropped ?? (pasted.value.trim() ? new Blob([pasted.value]) : null),
    forget: () => {
      session.set("batch text", null);
      return remember(null);
    },
  };
}

function size(bytes) {
  const [unit, factor] = [
    ["GB", 1e9],
    ["MB", 1e6],
    ["kB", 1e3],
    ["bytes", 1],
  ].find(([, factor]) => bytes >= factor) ?? ["bytes", 1];
  return `${Number((bytes / factor).toPrecision(3))} ${unit}`;
}
