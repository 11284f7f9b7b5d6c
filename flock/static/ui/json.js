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

/** A value as a short text: strings without quotes. */
export const textOf = (value) => (typeof value === "string" ? value : (JSON.stringify(value) ?? ""));

export const pretty = (value) => JSON.stringify(value, null, 2);
