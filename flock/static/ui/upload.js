// Uploads of rows, to check them or to start a batch.

import { send } from "./api.js";
import { parse } from "./json.js";

export const MEDIA_TYPES = {
  csv: "text/csv",
  ndjson: "application/x-ndjson",
  json: "application/json",
  xlsx: "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
  parquet: "application/vnd.apache.parquet",
};
/** Only these can be cut to their first rows, and are read here. */
export const isLines = ({ kind }) => kind === "csv" || kind === "ndjson";
/** The part of the rows that is sent to find the columns and to show the first rows. */
const HEAD_BYTES = 64 * 1024;

const textOfHead = async (blob, encoding) =>
  new TextDecoder(encoding).decode(await blob.slice(0, HEAD_BYTES).arrayBuffer());

/** Guess the format of a file or text, such as `{kind: "csv", delimiter}`. */
export async function formatOf(blob, encoding) {
  const kind = /\.(xlsx|parquet|ndjson)$/i.exec(blob.name)?.[1].toLowerCase();
  if (kind) return { kind };
  const head = (await textOfHead(blob, encoding)).trimStart();
  if (/^\[\s*[{\]]/.test(head)) return { kind: "json" };
  if (head.startsWith("{")) return { kind: "ndjson" };
  const line = head.split(/[\r\n]/, 1)[0].replace(/"[^"]*"/g, "");
  const counts = [",", ";", "\t", "|"].map((delimiter) => [line.split(delimiter).length, delimiter]);
  return { kind: "csv", delimiter: counts.reduce((best, each) => (each[0] > best[0] ? each : best))[1] };
}

/** Return the first rows, a text in UTF-8. */
export async function headOf(blob, format) {
  const { encoding } = format,
    isWhole = blob.size <= HEAD_BYTES;
  if (!isLines(format) || (isWhole && encoding === "utf-8")) return blob;
  const text = await textOfHead(blob, encoding);
  if (isWhole) return new Blob([text]);
  return new Blob([text.slice(0, Math.max(text.lastIndexOf("\n"), text.lastIndexOf("\r")) + 1)]);
}

/** Send the rows and return the text of the response. `onProgress` is called with the number of bytes sent. */
export const sendRows = (rows, format, options, { headers, onProgress = () => {}, ...more }) =>
  send(`run/batch?${new URLSearchParams(options)}`, {
    method: "POST",
    body: rows,
    transport: fetchWithProgress(onProgress),
    headers: { "Content-Type": MEDIA_TYPES[format.kind], ...headers },
    ...more,
  });

/** Check the rows with a dry run. Numbers in the returned rows are kept as they are written. */
export async function checkRows(rows, format, options, more) {
  const text = await sendRows(rows, format, { ...options, dry_run: true }, { ...more, isSafe: true });
  more.signal.throwIfAborted(); // the response came too late
  return { ...JSON.parse(text), rows: parse(text, () => true).rows };
}

/** A replacement for `fetch`, which cannot report upload progress. */
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
      request.onerror = () => uploadError(body).then(fail);
      request.onabort = () => fail(new DOMException("The upload was cancelled.", "AbortError"));
      signal.addEventListener("abort", () => request.abort(), { once: true });
      request.send(body);
    });

/** Return the cause of a failed upload. A file that was changed since it was selected cannot be read any more. */
const uploadError = (body) =>
  body
    .slice(0, 1)
    .arrayBuffer()
    .then(
      () => new TypeError("The connection failed."),
      () => Object.assign(new Error("The file was changed or deleted. Choose it again."), { isFinal: true }),
    );
