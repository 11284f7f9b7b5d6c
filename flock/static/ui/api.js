// Requests to the API.

import { url } from "./address.js";
import { fill } from "./dom.js";
import { parse } from "./json.js";
import { askForKey, authorization } from "./key.js";
import { say } from "./notices.js";
import { session } from "./storage.js";
import { pause, unlessAborted } from "./wait.js";

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

const AWAY = [502, 503, 504];

/** The text of the answer to a request, or all of the answer with `isStream`. A key, a server that is away, and one that
 * is busy for a request without effects (`isSafe`) are waited for. With `once`, a request that may not be sent twice fails
 * if it may or may not have arrived. */
export async function send(path, { once, isStream, isSafe, headers, by = fetch, ...options } = {}) {
  for (;;) {
    const key = session.get("key");
    let response, text;
    try {
      response = await by(url(path), { ...options, cache: "no-store", headers: { ...headers, ...authorization() } });
      if (!isStream || !response.ok) text = await response.text();
    } catch (error) {
      if (options.signal?.aborted || error.isFinal) throw error;
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
    if (response.status === 401) await askForKey(key);
    else if (AWAY.includes(response.status) && !once)
      await away(body?.detail || "The server is not ready.", options.signal);
    else if (response.status === 429 && !once && (isSafe || !options.method))
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

let return_ = null;

/** Wait until the server answers again, and say so meanwhile. */
export async function away(why, signal) {
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
