// Agents that hand off to each other.

import { Problem, get } from "./api.js";

/** Return the last agent in the chain of hand-offs that starts with `agent`, as far as it is known. */
export async function lastAgent(agent, signal) {
  const seen = new Set([agent.name]);
  for (;;) {
    if (!agent.next_agent || seen.has(agent.next_agent)) return agent;
    seen.add(agent.next_agent);
    try {
      agent = await get(`agents/${encodeURIComponent(agent.next_agent)}`, signal);
    } catch (error) {
      if (error instanceof Problem) return agent;
      throw error;
    }
  }
}
