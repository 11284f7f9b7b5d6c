// The same request as a shell command.

import { url } from "./address.js";
import { hasKey } from "./key.js";
import { copy } from "./notices.js";

export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Copy a command that sends `data`, an option of curl. It reads the key from a variable, to keep it out of the clipboard. */
export function copyCurl(path, mediaType, data) {
  const key = hasKey() ? ' -H "Authorization: Bearer $FLOCK_API_KEY"' : "";
  return copy(`curl -X POST ${quoted(String(url(path)))} -H 'Content-Type: ${mediaType}'${key} ${data}`, "Command");
}
