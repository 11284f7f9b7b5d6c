// JSON without loss of digits.

const isRounded = (value, source) => Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(source);

/** Parse JSON. If the browser can, keep numbers as they are written: integers that JavaScript would round, or numbers
 * that `isKept` selects by value and text. */
export function parse(text, isKept = isRounded) {
  if (!JSON.rawJSON || (isKept === isRounded && !/\d{16}/.test(text))) return JSON.parse(text);
  return JSON.parse(text, (_, value, { source }) =>
    typeof value === "number" && isKept(value, source) ? JSON.rawJSON(source) : value,
  );
}

/** Whether `parse` kept a number as it is written. Its digits are in `rawJSON`. */
export const isExact = (value) => Boolean(JSON.isRawJSON?.(value));

export const isObject = (value) =>
  value !== null && typeof value === "object" && !Array.isArray(value) && !isExact(value);

/** Whether a value is what a run has in place of the content of a file. */
export const isFile = (value) =>
  isObject(value) &&
  ["file_id", "media_type", "name"].every((name) => typeof value[name] === "string") &&
  /^[0-9a-f]{64}$/.test(value.file_id) &&
  (isExact(value.size) || Number.isFinite(value.size));

/** A value as a short text: strings without quotes, and the names of files. */
export function textOf(value) {
  if (typeof value === "string") return value;
  if (isFile(value) && value.name) return value.name;
  if (Array.isArray(value) && value.length && value.every(isFile)) return value.map(textOf).join(", ");
  return JSON.stringify(value) ?? "";
}

export const pretty = (value) => JSON.stringify(value, null, 2);
