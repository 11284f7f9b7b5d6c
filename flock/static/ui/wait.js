// Waits that end when the view is closed.

/** Await `promise`, or throw if `signal` is aborted first. Removes its listener: a view can stay open for hours. */
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

export function everySecond(work, signal) {
  const clock = setInterval(work, 1000);
  signal.addEventListener("abort", () => clearInterval(clock));
}

/** Call `work` now and then every `ms`, while the view is open and the tab is visible. */
export async function every(ms, work, signal) {
  for (;;) {
    await visible(signal);
    await work();
    await pause(ms, signal);
  }
}
