// Rows on their way to the server, to be checked or to start a batch.

import { send } from "./api.js";
import { parse } from "./json.js";

export const MEDIA_TYPES = { csv: "text/csv", ndjson: "application/x-ndjson" };
/** How much of the rows is sent to learn their columns and to show the first of them. */
const HEAD_BYTES = 64 * 1024;

/** What a file or a text seems to be: `{kind: "csv", delimiter}` or `{kind: "ndjson"}`. */
export async function formatOf(blob) {
  const head = (await blob.slice(0, HEAD_BYTES).text()).replace(/^\ufeff/, "");
  if (/\.(ndjson|jsonl)$/i.test(blob.name ?? "") || head.trimStart().startsWith("{")) return { kind: "ndjson" };
  const line = head.split(/[\r\n]/, 1)[0].replace(/"[^"]*"/g, "");
  const often = [",", ";", "\t", "|"].map((delimiter) => [line.split(delimiter).length, delimiter]);
  return { kind: "csv", delimiter: often.reduce((best, each) => (each[0] > best[0] ? each : best))[1] };
}

/** The first lines, or all of a short one. */
export async function headOf(blob) {
  if (blob.size <= HEAD_BYTES) return blob;
  const text = await blob.slice(0, HEAD_BYTES).text();
  return new Blob([text.slice(0, Math.max(text.lastIndexOf("\n"), text.lastIndexOf("\r")) + 1)]);
}

/** The text of the answer to `rows`. `onProgress` is called with the number of bytes that are sent. */
export const sendRows = (rows, format, options, { headers, onProgress = () => {}, ...more }) =>
  send(`run/batch?${new URLSearchParams(options)}`, {
    method: "POST",
    body: rows,
    by: fetchWithProgress(onProgress),
    headers: { "Content-Type": MEDIA_TYPES[format.kind], ...headers },
    ...more,
  });

/** What a batch of these rows would be refused for; nothing is kept. Numbers in its rows are as they are written. */
export async function checkRows(rows, format, options, more) {
  const text = await sendRows(rows, format, { ...options, dry_run: true }, { ...more, isSafe: true });
  more.signal.throwIfAborted(); // an answer that came too late
  return { ...JSON.parse(text), rows: parse(text, () => true).rows };
}

/** As `fetch`, which cannot report how much of a body has been sent. */
const fetchWithProgress =
  (onProgress) =>
  (address, { method, headers, body, signal }) =>
    new Promise((done, fail) => {
      signal.throwIfAborted();
      const request = new XMLHttpRequest();
      request.open(method, address);
      for (const [name, value] of Object.entries(headers)) request.setRequestHeader(name, value);
      request.upload.onprogress = ({ loaded }) => onProgress(loaded);
      request.onload = () =>
        done(
          new Response(request.responseText, {
            status: request.status,
            headers: { "Retry-After": request.getResponseHeader("Retry-After") ?? "" },
          }),
        );
      request.onerror = () => whyBroken(body).then(fail);
      request.onabort = () => fail(new DOMException("It was stopped.", "AbortError"));
      signal.addEventListener("abort", () => request.abort(), { once: true });
      request.send(body);
    });

/** A file that was saved again since it was chosen cannot be read, which looks like a broken connection. */
const whyBroken = (body) =>
  body
    .slice(0, 1)
    .arrayBuffer()
    .then(
      () => new TypeError("The connection broke."),
      () => Object.assign(new Error("The file has changed or is gone. Choose it again."), { isFinal: true }),
    );
