// Files for the user.

import { h } from "./dom.js";

export function saveAs(href, name) {
  const link = h("a", { href, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}

export function saveBlob(blob, name) {
  const href = URL.createObjectURL(blob);
  saveAs(href, name);
  setTimeout(() => URL.revokeObjectURL(href), 60_000);
}
