// The inbox: the open questions that the user may answer.

import { linkToQuestion } from "./address.js";
import { get } from "./api.js";
import { h, quiet } from "./dom.js";
import { agentChoice, list, previewOf } from "./list.js";
import { when } from "./words.js";

export async function show(main, { params, signal }) {
  const { agents } = await get("agents", signal);
  const text = (name, label) => ({ name, label, make: (value) => h("input", { value: value ?? "" }) });
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
    noMatch: "No question matches these filters.",
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
