// The lists of runs, of batches, of open questions, and of webhooks.

import { link, linkToQuestion } from "./address.js";
import { get, post } from "./api.js";
import { drawOutcomes, outcomeBar, outcomeWords } from "./chart.js";
import { actions, button, h, quiet } from "./dom.js";
import { agentChoice, choice, list, previewOf } from "./list.js";
import { busyWhile } from "./notices.js";
import { STATUSES, aboutBatches, badge, between, duration, isFinal, localTime, when } from "./words.js";

/** Show the list of a view. */
export async function show(main, given) {
  await { runs, batches, waiting, webhooks }[given.view](main, given);
}

/** The runs that are not items of a batch. */
async function runs(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "runs",
    signal,
    params,
    filters: [
      choice("status", "Status", STATUSES),
      agentChoice(agents, params),
      time("created_after", "From"),
      time("created_before", "To"),
      ...(params.get("session_id") ? [text("session_id", "Session")] : []),
    ],
    columns: ["Run", "Inputs", "Result", "Agent", "Status", "Submitted", "Duration"],
    noneYet: ["There are no runs yet. ", h("a", { href: link("agents") }, "Start one with an agent.")],
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

const text = (name, label) => ({ name, label, make: (value) => h("input", { value: value ?? "" }) });
const time = (name, label) => ({
  name,
  label,
  make: (value) => h("input", { type: "datetime-local", step: 1, value: value ? localTime(value) : "" }),
  read: (text) => (text ? new Date(text).toISOString() : ""),
});

async function batches(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "batches",
    signal,
    params,
    filters: [choice("status", "Status", STATUSES), agentChoice(agents, params)],
    columns: ["Batch", "Rows", "Status", "Agent", "Time left", "Submitted"], // a phone shows the first two
    about: aboutBatches(),
    noneYet: ["There are no batches yet. ", h("a", { href: link("new-batch") }, "Start one from a file or from rows.")],
    row: (batch) => [
      h("a", { href: link(`batch/${batch.batch_id}`), class: "mono" }, batch.batch_id.slice(-12)),
      [drawOutcomes(outcomeBar(), batch), h("span.outcomes", outcomeWords(batch))],
      badge(batch.status),
      batch.agent_name,
      isFinal(batch.status) ? "–" : duration(batch.eta_s),
      when(batch.created_at),
    ],
    id: (batch) => batch.batch_id,
    start: actions(h("a.button.primary", { href: link("new-batch") }, "New batch")),
  });
}

/** The inbox: the open questions that the user may answer. */
async function waiting(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "questions",
    view: "waiting",
    heading: "Waiting for you",
    signal,
    params,
    filters: [agentChoice(agents, params), text("role", "Role")],
    columns: ["Question", "About", "Agent", "Requested by", "Asked", "Expires"],
    about: quiet("Runs wait for the answers to these questions."),
    noneYet: "No run waits for an answer.",
    id: ({ run_id, call_id }) => `${run_id} ${call_id}`,
    row: (asked) => [
      h("a.preview", { href: linkToQuestion(asked) }, asked.question),
      h("span.preview", previewOf(asked.arguments, true)),
      asked.agent_name,
      asked.requested_by ?? "–",
      when(asked.asked_at),
      when(asked.expires_at),
    ],
  });
}

/** The events of runs and batches, as they are sent to the receivers of the operator. */
async function webhooks(main, { params, signal }) {
  const retry = (id) => busyWhile(() => post(`webhooks/${id}/retry`, undefined, { signal }));
  await list(main, {
    kind: "webhooks",
    signal,
    params,
    filters: [choice("status", "Status", ["pending", "sent", "given_up"])],
    columns: ["Event", "Status", "Receiver", "Tries", "Next try", "Error"],
    about: quiet("Events of runs and batches are sent to these receivers."),
    noneYet: "There are no webhooks yet.",
    id: ({ webhook_id }) => webhook_id,
    row: ({ webhook_id, type, record_id, url, status, tries, next_try_at, error }) => [
      h("a", { href: link(`${type.startsWith("batch") ? "batch" : "run"}/${record_id}`) }, type),
      [badge(status), " ", button("Retry", retry(webhook_id), { class: "small" })],
      url ? new URL(url).host : "–",
      tries,
      when(status === "pending" && next_try_at),
      h("span.preview", { title: error }, error ?? ""),
    ],
  });
}
