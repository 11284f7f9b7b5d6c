// The addresses of the API and of the views.

const HERE = new URL("..", import.meta.url);

export const url = (path) => new URL(path, HERE);

/** The way to a view: `#/runs?status=failed`. What is empty is left out. */
export function link(path, params = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value)).toString();
  return `#/${path}${query && `?${query}`}`;
}

/** The address of the view. A link changes `location.hash` at once, but its event comes later: in between, a timer or an
 * answer of the old view must not write over the new address. */
let shown = "";

/** Called when the view at the address is about to be shown. */
export const arrive = () => {
  shown = location.hash;
};

export function go(path, params) {
  if (location.hash === shown) location.hash = link(path, params);
}

/** Keep in the address what a view shows, so that a reload or a link shows the same. */
export function keep(path, params) {
  if (location.hash !== shown) return;
  history.replaceState(history.state, "", link(path, params));
  shown = location.hash;
}
