// The addresses of the API and of the views.

const HERE = new URL("..", import.meta.url);

export const url = (path) => new URL(path, HERE);

/** Return the link to a view, such as `#/runs?status=failed`. Empty parameters are omitted. */
export function link(path, params = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value)).toString();
  return `#/${path}${query && "?"}${query}`;
}

export const linkToQuestion = ({ run_id, call_id }) => link(`question/${run_id}/${encodeURIComponent(call_id)}`);

/** The hash of the current view. A link changes `location.hash` at once, but `hashchange` fires later. Until then, a
 * timer or a response of the old view must not overwrite the new address. */
let currentHash = "";
let leaving = new AbortController();

/** Begin a view, and return the signal of its end. */
export function enterView() {
  leaving.abort(new DOMException("This view was closed.", "AbortError"));
  leaving = new AbortController();
  currentHash = location.hash;
  return leaving.signal;
}

export const viewSignal = () => leaving.signal;

export function go(path, params) {
  if (location.hash === currentHash) location.hash = link(path, params);
}

/** Store the state of the view in the address, so that a reload or a link shows the same. */
export function updateAddress(path, params) {
  if (location.hash !== currentHash) return;
  history.replaceState(history.state, "", link(path, params));
  currentHash = location.hash;
}
