// JSON as the API writes it.

/** JSON, with integers that JavaScript would round kept as they were written, where the browser can. */
export function parse(text) {
  if (!JSON.rawJSON || !/\d{16}/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" &&
    Number.isInteger(value) &&
    !Number.isSafeInteger(value) &&
    /^-?\d+$/.test(context.source)
      ? JSON.rawJSON(context.source)
      : value,
  );
}

/** Whether `parse` kept a value as it was written; it holds its digits in `rawJSON`. */
export const isExact = (value) => Boolean(JSON.isRawJSON?.(value));

export const pretty = (value) => JSON.stringify(value, null, 2);
