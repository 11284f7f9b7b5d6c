// What views are made of: elements, words, the API, the shell. A view is a module, loaded on demand: the first one needs
// five requests, with its data.

// --- Elements --------------------------------------------------------------------------------------------------------

const SVG = new Set(["svg", "rect", "line", "text"]);

/** An element. Children that are no elements become text: data is never read as HTML. */
export function h(tag, props = {}, ...children) {
  const element = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (["value", "checked", "open", "disabled", "hidden", "selected"].includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const fill = (element, ...children) => {
  element.replaceChildren(
    ...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
};

export const button = (text, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, text);

let ids = 0;
export const newId = () => `e${++ids}`;

// --- Words -----------------------------------------------------------------------------------------------------------

export const SIGNS = { starting: "○", running: "◐", completed: "✓", failed: "✕", cancelled: "⊘" };

/** A status by sign, word and colour. */
export const badge = (status) =>
  h("span", { class: `badge ${status}` }, h("span", { "aria-hidden": "true" }, SIGNS[status]), ` ${status}`);

/** The same in a sentence. */
export const ended = { completed: "is completed", failed: "failed", cancelled: "was cancelled" };

export const STATUSES = Object.keys(SIGNS);
export const isFinal = (status) => ["completed", "failed", "cancelled"].includes(status);

const WHEN = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });
export const when = (time) => (time ? h("time", { datetime: time, title: time }, WHEN.format(new Date(time))) : "–");

/** A time of the API as an input of type datetime-local has it. */
export function localTime(time) {
  const date = new Date(time);
  return Number.isNaN(date.getTime())
    ? ""
    : new Date(date - date.getTimezoneOffset() * 60_000).toISOString().slice(0, 23).replace(/\.000Z?$/, "");
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds > 0 && seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds.toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.floor(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min`;
}

/** Seconds from one time of the API to another, or to now. */
export const between = (from, to) => (from ? ((to ? new Date(to) : new Date()) - new Date(from)) / 1000 : null);

const NUMBER = new Intl.NumberFormat();
export const count = (number, one, many = `${one}s`) =>
  `${NUMBER.format(number)}${one ? ` ${number === 1 ? one : many}` : ""}`;

/** JSON, with integers that JavaScript would round kept as they were written, where the browser can. */
export function parse(text) {
  if (!JSON.rawJSON || !/\d{16}/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" &&
    Number.isInteger(value) &&
    !Number.isSafeInteger(value) &&
    /^-?\d+$/.test(context.source)
      ? JSON.rawJSON(context.source)
      : value,
  );
}

/** Whether `parse` kept a value as it was written; it holds its digits in `rawJSON`. */
export const isExact = (value) => Boolean(JSON.isRawJSON?.(value));

export const pretty = (value) => JSON.stringify(value, null, 2);

// --- What is kept in this browser ------------------------------------------------------------------------------------

const HERE = new URL("..", import.meta.url);

const OURS = `flock:${HERE.pathname}`;

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
const local = kept(() => localStorage);

// --- The API ---------------------------------------------------------------------------------------------------------

/** Why the server refused a request (RFC 9457). */
export class Problem extends Error {
  constructor(status, body) {
    super(body?.detail || `The server answered with status ${status}.`);
    Object.assign(this, {
      status,
      title: body?.title || "Error",
      errors: body?.errors || [],
      requestId: body?.request_id,
    });
  }
}

export const url = (path) => new URL(path, HERE);
export const hasKey = () => session.get("key") !== null;
export const authorization = () => (hasKey() ? { Authorization: `Bearer ${session.get("key")}` } : {});
const AWAY = [502, 503, 504];

/** The text of the answer to a request, or all of the answer with `isStream`. A key, a busy server, and one that is away
 * are waited for. With `once`, what may not be sent twice fails where nobody can tell whether it arrived. */
export async function send(path, { once = false, isStream = false, headers = {}, by = fetch, ...options } = {}) {
  for (;;) {
    const key = session.get("key");
    let response, text;
    try {
      response = await by(url(path), { ...options, cache: "no-store", headers: { ...headers, ...authorization() } });
      if (!isStream || !response.ok) text = await response.text();
    } catch (error) {
      if (options.signal?.aborted) throw error;
      if (once)
        throw new Error("The server cannot be reached, and may or may not have received this. Check before you try again.");
      await away("The server cannot be reached.", options.signal);
      continue;
    }
    if (response.ok) return isStream ? response : text;
    let body = null;
    try {
      body = JSON.parse(text);
    } catch {
      /* a proxy may say what it likes */
    }
    if (response.status === 401) await askForKey(key, body?.detail);
    else if (AWAY.includes(response.status) && !once)
      await away(body?.detail || "The server is not ready.", options.signal);
    else if (response.status === 429 && !once && !options.method)
      await pause((Number(response.headers.get("Retry-After")) || 1) * 1000, options.signal);
    else throw new Problem(response.status, body);
  }
}

export const get = async (path, signal) => parse(await send(path, { signal }));

export async function post(path, body, options = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const text = await send(path, {
    method: "POST",
    once: true,
    ...options,
    body: body === undefined ? undefined : JSON.stringify(body),
    headers: { ...headers, ...options.headers },
  });
  return parse(text);
}

/** A key under which a request may be sent again. (`crypto.randomUUID` is not there on plain http.) */
export const idempotencyKey = () => ({
  "Idempotency-Key": Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join(""),
});

/** `promise`, or the reason why `signal` was aborted before; a view that is there for hours leaves no listeners behind. */
function unlessAborted(promise, signal) {
  let stop;
  const aborted = new Promise((_, fail) => {
    signal?.throwIfAborted();
    stop = () => fail(signal.reason);
    signal?.addEventListener("abort", stop);
  });
  return Promise.race([promise, aborted]).finally(() => signal?.removeEventListener("abort", stop));
}

export const pause = (ms, signal) => unlessAborted(new Promise((done) => setTimeout(done, ms)), signal);

let return_ = null;

/** Wait until the server answers again, and say so meanwhile. */
async function away(why, signal) {
  return_ ??= lookOut(why);
  await unlessAborted(return_, signal);
}

async function lookOut(why) {
  const banner = document.getElementById("away");
  fill(banner, `${why} This page continues by itself when the server is back.`).hidden = false;
  for (let wait = 250; ; wait = Math.min(wait * 2, 4000)) {
    await pause(wait);
    try {
      const { status } = await fetch(url("readyz"), { cache: "no-store" });
      if (!AWAY.includes(status)) break;
    } catch {
      /* still away */
    }
  }
  banner.hidden = true;
  return_ = null;
  say("The server is back.");
}

let asking = null;

/** Ask for a key once, however many requests need one. One that was replaced meanwhile is not asked for again. */
function askForKey(refused, why) {
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

/** Server-sent events of `path`, until its last one. `EventSource` cannot send a key.
 *
 * A hidden tab lets go of its connection, for a browser has only six of them, and goes on after what it knows. */
export async function* events(path, signal) {
  let lastId = null;
  for (;;) {
    await visible(signal);
    const connection = new AbortController(),
      stop = () => connection.abort();
    const hide = () => document.hidden && stop();
    signal.addEventListener("abort", stop, { once: true });
    document.addEventListener("visibilitychange", hide);
    try {
      const headers = { Accept: "text/event-stream", ...(lastId === null ? {} : { "Last-Event-ID": lastId }) };
      const response = await send(path, { headers, signal: connection.signal, isStream: true });
      if (response.status === 204) return;
      for await (const event of eventsOf(response.body)) {
        lastId = event.id ?? lastId;
        yield event;
        if (/\.(completed|failed|cancelled)$/.test(event.name) && !event.name.startsWith("step")) return;
      }
    } catch (error) {
      if (signal.aborted || error instanceof Problem) throw error;
    } finally {
      connection.abort();
      signal.removeEventListener("abort", stop);
      document.removeEventListener("visibilitychange", hide);
    }
    await pause(500, signal);
  }
}

async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { id: null, name: "message", data: "" };
      for (const line of block.split("\n")) {
        const [, field, text] = /^(\w*):? ?(.*)$/.exec(line) || [];
        if (field === "id") event.id = text;
        else if (field === "event") event.name = text;
        else if (field === "data") event.data += text;
      }
      if (event.data) yield { ...event, data: parse(event.data) };
    }
  }
}

export const visible = (signal) =>
  unlessAborted(
    new Promise((done) => {
      if (!document.hidden) return done();
      document.addEventListener("visibilitychange", () => done(), { once: true, signal });
    }),
    signal,
  );

/** Call `look` now and every so often, as long as the view is there and the tab can be seen. */
export async function every(ms, look, signal) {
  for (;;) {
    await visible(signal);
    await look();
    await pause(ms, signal);
  }
}

export function saveAs(href, name) {
  const link = h("a", { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // a page that came over plain http has no clipboard
    const area = h("textarea", { value: text, "aria-label": what });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  say(`${what} copied.`);
}

// --- The shell -------------------------------------------------------------------------------------------------------

let saying;

/** Tell what happened, to the eye and to a screen reader. */
export function say(text) {
  clearTimeout(saying);
  fill(document.getElementById("said"), text);
  saying = setTimeout(() => fill(document.getElementById("said")), 6000);
}

/** What went wrong, and what to do about it. */
export function problem(error, again) {
  const gone = error.status === 404;
  return h(
    "div",
    { class: "problem", role: "alert" },
    h("h2", {}, gone ? "This no longer exists" : error.title || "Something went wrong"),
    h("p", {}, error.message),
    gone && h("p", {}, "It was deleted, or the link is incomplete, or it belongs to someone else."),
    error.errors?.length > 0 &&
      h(
        "ul",
        {},
        error.errors.map((each) => h("li", {}, each.line ? `Line ${each.line}: ` : "", each.detail)),
      ),
    error.requestId && h("p", { class: "quiet" }, "Request ", h("code", {}, error.requestId)),
    again && h("p", {}, button("Try again", again)),
  );
}

/** Do what a button says, once, and tell what became of it. */
export const doing = (work) => async (event) => {
  const pressed = event.currentTarget;
  pressed.disabled = true;
  try {
    await work(event);
  } catch (error) {
    if (error.name !== "AbortError") say(error.message);
  }
  pressed.disabled = false;
  if (document.activeElement === document.body) pressed.focus(); // what is disabled loses the focus
};

/** The way to a view: `#/runs?status=failed`. What is empty is left out. */
export function link(path, params = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value)).toString();
  return `#/${path}${query && `?${query}`}`;
}

/** The address of the view. A link changes `location.hash` at once, but its event comes later: in between, a timer or an
 * answer of the old view must not write over the new address. */
let shown = "";

export function go(path, params) {
  if (location.hash === shown) location.hash = link(path, params);
}

/** Keep in the address what a view shows, so that a reload or a link shows the same. */
export function keep(path, params) {
  if (location.hash !== shown) return;
  history.replaceState(history.state, "", link(path, params));
  shown = location.hash;
}

export const title = (text, ...beside) => h("div", { class: "title" }, h("h1", { tabindex: "-1" }, text), beside);

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
  shown = location.hash;
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

function showKey() {
  document.getElementById("forget").hidden = !hasKey();
}

const theme = document.getElementById("theme");
const setTheme = () => {
  document.documentElement.dataset.theme = theme.value = local.get("theme") || "";
};
theme.addEventListener("change", () => {
  local.set("theme", theme.value);
  setTheme();
});
/** Also drafts and the chosen file. */
function forget() {
  for (const storage of [sessionStorage, localStorage])
    for (const name of Object.keys(storage)) if (name.startsWith(`${OURS}:`)) storage.removeItem(name);
  return indexedDB.deleteDatabase(OURS);
}
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
