// What the views of a run and of a batch share.

import { actions, button, fact, fill, h, quiet, title } from "./dom.js";
import { copy, problem } from "./notices.js";
import { badge, count, isFinal } from "./words.js";

/** A final status as the verb of a sentence. */
export const ended = { completed: "completed", failed: "failed", cancelled: "was cancelled" };

/** The newer of two records of a run. Responses may arrive in another order. */
export const newer = (known, run) =>
  run.attempt < known.attempt || (run.attempt === known.attempt && isFinal(known.status) && !isFinal(run.status))
    ? known
    : run;

/** The heading of a run or batch. Its buttons are replaced only if `kind` changes, so that they keep the focus. */
export function heading() {
  const node = h("div"),
    status = h("span", { id: "status" });
  const draw = (record, kind, buttons) => {
    if (node.dataset.kind !== kind) {
      const hadFocus = node.contains(document.activeElement);
      node.dataset.kind = kind;
      const copyLink = button("Copy link", () => copy(location.href, "Link"));
      fill(node, title(record.agent_name, status, actions(buttons(), copyLink)));
      if (hadFocus) node.querySelector("h1").focus();
    }
    fill(status, badge(record.status));
  };
  return { node, draw };
}

/** A text that is not shown but announced by screen readers: {node, say(text), sayRarely(text)}. */
export function announcer(pauseMs) {
  const node = h("p.visually-hidden", { role: "status" });
  let saidAt = 0;
  const say = (text) => {
    saidAt = performance.now();
    fill(node, text);
  };
  return { node, say, sayRarely: (text) => performance.now() - saidAt > pauseMs && say(text) };
}

/** Show an error in place of the view if its record is gone, and otherwise in `box`, with a button for `again`. */
export const failing = (main, box, again, signal) => (error) => {
  if (signal.aborted) return;
  if (error.status === 404) fill(main, problem(error));
  else fill(box, problem(error, again));
};

export function failure({ status, error, error_type, request_id }, heading) {
  const codes = Object.entries({ Type: error_type, Request: request_id }).filter(([, code]) => code);
  return h(
    `div.problem.${status}`,
    h("h2", heading),
    error !== `${heading}.` && h("p.text", error),
    codes.map(([name, code]) => quiet(name, " ", h("code", code))),
  );
}

/** US dollars. Runs can cost much less than a cent. */
const dollars = (amount) =>
  new Intl.NumberFormat(undefined, {
    style: "currency",
    currency: "USD",
    maximumFractionDigits: amount < 1 ? 6 : 2,
  }).format(amount);

export const spent = ({ usage, cost, estimated_cost }) => [
  usage && fact("Tokens", `${count(usage.input_tokens)} in, ${count(usage.output_tokens)} out`),
  typeof cost === "number" && fact("Cost", dollars(cost)),
  typeof estimated_cost === "number" && fact("Estimated cost", dollars(estimated_cost)),
];
