// Waiting that ends with the view.

/** `promise`, or the reason why `signal` was aborted before; a view that is there for hours leaves no listeners behind. */
export function unlessAborted(promise, signal) {
  let stop;
  const aborted = new Promise((_, fail) => {
    signal?.throwIfAborted();
    stop = () => fail(signal.reason);
    signal?.addEventListener("abort", stop);
  });
  return Promise.race([promise, aborted]).finally(() => signal?.removeEventListener("abort", stop));
}

export const pause = (ms, signal) => unlessAborted(new Promise((done) => setTimeout(done, ms)), signal);

export const visible = (signal) =>
  unlessAborted(
    new Promise((done) => {
      if (!document.hidden) return done();
      document.addEventListener("visibilitychange", () => done(), { once: true, signal });
    }),
    signal,
  );

/** Call `look` now and every so often, as long as the view is there and the tab can be seen. */
export async function every(ms, look, signal) {
  for (;;) {
    await visible(signal);
    await look();
    await pause(ms, signal);
  }
}
