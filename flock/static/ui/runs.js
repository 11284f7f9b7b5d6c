// The list of runs that are not items of a batch.

import { link } from "./address.js";
import { get } from "./api.js";
import { h } from "./dom.js";
import { agentChoice, choice, list } from "./list.js";
import { STATUSES, badge, between, duration, localTime, when } from "./words.js";

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  const session = { name: "session_id", label: "Session", make: (value) => h("input", { value }) };
  await list(main, {
    kind: "runs",
    signal,
    params,
    filters: [
      choice("status", "Status", STATUSES),
      agentChoice(agents, params),
      time("created_after", "From"),
      time("created_before", "To"),
      ...(params.get("session_id") ? [session] : []),
    ],
    columns: ["Run", "Inputs", "Result", "Agent", "Status", "Submitted", "Duration"],
    noneYet: ["There are no runs yet. ", h("a", { href: link("agents") }, "Start one with an agent.")],
    noMatch: "No run matches these filters.",
    id: (run) => run.run_id,
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
}

const preview = (text) => h("span.preview", text);

const time = (name, label) => ({
  name,
  label,
  make: (value) => h("input", { type: "datetime-local", step: 1, value: value ? localTime(value) : "" }),
  read: (text) => (text ? new Date(text).toISOString() : ""),
});
