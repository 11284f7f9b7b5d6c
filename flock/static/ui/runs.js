// The lists of runs that are not items of a batch: all of them, and those that wait for a person.

import { link } from "./address.js";
import { get } from "./api.js";
import { h, quiet } from "./dom.js";
import { agentChoice, choice, list, previewOf } from "./list.js";
import { STATUSES, badge, between, duration, localTime, when } from "./words.js";

export async function show(main, { view, params, signal }) {
  const { agents } = await get("agents", signal);
  const agent = agentChoice(agents, params);
  await list(main, {
    kind: "runs",
    view,
    signal,
    params,
    noMatch: "No run matches these filters.",
    id: (run) => run.run_id,
    ...(view === "waiting" ? waiting(agent) : all(agent, params.get("session_id"))),
  });
}

const all = (agent, session) => ({
  filters: [
    choice("status", "Status", STATUSES),
    agent,
    time("created_after", "From"),
    time("created_before", "To"),
    ...(session ? [{ name: "session_id", label: "Session", make: (value) => h("input", { value }) }] : []),
  ],
  columns: ["Run", "Inputs", "Result", "Agent", "Status", "Submitted", "Duration"],
  noneYet: ["There are no runs yet. ", h("a", { href: link("agents") }, "Start one with an agent.")],
  row: (run) => [
    h("a.mono", { href: link(`run/${run.run_id}`) }, run.run_id.slice(-12)),
    preview(run.inputs ?? ""),
    preview(run.error ?? run.waiting_for?.[0]?.question ?? run.result ?? ""),
    run.agent_name,
    badge(run.status),
    when(run.created_at),
    duration(run.started_at && between(run.started_at, run.completed_at)),
  ],
  hasPreviews: true,
  isLive: (run) => !run.completed_at, // its duration grows
});

const waiting = (agent) => ({
  heading: "Waiting for you",
  only: { asking: true },
  filters: [agent],
  columns: ["Question", "About", "Agent", "Asked", "Expires"],
  about: quiet("These runs continue when their questions are answered."),
  noneYet: "No run waits for an answer.",
  row: ({ run_id, agent_name, waiting_for }) => [
    waiting_for.map(({ question }) => h("a.preview", { href: link(`run/${run_id}`) }, question)),
    waiting_for.map((question) => preview(previewOf(question.arguments, true))),
    agent_name,
    when(waiting_for[0].asked_at),
    when(
      waiting_for
        .map(({ expires_at }) => expires_at)
        .filter(Boolean)
        .sort()[0],
    ),
  ],
});

const preview = (text) => h("span.preview", text);

const time = (name, label) => ({
  name,
  label,
  make: (value) => h("input", { type: "datetime-local", step: 1, value: value ? localTime(value) : "" }),
  read: (text) => (text ? new Date(text).toISOString() : ""),
});
