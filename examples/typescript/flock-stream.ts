// Runs and their events over broken connections and restarts of the server. `schema.d.ts` is generated: see README.md.
import type { components } from "./schema.js";
type Schemas = components["schemas"];
export type Run = Schemas["FlockAPIResponse"];
export type RunEvent = Schemas["RunEvent"];
/** `signal` ends the waiting. Until then, requests are repeated while the server cannot be reached or is full. */
export type Server = { url: string; apiKey?: string | undefined; signal?: AbortSignal };
const [FIRST_PAUSE_MS, MAX_PAUSE_MS, NEVER] = [200, 5_000, new AbortController().signal];
/** The server sends a comment every 15 seconds, so a connection that is silent for longer is broken. */
const SILENCE_MS = 45_000;

export class Refused extends Error {
  constructor(readonly status: number, readonly problem: Schemas["Problem"] | null, readonly retryAfterMs: number) {
    super(problem?.detail ?? `The server responded with status ${status}.`);
  }
}

/** Start a run, and return it at once. The same key and request return the same run, also after a lost response. */
export async function submit(server: Server, request: Schemas["FlockAPIRequest"], idempotencyKey: string) {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": idempotencyKey };
  const init = { method: "POST", headers, body: JSON.stringify({ ...request, async_run: true }) };
  for (let pauseMs = FIRST_PAUSE_MS; ; pauseMs *= 2)
    try {
      return (await (await send(server, "/run/flock", AbortSignal.timeout(SILENCE_MS), init)).json()) as Run;
    } catch (error) {
      await pauseAfter(error, pauseMs, server);
    }
}

/** Yield the events of a run until its end: all, or those that follow the event with the id `after`. */
export async function* events(server: Server, runId: string, after = 0): AsyncGenerator<RunEvent, void, undefined> {
  for (let pauseMs = FIRST_PAUSE_MS; ; pauseMs *= 2) {
    const connection = new AbortController();
    const watch = () => setTimeout(() => connection.abort(), SILENCE_MS);
    let timer = watch();
    try {
      const headers = { Accept: "text/event-stream", "Last-Event-ID": String(after) };
      const response = await send(server, `/run/${runId}/events`, connection.signal, { headers });
      if (response.status === 204 || !response.body) return; // the run has ended, and all its events are known
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", piece; !(piece = await reader.read()).done; timer = watch()) {
        clearTimeout(timer);
        const blocks = (rest + piece.value).split("\n\n");
        rest = blocks.pop() ?? "";
        for (const block of blocks) {
          const { id, event, data } = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/)));
          if (!event) continue; // a comment
          yield { ...(id && { id: Number(id) }), event, data: JSON.parse(data) } as RunEvent;
          if (/^run\.(completed|failed|cancelled)$/.test(event)) return;
          [after, pauseMs] = [id ? Number(id) : after, FIRST_PAUSE_MS];
        }
      }
      throw new Error("The stream has ended early.");
    } catch (error) {
      await pauseAfter(error, pauseMs, server);
    } finally {
      (clearTimeout(timer), connection.abort());
    }
  }
}

async function send({ url, apiKey, signal = NEVER }: Server, path: string, other: AbortSignal, init: RequestInit) {
  const headers = { ...init.headers, ...(apiKey && { Authorization: `Bearer ${apiKey}` }) };
  const response = await fetch(url + path, { ...init, headers, signal: AbortSignal.any([signal, other]) });
  if (response.ok) return response;
  const retryAfterMs = 1000 * (Number(response.headers.get("Retry-After")) || 0);
  throw new Refused(response.status, await response.json().catch(() => null), retryAfterMs);
}

async function pauseAfter(error: unknown, pauseMs: number, { url, signal }: Server) {
  new Request(url); // throws if it is not valid
  const refused = error instanceof Refused ? error : undefined;
  const isInUse = refused?.problem?.type === "urn:flockapi:problem:idempotency-key-in-use" && pauseMs < 60_000;
  if (signal?.aborted || (refused && !isInUse && ![408, 429, 502, 503, 504].includes(refused.status))) throw error;
  const chosenMs = Math.min(pauseMs, MAX_PAUSE_MS) * (0.5 + Math.random() / 2); // clients do not return all at once
  await new Promise((done) => {
    const end = () => (clearTimeout(timer), signal?.removeEventListener("abort", end), done(null));
    const timer = setTimeout(end, Math.max(chosenMs, refused?.retryAfterMs ?? 0));
    signal?.addEventListener("abort", end);
  });
}

/** One text of the output of a run, while it is written. */
export class Text {
  constructor(private readonly field: string, private text = "", private shown = "") {}

  /** Apply an event. Return what to append to the text that is shown, and whether to remove that text first. */
  add({ event, data }: RunEvent): { added: string; isReset: boolean } {
    if (event === "step.started" || (event === "output.reset" && !("call_id" in data))) this.text = "";
    else if (event === "output.snapshot" && !("call_id" in data)) this.text = String(data.output[this.field] ?? "");
    else if (event === "step.completed") this.text = String(data.result[this.field] ?? "");
    else if (event === "output.delta" && !data.call_id && data.field === this.field) this.text += data.text;
    const { text, shown } = this;
    // After a reset the same text is often written again, so what is shown stays until the new text differs.
    if (shown.startsWith(text) && event !== "step.completed") return { added: "", isReset: false };
    this.shown = text;
    const isReset = !text.startsWith(shown);
    return { added: isReset ? text : text.slice(shown.length), isReset };
  }
}
