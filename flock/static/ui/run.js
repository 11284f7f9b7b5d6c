// The view of a run: live while it runs, then its result.

import { go, link } from "./address.js";
import { get, post } from "./api.js";
import { button, fill, h, title } from "./dom.js";
import { events } from "./events.js";
import { form, sending } from "./form.js";
import { busyWhile, copy, notify, problem } from "./notices.js";
import { session } from "./storage.js";
import { readable, result } from "./value.js";
import { badge, between, count, duration, ended, isFinal, when } from "./words.js";

/** The shortest time between two announcements of progress to a screen reader. */
const PROGRESS_EVERY_MS = 5000;

export async function show(main, { id, signal }) {
  const path = `run/${encodeURIComponent(id)}`;
  let run = await get(path, signal);
  const steps = new Map();
  const questions = new Map();
  let announcedAt = 0;
  const parts = {
    title: h("div"),
    facts: h("dl", { class: "facts" }),
    progress: h("div"),
    questions: h("div"),
    outcome: h("section"),
    steps: h("ol", { class: "steps", "aria-label": "Steps" }),
    inputs: h("section"),
  };
  const live = h("p", { role: "status", class: "visually-hidden" });
  main.append(
    parts.title,
    parts.facts,
    live,
    parts.progress,
    parts.questions,
    parts.outcome,
    h("section", {}, h("h2", {}, "Steps"), parts.steps),
    parts.inputs,
  );
  const clock = setInterval(() => {
    for (const step of steps.values()) if (!step.completed_at) tick(step);
    if (!isFinal(run.status)) facts();
  }, 1000);
  signal.addEventListener("abort", () => clearInterval(clock));

  const follow = async () => {
    run = await get(path, signal);
    head();
    outcome();
    run.steps.forEach((step, position) => setStep(position, step));
    while (!isFinal(run.status)) {
      for await (const event of events(`${path}/events`, signal)) on(event);
      run = await get(path, signal);
      run.steps.forEach((step, position) => setStep(position, step));
      for (const step of steps.values()) if (!step.completed_at) tick(step);
      head();
      outcome();
    }
    announce(`The run ${ended[run.status]}.`);
    if (!run.steps.length && !steps.size) fill(parts.steps, h("li", { class: "quiet" }, "No steps finished."));
  };

  function on({ name, data }) {
    if (name === "run.started") {
      run = { ...run, status: "running", started_at: data.started_at ?? run.started_at };
      head();
    } else if (name === "run.waiting") {
      run = { ...run, ...data, status: "waiting" };
      head();
      announce("The run waits for an answer.");
    } else if (name.startsWith("step.")) {
      setStep(data.position, data);
      announce(
        name === "step.started"
          ? `Step ${data.position + 1}: ${data.agent_name} is running.`
          : `Step ${data.position + 1}: ${data.agent_name} is done.`,
      );
    } else if (name === "run.progress") {
      run = { ...run, progress: data };
      progress();
      if (performance.now() - announcedAt > PROGRESS_EVERY_MS) announce(parts.progress.textContent);
    }
  }

  function announce(text) {
    announcedAt = performance.now();
    fill(live, text);
  }

  function head() {
    const retry = busyWhile(async () => {
      run = await post(`${path}/retry`, undefined, { signal });
      start();
    });
    const cancel = busyWhile(async () => {
      notify("Cancelling …");
      run = { ...(await post(`${path}/cancel`, undefined, { signal })) };
      head();
    });
    // Redraw the buttons only if they change, so that they keep the focus.
    const kind = isFinal(run.status) ? run.status : "open";
    if (parts.title.dataset.kind !== kind) {
      const hadFocus = parts.title.contains(document.activeElement);
      parts.title.dataset.kind = kind;
      fill(
        parts.title,
        title(
          run.agent_name,
          h("span", { id: "status" }),
          h(
            "p",
            { class: "actions" },
            kind === "open" && button("Cancel", cancel),
            ["failed", "cancelled"].includes(kind) && button("Retry", retry, { class: "primary" }),
            button("Copy link", () => copy(location.href, "Link")),
            h("a", { class: "button", href: link(`agent/${run.agent_name}`) }, "New run"),
          ),
        ),
      );
      if (hadFocus) parts.title.querySelector("h1").focus();
    }
    fill(parts.title.querySelector("#status"), badge(run.status));
    facts();
    progress();
  }

  function facts() {
    const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));
    fill(
      parts.facts,
      fact("Submitted", when(run.created_at)),
      fact("Duration", run.started_at ? duration(between(run.started_at, run.completed_at)) : "not started"),
      run.attempt > 1 && fact("Attempt", run.attempt),
      run.usage && fact("Tokens", `${count(run.usage.input_tokens)} in, ${count(run.usage.output_tokens)} out`),
      run.batch_id &&
        fact(
          "Batch",
          h("a", { href: link(`batch/${run.batch_id}`, { row: run.position }) }, `row ${run.position + 1}`),
        ),
      fact("Run", h("code", {}, run.run_id)),
    );
  }

  function ask() {
    const open = (run.status === "waiting" && run.waiting_for) || [];
    if (!open.length) questions.clear();
    for (const each of open) if (!questions.has(each.call_id)) questions.set(each.call_id, question(each));
    fill(
      parts.questions,
      open.map(({ call_id }) => questions.get(call_id)),
    );
  }

  function question({ call_id, question, schema, arguments: about, expires_at }) {
    const fields = form({ properties: { answer: schema }, required: ["answer"], $defs: schema.$defs });
    const error = (pointer, text) => fields.error(pointer.replace("/output", "/answer"), text);
    const { wrong, send } = sending({ ...fields, error }, "");
    const answer = send(async ({ answer: output }) => {
      run = await post(`${path}/calls/${encodeURIComponent(call_id)}`, { output }, { signal });
      head();
    });
    return h(
      "form",
      {
        class: "panel",
        onsubmit: (event) => {
          event.preventDefault();
          answer({ currentTarget: event.submitter });
        },
      },
      h("h2", {}, question),
      about && readable(about),
      expires_at && h("p", { class: "quiet" }, "Expires ", when(expires_at)),
      fields.node,
      wrong,
      h("p", { class: "actions" }, h("button", { class: "primary" }, "Answer")),
    );
  }

  function progress() {
    ask();
    if (isFinal(run.status) || run.status === "waiting") return fill(parts.progress);
    const { done, total, message } = run.progress ?? {};
    const words =
      done === undefined
        ? run.status === "starting"
          ? "Waiting to start"
          : "Running"
        : `${message ? `${message}: ` : ""}${count(done)}${total ? ` of ${count(total)}` : ""}`;
    return fill(
      parts.progress,
      h("label", {}, words, h("progress", total ? { max: total, value: Math.min(done, total) } : {})),
    );
  }

  function setStep(position, data) {
    const step = steps.get(position) ?? { node: h("li"), head: h("div"), result: h("div") };
    if (!steps.has(position)) {
      if (!steps.size) fill(parts.steps);
      steps.set(position, step);
      step.node.append(step.head, step.result);
      parts.steps.append(step.node);
    }
    const isNew = data.completed_at && step.completed_at !== data.completed_at;
    Object.assign(step, {
      agent_name: data.agent_name,
      started_at: data.started_at ?? step.started_at ?? new Date().toISOString(),
      completed_at: data.completed_at ?? null,
      usage: data.usage,
    });
    if (isNew)
      fill(
        step.result,
        h(
          "details",
          {},
          h("summary", {}, "Result"),
          h(
            "div",
            { class: "wide", tabindex: "0", role: "group", "aria-label": `Result of step ${position + 1}` },
            readable(data.result),
          ),
        ),
      );
    tick(step);
  }

  function tick(step) {
    const isOver = step.completed_at || isFinal(run.status);
    step.node.className = step.completed_at ? "done" : isOver ? "" : "busy";
    fill(
      step.head,
      h("strong", {}, step.agent_name),
      " ",
      h(
        "span",
        { class: "quiet" },
        step.completed_at ? "done in " : isOver ? "not finished" : "running for ",
        (step.completed_at || !isOver) && duration(between(step.started_at, step.completed_at)),
        step.started_at && [", started ", when(step.started_at)],
      ),
    );
  }

  function outcome() {
    if (!isFinal(run.status)) return fill(parts.outcome);
    if (run.status === "completed")
      return fill(parts.outcome, h("h2", {}, "Result"), result(run.result, `${run.run_id}.json`));
    const heading = run.status === "failed" ? "The run failed" : "The run was cancelled";
    return fill(
      parts.outcome,
      h(
        "div",
        { class: `problem ${run.status}` },
        h("h2", {}, heading),
        run.error !== `${heading}.` && h("p", { class: "text" }, run.error),
        h(
          "p",
          { class: "quiet" },
          "Type ",
          h("code", {}, run.error_type ?? "–"),
          run.request_id && [", request ", h("code", {}, run.request_id)],
        ),
      ),
    );
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
      h("h2", {}, "Inputs"),
      h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "Inputs" }, readable(found)),
      h("p", { class: "actions" }, button("Use these inputs again", use)),
    );
  }

  function start() {
    steps.clear();
    fill(parts.steps);
    follow().catch((error) => {
      if (signal.aborted) return;
      if (error.status === 404) fill(main, problem(error));
      else fill(parts.outcome, problem(error, start));
    });
  }

  head();
  outcome();
  run.steps.forEach((step, position) => setStep(position, step));
  inputs().catch(() => {});
  start();
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
