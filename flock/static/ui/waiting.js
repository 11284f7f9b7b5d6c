// The list of runs that wait for a person. The page of a run has the forms for the answers.

import { link } from "./address.js";
import { get } from "./api.js";
import { h, quiet } from "./dom.js";
import { agentChoice, list, previewOf } from "./list.js";
import { when } from "./words.js";

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  await list(main, {
    kind: "runs",
    view: "waiting",
    heading: "Waiting for you",
    only: { status: "waiting" },
    signal,
    params,
    filters: [agentChoice(agents, params)],
    columns: ["Question", "About", "Agent", "Asked", "Expires"],
    about: quiet("These runs continue when a person has answered their questions."),
    noneYet: "No run waits for an answer.",
    noMatch: "No run matches these filters.",
    row: ({ run_id, agent_name, waiting_for = [] }) => [
      waiting_for.map(({ question }) => h("a.preview", { href: link(`run/${run_id}`) }, question)),
      waiting_for.map((each) => h("span.preview", previewOf(each.arguments))),
      agent_name,
      when(waiting_for[0]?.asked_at),
      when(
        waiting_for
          .map(({ expires_at }) => expires_at)
          .filter(Boolean)
          .sort()[0],
      ),
    ],
    id: (run) => run.run_id,
  });
}
