// `examples/typescript/flock-stream.ts` behind a proxy that refuses requests and cuts responses.

import assert from "node:assert";
import { getEventListeners } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { text as textOf } from "node:stream/consumers";
import { Refused, type RunEvent, type Server, Text, events, submit } from "./flock-stream.js";

const [target = ""] = process.argv.slice(2);
/** What happens to the next requests: they are refused, or the response is cut after some bytes. */
const faults: ({ status: number; retryAfter?: string; type?: string } | { cutAfter: number })[] = [];
let seen: { lastId: number; key: unknown; at: number }[] = [];
const proxy = createServer(async (request, response) => {
  const { "last-event-id": lastId, "idempotency-key": key, accept = "*/*", "content-type": type } = request.headers;
  seen.push({ lastId: Number(lastId), key, at: performance.now() });
  const fault = faults.shift();
  const body = await textOf(request);
  if (fault && "status" in fault) {
    const headers = fault.retryAfter ? { "Retry-After": fault.retryAfter } : {};
    return response.writeHead(fault.status, headers).end(fault.type ? JSON.stringify({ type: fault.type }) : "<html>");
  }
  const headers = {
    accept,
    ...(type && { "content-type": type }),
    ...(key && { "idempotency-key": String(key) }),
    ...(lastId && { "last-event-id": String(lastId) }),
  };
  const init = request.method === "POST" ? { method: "POST", headers, body } : { headers };
  const stop = new AbortController();
  response.on("close", () => stop.abort());
  try {
    const answer = await fetch(target + request.url, { ...init, signal: stop.signal });
    let left = fault ? fault.cutAfter : Infinity;
    response.writeHead(answer.status);
    if (answer.body)
      for await (const piece of answer.body as unknown as AsyncIterable<Uint8Array>) {
        if (piece.length > left) return response.write(piece.subarray(0, left), () => response.destroy());
        left -= piece.length;
        response.write(piece);
      }
    return response.end();
  } catch {
    return response.destroy(); // the client has left
  }
}).listen(0, "127.0.0.1");
await new Promise((done) => proxy.once("listening", done));
const url = `http://127.0.0.1:${(proxy.address() as AddressInfo).port}`;
const server: Server = { url };
const of = (agent_name: string) => ({ agent_name, inputs: agent_name === "nap" ? { text: "tea" } : { topic: "tea" } });
const status = async (run_id: string) => ((await (await fetch(`${target}/run/${run_id}`)).json()) as { status: string }).status;

// A server that is full for a second, and a lost response: one run.
faults.push({ status: 503, retryAfter: "1" }, { cutAfter: 10 });
const run = await submit(server, of("write"), "once");
assert.deepEqual(seen.map(({ key }) => key), ["once", "once", "once"]);
assert(seen[1]!.at - seen[0]!.at >= 990, "Retry-After counts");
assert.equal(((await (await fetch(`${target}/runs`)).json()) as { runs: unknown[] }).runs.length, 1);

// Connections that break, between events and within one, and a proxy whose server is away: each event once.
while ((await status(run.run_id)) !== "completed");
const isStored = (event: RunEvent) => "id" in event;
const whole: RunEvent[] = [];
for await (const event of events(server, run.run_id)) if (isStored(event)) whole.push(event);
assert.deepEqual([whole[0]?.event, whole.at(-1)?.event], ["run.started", "run.completed"]);
for (const cutAfter of [0, 1, 100, 200, 300, 400, 500]) {
  seen = [];
  faults.push({ cutAfter }, { status: 502 }, { cutAfter: cutAfter + 50 });
  const found: RunEvent[] = [];
  const text = new Text("result");
  let shown = "";
  for await (const event of events(server, run.run_id)) {
    if (isStored(event)) found.push(event);
    const { added, isReset } = text.add(event);
    shown = isReset ? added : shown + added;
  }
  assert.deepEqual(found, whole);
  assert.equal(shown, "All about tea");
  assert(seen.every(({ lastId }, at) => at === 0 || lastId >= seen[at - 1]!.lastId));
}
assert(seen.at(-1)!.lastId > 0, "it resumes after the last event");
const last = whole.at(-1);
for await (const event of events(server, run.run_id, Number(last && "id" in last && last.id))) assert.fail(event.event);

// The pauses grow.
seen = [];
faults.push(...Array.from({ length: 4 }, () => ({ status: 502 })));
for await (const _ of events(server, run.run_id));
const pauses = seen.slice(1).map(({ at }, index) => at - seen[index]!.at);
assert(pauses.every((pause, at) => pause >= 95 * 2 ** at), String(pauses));

// A text that is taken back.
const changes: { added: string; isReset: boolean }[] = [];
const text = new Text("result");
for await (const event of events(server, (await submit(server, of("replaced"), "replaced")).run_id)) changes.push(text.add(event));
assert.deepEqual(changes.filter(({ added }) => added), [
  { added: "The first", isReset: false },
  { added: "Another one", isReset: true },
]);

// An abort ends the wait for an event, and a pause; the run continues.
for (const refusals of [[], [{ status: 503, retryAfter: "600" }]]) {
  const nap = await submit(server, of("nap"), `nap-${refusals.length}`);
  while ((await status(nap.run_id)) !== "running");
  seen = [];
  faults.push(...refusals);
  const stop = new AbortController();
  const follow = async () => {
    for await (const { event } of events({ url, signal: stop.signal }, nap.run_id)) if (event === "step.started") stop.abort();
  };
  const stopped = assert.rejects(follow(), { name: "AbortError" });
  while (!seen.length) await new Promise((done) => setTimeout(done, 5));
  if (refusals.length) setTimeout(() => stop.abort(), 50);
  await stopped;
  assert.equal(await status(nap.run_id), "running");
  await fetch(`${target}/run/${nap.run_id}/cancel`, { method: "POST" });
}

// A key whose first request is still being accepted is tried again, but not another conflict, nor a URL that is none.
const inUse = { status: 409, type: "urn:flockapi:problem:idempotency-key-in-use" };
seen = [];
faults.push(inUse, inUse);
await submit(server, of("write"), "in-use");
assert.deepEqual(seen.map(({ key }) => key), ["in-use", "in-use", "in-use"]);
faults.push({ status: 409, type: "urn:flockapi:problem:conflict" });
await assert.rejects(submit(server, of("write"), "conflict"), { status: 409 });
await assert.rejects(submit({ url: "http://[" }, of("write"), "no-url"), TypeError);
await assert.rejects(events({ url: "here" }, "no-run").next(), TypeError);

// A pause leaves no listener.
const waiting = new AbortController().signal;
faults.push({ status: 502 }, { status: 502 });
await submit({ url, signal: waiting }, of("write"), "listeners");
assert.equal(getEventListeners(waiting, "abort").length, 0);

// What is refused for good is not repeated.
seen = [];
const isUnknown = (error: unknown) => error instanceof Refused && error.status === 404 && /wrote/.test(error.message);
await assert.rejects(submit(server, of("wrote"), "wrote"), isUnknown);
assert.equal(seen.length, 1);
console.log("all of it");
process.exit();
