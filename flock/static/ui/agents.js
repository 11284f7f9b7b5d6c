// The list of agents, as cards.

import { link } from "./address.js";
import { get } from "./api.js";
import { actions, h, quiet, title } from "./dom.js";
import { handOff } from "./words.js";

export async function showAgents(main, { signal }) {
  const { agents } = await get("agents", signal);
  main.append(
    title("Agents"),
    quiet("An agent does one job, often with a language model: it takes inputs and returns a result."),
    agents.length === 0
      ? h("p.empty", "There are no agents yet. Add agents in the server's program and restart it.")
      : h(
          "ul.cards",
          agents.map((agent) =>
            h(
              "li.card",
              h("h2", h("a", { href: link(`agent/${agent.name}`) }, agent.name)),
              h("p", agent.description || h("span.quiet", "No description.")),
              handOff(agent),
              actions(
                h("a.button", { href: link(`agent/${agent.name}`), "aria-label": `Run ${agent.name}` }, "Run"),
                h(
                  "a.button",
                  { href: link("new-batch", { agent: agent.name }), "aria-label": `Batch with ${agent.name}` },
                  "Batch",
                ),
              ),
            ),
          ),
        ),
  );
}
