// The view of a run: live while it runs, then its result; and that of one of its questions.

import { go, link } from "./address.js";
import { get, post } from "./api.js";
import { showQuestion } from "./asked.js";
import { actions, button, fact, fill, h, wide } from "./dom.js";
import { events } from "./events.js";
import { busyWhile, notify } from "./notices.js";
import { questions } from "./question.js";
import { announcer, ended, failing, failure, heading, newer, spent } from "./record.js";
import { Steps } from "./steps.js";
import { session } from "./storage.js";
import { readable, result } from "./value.js";
import { everySecond } from "./wait.js";
import { between, count, duration, isFinal, when } from "./words.js";

const PROGRESS_EVERY_MS = 5000;

export async function show(main, { view, id, signal }) {
  if (view === "question") return showQuestion(main, id, signal);
  const path = `run/${encodeURIComponent(id)}`;
  let run = await get(path, signal),
    isStale = false; // the record may have more than the events
  const asked = questions(
    path,
    set,
    signal,
  );
  const head = heading(),
    live = announcer(PROGRESS_EVERY_MS),
    steps = new Steps(),
    took = h("span");
  const parts = {
    facts: h("dl.facts"),
    progress: h("div"),
    outcome: h("section"),
    inputs: h("section"),
  };
  main.append(
    head.node,
    parts.facts,
    live.node,
    parts.progress,
    asked.node,
    parts.outcome,
    h("section", h("h2", "Steps"), steps.node),
    parts.inputs,
  );
  function set(record) {
    run = newer(run, record);
    draw();
  }

  async function load() {
    isStale = false;
    set(await get(path, signal));
    steps.draw(run);
  }

  async function follow() {
    await load();
    while (!isFinal(run.status)) {
      for await (const event of events(`${path}/events`, signal)) on(event);
      await load();
    }
    live.say(`The run ${ended[run.status]}.`);
  }

  function on({ name, data }) {
    if (name === "open") steps.reconnect();
    else if (name === "run.started" && run.status === "starting") {
      set({ ...run, status: "running", started_at: data.started_at ?? run.started_at });
    } else if (name === "run.waiting") {
      set({ ...run, ...data, status: "waiting" });
      isStale = true;
      live.say("The run waits for an answer.");
    } else if (name === "run.progress") {
      run = { ...run, progress: data };
      progress();
      live.sayRarely(parts.progress.textContent);
    } else if (/^(step|call|output)\./.test(name)) {
      steps.on(name, data);
      if (name === "step.completed" || run.status === "waiting") isStale = true;
      if (name.startsWith("step."))
        live.say(`Step ${data.position + 1}: ${data.agent_name} is ${name === "step.started" ? "running" : "done"}.`);
    }
  }

  function draw() {
    head.draw(run, isFinal(run.status) ? run.status : "open", buttons);
    facts();
    asked.draw(run);
    progress();
    outcome();
  }

  function buttons() {
    const cancel = busyWhile(async () => {
      notify("Cancelling …");
      set(await post(`${path}/cancel`, undefined, { signal }));
    });
    const retry = busyWhile(async () => {
      run = await post(`${path}/retry`, undefined, { signal });
      start();
    });
    return [
      !isFinal(run.status) && button("Cancel", cancel),
      ["failed", "cancelled"].includes(run.status) && button("Retry", retry, { class: "primary" }),
      h("a.button", { href: link(`agent/${run.agent_name}`) }, "New run"),
    ];
  }

  function facts() {
    const to = (path, params, text) => h("a", { href: link(path, params) }, text);
    fill(
      parts.facts,
      fact("Submitted", when(run.created_at)),
      fact("Duration", took),
      run.attempt > 1 && fact("Attempt", run.attempt),
      spent(run),
      run.batch_id && fact("Batch", to(`batch/${run.batch_id}`, { row: run.position }, `row ${run.position + 1}`)),
      run.session_id && fact("Session", to("runs", { session_id: run.session_id }, run.session_id)),
      fact("Run", h("code", run.run_id)),
    );
    tick();
  }

  function tick() {
    fill(took, run.started_at ? duration(between(run.started_at, run.completed_at)) : "not started");
    steps.tick(run);
  }

  function progress() {
    if (isFinal(run.status) || run.status === "waiting") return fill(parts.progress);
    const { done, total, message } = run.progress ?? {};
    const words =
      done === undefined
        ? run.status === "starting"
          ? "Waiting to start"
          : "Running"
        : `${message ?? ""}${message ? ": " : ""}${count(done)}${total ? " of " + count(total) : ""}`;
    const bar = h("progress", total ? { max: total, value: Math.min(done, total) } : {});
    return fill(parts.progress, h("label", words, bar));
  }

  function outcome() {
    if (!isFinal(run.status)) return fill(parts.outcome);
    if (run.status === "completed")
      return fill(parts.outcome, h("h2", "Result"), result(run.result, `${run.run_id}.json`));
    const words = run.status === "failed" ? "The run failed" : "The run was cancelled";
    return fill(parts.outcome, failure(run, words));
  }

  async function inputs() {
    const found = await inputsOf(run, signal);
    if (!found) return;
    const use = () => {
      session.set(`draft ${run.agent_name}`, JSON.stringify(found));
      go(`agent/${run.agent_name}`);
    };
    fill(
      parts.inputs,
      h("h2", "Inputs"),
      wide("Inputs", readable(found)),
      actions(button("Use these inputs again", use)),
    );
  }

  function start() {
    steps.clear();
    follow().catch(failing(main, parts.outcome, start, signal));
  }

  draw();
  inputs().catch(() => {});
  start();
  everySecond(() => {
    if (isFinal(run.status)) return;
    tick();
    if (isStale) load().catch(() => {});
  }, signal);
}

/** Load the inputs from a list, because the response for a single run does not include them. */
async function inputsOf(run, signal) {
  if (run.batch_id) {
    const [item] = await get(`batch/${run.batch_id}/results?format=json&limit=1&after=${run.position - 1}`, signal);
    return item?.run_id === run.run_id ? item.inputs : null;
  }
  const at = parseInt(run.run_id.replace("-", "").slice(0, 12), 16), // lists are filtered by the time in an id
    time = (ms) => encodeURIComponent(new Date(at + ms).toISOString());
  const { runs } = await get(
    `runs?include=inputs&agent_name=${encodeURIComponent(run.agent_name)}&created_after=${time(-1)}&created_before=${time(1)}`,
    signal,
  );
  return runs.find(({ run_id }) => run_id === run.run_id)?.inputs;
}
