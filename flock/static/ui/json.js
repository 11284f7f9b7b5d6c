// JSON as the API writes it.

const isRounded = (value, source) => Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(source);

/** JSON, with numbers kept as they were written where the browser can: integers that JavaScript would round, or those
 * that `isKept` chooses by value and text. */
export function parse(text, isKept = isRounded) {
  if (!JSON.rawJSON || (isKept === isRounded && !/\d{16}/.test(text))) return JSON.parse(text);
  return JSON.parse(text, (_, value, { source }) =>
    typeof value === "number" && isKept(value, source) ? JSON.rawJSON(source) : value,
  );
}

/** Whether `parse` kept a value as it was written; it holds its digits in `rawJSON`. */
export const isExact = (value) => Boolean(JSON.isRawJSON?.(value));

export const pretty = (value) => JSON.stringify(value, null, 2);
