// Agents that hand off to each other.

import { get } from "./api.js";

/** Return the agents that can be the last one in a run of `agent`, as far as they are known. */
export function lastAgents(agent, signal) {
  const names = new Set(agent.graph.filter(({ to }) => to === null).map(({ from }) => from));
  const others = [...names].filter((name) => name !== agent.name);
  const first = names.has(agent.name) || !names.size ? [agent] : [];
  return Promise.all([...first, ...others.map((name) => get(`agents/${encodeURIComponent(name)}`, signal))]);
}

export const outputsOf = (agents) => [
  ...new Set(agents.flatMap(({ output_schema }) => Object.keys(output_schema.properties ?? {}))),
];
