// The list of batches.

import { link } from "./address.js";
import { get } from "./api.js";
import { drawOutcomes, outcomeBar, outcomeWords } from "./chart.js";
import { actions, h } from "./dom.js";
import { agentChoice, choice, list } from "./list.js";
import { STATUSES, aboutBatches, badge, duration, isFinal, when } from "./words.js";

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "batches",
    signal,
    params,
    filters: [choice("status", "Status", STATUSES), agentChoice(agents, params)],
    columns: ["Batch", "Agent", "Status", "Time left", "Submitted", "Rows"],
    about: aboutBatches(),
    noneYet: ["There are no batches yet. ", h("a", { href: link("new-batch") }, "Start one from a file or from rows.")],
    noMatch: "No batch matches these filters.",
    row: (batch) => [
      h("a", { href: link(`batch/${batch.batch_id}`), class: "mono" }, batch.batch_id.slice(-12)),
      batch.agent_name,
      badge(batch.status),
      isFinal(batch.status) ? "–" : duration(batch.eta_s),
      when(batch.created_at),
      [drawOutcomes(outcomeBar(), batch), h("span.outcomes", outcomeWords(batch))],
    ],
    id: (batch) => batch.batch_id,
    start: actions(h("a.button.primary", { href: link("new-batch") }, "New batch")),
  });
}
