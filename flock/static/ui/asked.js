// The view of one question. A user with its role sees it without its run.

import { link, linkToQuestion } from "./address.js";
import { get, post } from "./api.js";
import { actions, fact, fill, h, quiet, title, wide } from "./dom.js";
import { notify } from "./notices.js";
import { question } from "./question.js";
import { readable } from "./value.js";
import { every } from "./wait.js";
import { when } from "./words.js";

const REFRESH_MS = 2000;

export async function showQuestion(main, id, signal) {
  const [run_id, ...rest] = id.split("/");
  const path = `run/${encodeURIComponent(run_id)}/calls/${encodeURIComponent(rest.join("/"))}`;
  const body = h("div");
  let asked = await get(path, signal);

  const refresh = async () => {
    const now = await get(path, signal);
    if (now.status === asked.status) return;
    asked = now;
    notify(`The question is ${asked.status}.`);
    draw();
  };

  /** Another person may have answered it meanwhile. */
  async function answer(output) {
    try {
      await post(path, { output }, { signal });
    } catch (error) {
      if (error.status !== 409) throw error;
    }
    await refresh();
    body.querySelector("a")?.focus();
  }

  const draw = () => fill(body, asked.status === "open" ? question(asked, answer) : closed());

  function closed() {
    const next = h("a.button.primary", { href: link("waiting") }, "Other questions");
    get("questions?limit=1", signal)
      .then(({ questions: [first] }) => first && fill(next, "Next question").setAttribute("href", linkToQuestion(first)))
      .catch(() => {});
    return h(
      "section.panel",
      h("h2", asked.question),
      asked.arguments && wide("Arguments", readable(asked.arguments)),
      asked.status === "answered"
        ? [
            quiet("Answered", asked.answered_by ? ` by ${asked.answered_by}` : "", " at ", when(asked.answered_at)),
            wide("Answer", readable(asked.output)),
          ]
        : quiet("It is no longer open."),
      actions(next),
    );
  }

  main.append(
    title(`Question of ${asked.agent_name}`),
    h(
      "dl.facts",
      asked.requested_by && fact("Requested by", asked.requested_by),
      asked.answerer && fact("Role", asked.answerer),
      fact("Asked", when(asked.asked_at)),
      fact("Run", h("a.mono", { href: link(`run/${run_id}`) }, run_id)),
    ),
    body,
  );
  draw();
  every(REFRESH_MS, () => asked.status === "open" && refresh(), signal).catch(() => {});
}
