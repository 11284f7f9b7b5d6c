// Server-sent events of a run or a batch.

import { Problem, send } from "./api.js";
import { parse } from "./json.js";
import { pause, visible } from "./wait.js";

const LAST = /^(run|batch)\.(completed|failed|cancelled)$/;

/** Yield the server-sent events of `path` up to the last one. (`EventSource` cannot send a key.)
 *
 * A hidden tab closes its connection, because a browser has only six per host. It resumes after the last event. */
export async function* events(path, signal) {
  let lastId = null;
  for (;;) {
    await visible(signal);
    const connection = new AbortController(),
      hide = () => document.hidden && connection.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const headers = { Accept: "text/event-stream", ...(lastId === null ? {} : { "Last-Event-ID": lastId }) };
      const response = await send(path, {
        headers,
        signal: AbortSignal.any([signal, connection.signal]),
        isStream: true,
      });
      if (response.status === 204) return;
      yield { name: "open", data: {} };
      for await (const event of eventsOf(response.body)) {
        lastId = event.id ?? lastId;
        yield event;
        if (LAST.test(event.name)) return;
      }
    } catch (error) {
      if (signal.aborted || error instanceof Problem) throw error;
    } finally {
      connection.abort();
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
