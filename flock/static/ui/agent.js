// The view of an agent: a form for its inputs, and its outputs.

import { go, link } from "./address.js";
import { get, idempotencyKey, post } from "./api.js";
import { lastAgents } from "./chain.js";
import { copyCurl, quoted } from "./curl.js";
import { actions, button, fill, h, quiet, submitting, table, title, wide } from "./dom.js";
import { chatInput, form, keep, plain, sending } from "./form.js";
import { pretty, textOf } from "./json.js";
import { session, stored } from "./storage.js";

export async function show(main, { id, signal }) {
  const agent = await get(`agents/${encodeURIComponent(id)}`, signal);
  const last = await lastAgents(agent, signal);
  const draft = `draft ${agent.name}`;
  const fields = form(agent.input_schema, stored(draft));
  const { wrong, read, send } = sending(fields, "/inputs");
  const start = send(async (inputs) => {
    // The key makes it safe to retry if the connection fails halfway.
    const run = await post(
      "run/flock",
      { agent_name: agent.name, inputs, async_run: true },
      { canRetry: true, headers: idempotencyKey(), signal },
    );
    go(`run/${run.run_id}`);
  });

  const node = h(
    "form",
    {
      onsubmit: submitting(start),
      oninput: () => keep(draft, fields),
    },
    fields.node,
    wrong,
    actions(
      h("button.primary", "Run"),
      button("Copy as curl", () => {
        const inputs = read();
        if (inputs !== undefined)
          copyCurl("run/flock", "application/json", `-d ${quoted(pretty({ agent_name: agent.name, inputs }))}`);
      }),
      button("Clear", () => {
        session.set(draft, null);
        show(fill(main), { id, signal });
      }),
    ),
  );

  main.append(
    title(
      agent.name,
      actions(
        chatInput(agent.input_schema) && h("a.button", { href: link(`chat/${agent.name}`) }, "Chat"),
        h("a.button", { href: link("new-batch", { agent: agent.name }) }, "New batch"),
        h("a.button", { href: link("runs", { agent_name: agent.name }) }, "Runs"),
      ),
    ),
    h("p", agent.description),
    following(agent),
    h(
      "div.columns",
      h("section.panel", { "aria-label": "Inputs" }, h("h2", "Inputs"), node),
      h(
        "section",
        { "aria-label": "Result" },
        h("h2", "Result"),
        last.map((each) => [
          (last.length > 1 || each !== agent) &&
            quiet(
              "Returned by ",
              agentLink(each.name),
              agent.graph.some(({ from, kind }) => from === each.name && kind === "function")
                ? ", unless its result names another agent."
                : last.length > 1
                  ? ", if it is the last agent."
                  : ", the last agent in the chain.",
            ),
          outputs(each.output_schema),
        ]),
      ),
    ),
  );
}

const agentLink = (name) => h("a", { href: link(`agent/${name}`) }, name);

/** The graph of the agents that can follow, as nested lists. An agent is followed at its first place only. */
function following({ name, graph }) {
  const seen = new Set();
  const next = (from) => {
    const edges = seen.has(from) ? [] : graph.filter((edge) => edge.from === from);
    seen.add(from);
    const items = edges
      .filter(({ to, kind }) => to !== null || kind !== "fixed")
      .map(({ to, kind, field, value }) =>
        h(
          "li",
          kind === "value" && [h("span.quiet", `${field} is `), h("strong", value), " "],
          h("span.arrow"),
          kind === "function" ? "decided by a function" : to === null ? "the run ends" : [agentLink(to), next(to)],
        ),
      );
    return items.length > 0 && h("ul.graph", items);
  };
  const list = next(name);
  return list ? h("section", { "aria-label": "Next agents" }, h("h2", "Next agents"), list) : "";
}

function outputs(schema) {
  const fields = Object.entries(schema.properties ?? {}),
    isDescribed = fields.some(([, property]) => property.description);
  const rows = fields.map(([name, property]) =>
    h(
      "tr",
      h("th", { scope: "row" }, name),
      h("td", typeOf(plain(property, schema), schema)),
      isDescribed && h("td", property.description ?? ""),
    ),
  );
  const names = ["Name", "Type", isDescribed && "Description"].filter(Boolean);
  return [
    wide("Result", table(names, rows)),
    h("details", h("summary", "As JSON Schema"), h("pre", { tabindex: "0" }, pretty(schema))),
  ];
}

function typeOf(schema, root) {
  const orNull = schema.isNullable ? " or null" : "";
  if (schema.enum) return schema.enum.map(textOf).join(" | ") + orNull;
  if (schema.type === "array" && schema.items) return `list of ${typeOf(plain(schema.items, root), root)}${orNull}`;
  return (
    ({ "date-time": "date and time" }[schema.format] ??
      schema.format ??
      { string: "text", integer: "whole number", boolean: "yes or no" }[schema.type] ??
      schema.type ??
      "anything") + orNull
  );
}
