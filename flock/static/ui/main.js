// The entry of the page: it knows the views, and loads each when it is first shown.

import { arrive } from "./address.js";
import { Problem, away } from "./api.js";
import { fill, h } from "./dom.js";
import { showKey } from "./key.js";
import { problem } from "./notices.js";
import { forget, local } from "./storage.js";

const VIEWS = {
  agents: () => import("./agents.js"),
  agent: () => import("./agent.js"),
  runs: () => import("./runs.js"),
  run: () => import("./run.js"),
  batches: () => import("./batches.js"),
  batch: () => import("./batch.js"),
  "new-batch": () => import("./newbatch.js"),
};
const name = document.title;
let leaving = new AbortController();

async function show(isFirst) {
  leaving.abort(new DOMException("This view was left.", "AbortError"));
  const { signal } = (leaving = new AbortController());
  arrive();
  const main = document.getElementById("main");
  const [path, query] = (location.hash.slice(2) || "agents").split("?");
  const [view, ...rest] = path.split("/").map(decodeURIComponent);
  for (const tab of document.querySelectorAll("nav a")) {
    const here = tab.hash.startsWith(`#/${view.replace("new-batch", "batch").replace(/e?s$/, "")}`) && tab.hash;
    here ? tab.setAttribute("aria-current", "page") : tab.removeAttribute("aria-current");
  }
  main.setAttribute("aria-busy", "true");
  try {
    if (!VIEWS[view]) throw new Problem(404, { detail: "There is no such page." });
    const module = await VIEWS[view]().catch(async (error) => {
      if (!(error instanceof TypeError)) throw error;
      await away("The server cannot be reached.", signal);
      return VIEWS[view]();
    });
    signal.throwIfAborted();
    // Each view draws into an element of its own, so one that was left can no longer change what is shown.
    const place = h("div", { class: "view" });
    fill(main, place);
    await module.show(place, { id: rest.join("/"), params: new URLSearchParams(query), signal });
    signal.throwIfAborted();
    const heading = place.querySelector("h1");
    document.title = `${heading.textContent} · ${name}`;
    if (!isFirst) heading.focus();
  } catch (error) {
    if (signal.aborted) return;
    fill(main, problem(error, error.status === 404 ? null : () => show(false)));
  } finally {
    if (!signal.aborted) main.removeAttribute("aria-busy");
  }
}

const theme = document.getElementById("theme");
const setTheme = () => {
  document.documentElement.dataset.theme = theme.value = local.get("theme") || "";
};
theme.addEventListener("change", () => {
  local.set("theme", theme.value);
  setTheme();
});

document.getElementById("forget").addEventListener("click", () => {
  addEventListener("pagehide", forget); // the view may still write
  const gone = forget();
  gone.onsuccess = gone.onerror = () => location.reload();
});
addEventListener("hashchange", () => show(false));
document.querySelector(".skip").addEventListener("click", (event) => {
  // its hash would be taken for a view
  event.preventDefault();
  document.getElementById("main").focus();
});
setTheme();
showKey();
show(true);
