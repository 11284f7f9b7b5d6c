// The entry of the page. It loads each view when it is first shown.

import { enterView } from "./address.js";
import { showAgents } from "./agents.js";
import { Problem, get, waitForServer } from "./api.js";
import { fill, h } from "./dom.js";
import { showKey } from "./key.js";
import { problem } from "./notices.js";
import { clearStorage, local } from "./storage.js";
import { every, pause } from "./wait.js";

const VIEWS = {
  agents: async () => ({ show: showAgents }), // most visits start here
  agent: () => import("./agent.js"),
  chat: () => import("./chat.js"),
  runs: () => import("./lists.js"),
  run: () => import("./run.js"),
  waiting: () => import("./lists.js"),
  question: () => import("./run.js"),
  batches: () => import("./lists.js"),
  batch: () => import("./batch.js"),
  webhooks: () => import("./lists.js"),
  "new-batch": () => import("./newbatch.js"),
};
/** The tabs of views that have none of their own. */
const TABS = { chat: "agent", "new-batch": "batch", question: "waiting" };
const COUNT_EVERY_MS = 5000;
const name = document.title;

function partsOf(path) {
  try {
    return path.split("/").map(decodeURIComponent);
  } catch {
    return [path]; // a bad %
  }
}

async function show(isFirst) {
  const signal = enterView();
  const main = document.getElementById("main");
  const [path, query] = (location.hash.slice(2) || "agents").split("?");
  const [view, ...rest] = partsOf(path);
  for (const tab of document.querySelectorAll("nav a")) {
    const isCurrent = tab.hash.startsWith(`#/${(TABS[view] ?? view).replace(/e?s$/, "")}`) && tab.hash;
    tab.ariaCurrent = isCurrent ? "page" : null;
  }
  main.ariaBusy = true;
  try {
    if (!VIEWS[view]) throw new Problem(404, { detail: "There is no such page." });
    const module = await VIEWS[view]().catch(async (error) => {
      if (!(error instanceof TypeError)) throw error;
      await waitForServer("The server cannot be reached.", signal);
      return VIEWS[view]();
    });
    signal.throwIfAborted();
    // Each view has its own element, so a closed view cannot change the current one.
    const container = h("div.view");
    fill(main, container);
    await module.show(container, { view, id: rest.join("/"), params: new URLSearchParams(query), signal });
    signal.throwIfAborted();
    const heading = container.querySelector("h1");
    document.title = `${heading.textContent} · ${name}`;
    if (!isFirst) (container.querySelector("[autofocus]") ?? heading).focus();
  } catch (error) {
    if (signal.aborted) return;
    fill(main, problem(error, error.status === 404 ? null : () => show(false)));
  } finally {
    if (!signal.aborted) main.ariaBusy = null;
  }
}

async function countWaiting() {
  const { questions, next } = await get("questions?limit=50");
  const count = questions.length;
  fill(document.getElementById("waiting"), count ? `${count}${next ? "+" : ""}` : null).hidden = !count;
}

/** Show the tab of the webhooks to those who may see them. The server sends it only if it has receivers. */
async function showWebhooks() {
  const tab = document.querySelector('nav [href="#/webhooks"]');
  if (!tab) return;
  await get("webhooks?limit=1");
  tab.hidden = false;
}

const theme = document.getElementById("theme");
const setTheme = () => {
  document.documentElement.dataset.theme = theme.value = local.get("theme") || "";
};
theme.addEventListener("change", () => {
  local.set("theme", theme.value);
  setTheme();
});

document.getElementById("remove-key").addEventListener("click", () => {
  addEventListener("pagehide", clearStorage); // the view may still write
  const deleted = clearStorage();
  deleted.onsuccess = deleted.onerror = () => location.reload();
});
addEventListener("hashchange", () => show(false));
// Ctrl+Enter or Cmd+Enter sends the form that has the focus, and in a chat Enter too. Other texts keep Enter for a new line.
addEventListener("keydown", (event) => {
  const { target, key, ctrlKey, metaKey, shiftKey, isComposing, keyCode } = event;
  if (key !== "Enter" || isComposing || keyCode === 229) return; // of Safari
  if (!ctrlKey && !metaKey && (target.enterKeyHint !== "send" || shiftKey)) return;
  if (!target.matches("input, select, textarea")) return;
  event.preventDefault();
  target.closest("form, .view")?.querySelector("button.primary, button:not([type])")?.click();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  // its hash is not a view
  event.preventDefault();
  document.getElementById("main").focus();
});
setTheme();
showKey();
show(true)
  .then(() => pause(1000)) // the first paint should not wait for it
  .then(() => {
    showWebhooks().catch(() => {});
    every(COUNT_EVERY_MS, () => countWaiting().catch(() => {}));
  });
