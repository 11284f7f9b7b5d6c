// All batches, a page at a time.

import { STATUSES, badge, count, duration, get, h, link, when } from "./app.js";
import { agentChoice, choice, list } from "./runs.js";

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "batches",
    signal,
    params,
    filters: [choice("status", "Status", STATUSES), agentChoice(agents, params)],
    columns: ["Batch", "Agent", "Status", "Done", "Failed", "Still takes", "Accepted"],
    empty: ["No batch fits. ", h("a", { href: link("new-batch") }, "Start one from a file or from rows.")],
    row: (batch) => [
      h("a", { href: link(`batch/${batch.batch_id}`), class: "mono" }, batch.batch_id.slice(-12)),
      batch.agent_name,
      badge(batch.status),
      h("span", {}, `${batch.progress_percentage} % of ${count(batch.total_items)}`),
      count(batch.failed_items),
      duration(batch.eta_s),
      when(batch.created_at),
    ],
    id: (batch) => batch.batch_id,
    beside: h("p", { class: "actions" }, h("a", { class: "button primary", href: link("new-batch") }, "New batch")),
  });
}
