// Requests to the API.

import { url } from "./address.js";
import { fill } from "./dom.js";
import { parse } from "./json.js";
import { askForKey, authorization } from "./key.js";
import { notify } from "./notices.js";
import { session } from "./storage.js";
import { pause, unlessAborted } from "./wait.js";

export class Problem extends Error {
  constructor(status, body) {
    super(body?.detail || `The server responded with status ${status}.`);
    Object.assign(this, {
      status,
      title: body?.title || "Error",
      errors: body?.errors || [],
      requestId: body?.request_id,
    });
  }
}

const UNAVAILABLE = [502, 503, 504];
/** An earlier request with this `Idempotency-Key` is not accepted yet. */
const KEY_IN_USE = "urn:flockapi:problem:idempotency-key-in-use";

/** Send a request and return the text of the response, or the response itself with `isStream`.
 *
 * Asks for a key if the server requires one. With `canRetry`, retries until the server is reachable and available, and
 * while a request with the same key is being accepted. A GET request, or one with `isSafe` (no side effects), is also
 * retried after 429. */
export async function send(path, { canRetry = true, isStream, isSafe, headers, transport = fetch, ...options } = {}) {
  for (;;) {
    const key = session.get("key");
    let response, text;
    try {
      const allHeaders = { ...headers, ...authorization() };
      response = await transport(url(path), { ...options, cache: "no-store", headers: allHeaders });
      if (!isStream || !response.ok) text = await response.text();
    } catch (error) {
      if (options.signal?.aborted || error.isFinal) throw error;
      if (!canRetry)
        throw new Error("The server cannot be reached. It may have received this request. Check before you try again.");
      await waitForServer("The server cannot be reached.", options.signal);
      continue;
    }
    if (response.ok) return isStream ? response : text;
    let body = null;
    try {
      body = JSON.parse(text);
    } catch {
      /* a proxy may send anything */
    }
    if (response.status === 401) await askForKey(key);
    else if (UNAVAILABLE.includes(response.status) && canRetry)
      await waitForServer(body?.detail || "The server is not ready.", options.signal);
    else if (canRetry && ((response.status === 429 && (isSafe || !options.method)) || body?.type === KEY_IN_USE))
      await pause((Number(response.headers.get("Retry-After")) || 1) * 1000, options.signal);
    else throw new Problem(response.status, body);
  }
}

export const get = async (path, signal) => parse(await send(path, { signal }));

export async function post(path, body, options = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  const text = await send(path, {
    method: "POST",
    canRetry: false,
    ...options,
    body: body === undefined ? undefined : JSON.stringify(body),
    headers: { ...headers, ...options.headers },
  });
  return parse(text);
}

/** A header that makes a request safe to retry. (`crypto.randomUUID` is unavailable on plain http.) */
export const idempotencyKey = () => ({
  "Idempotency-Key": Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) =>
    byte.toString(16).padStart(2, "0"),
  ).join(""),
});

let recovery = null;

export async function waitForServer(reason, signal) {
  recovery ??= pollServer(reason);
  await unlessAborted(recovery, signal);
}

async function pollServer(reason) {
  const banner = document.getElementById("unavailable");
  fill(banner, `${reason} This page continues when it is back.`).hidden = false;
  for (let wait = 250; ; wait = Math.min(wait * 2, 4000)) {
    await pause(wait);
    try {
      const { status } = await fetch(url("readyz"), { cache: "no-store" });
      if (!UNAVAILABLE.includes(status)) break;
    } catch {
      /* still unavailable */
    }
  }
  banner.hidden = true;
  recovery = null;
  notify("The server is back.");
}
