"""The agents that can follow an agent, as data and as a Mermaid diagram."""

import re
from collections.abc import Mapping, Sequence

from flock.agents.agent import Agent, Handoff


def graph_of(agent_name: str, agents: Mapping[str, Agent]) -> list[Handoff]:
    """Return the hand-offs of an agent and of all agents that can follow it, the nearest first, each agent once.

    An agent that is not in *agents* has none.
    """
    names, graph = [agent_name], list[Handoff]()
    for name in names:  # each new name is added at the end
        handoffs = agents[name].handoffs() if name in agents else []
        names += dict.fromkeys(each.to for each in handoffs if each.to is not None and each.to not in names)
        graph += handoffs
    return graph


def mermaid_of(graph: Sequence[Handoff]) -> str:
    """Return *graph* as the text of a Mermaid flowchart. A dotted arrow means that a function decides."""
    names = dict.fromkeys(name for each in graph for name in (each.from_, each.to) if name is not None)
    ids = {name: f"a{number}" for number, name in enumerate(names)}
    lines = [f'{ids[name]}["{_escaped(name)}"]' for name in names]
    for each in graph:
        arrow = "-->" if each.value is None else f'-->|"{_escaped(each.value)}"|'
        target = 'done(["end of the run"])' if each.to is None else ids[each.to]
        if each.kind == "function":
            arrow, target = "-.->", 'unknown{"decided by a function"}'
        lines.append(f"{ids[each.from_]} {arrow} {target}")
    return "\n    ".join(["flowchart LR", *lines]) + "\n"


def _escaped(text: str) -> str:
    """Replace all that Mermaid, Markdown or HTML might interpret by character codes."""
    return re.sub(r"[^\w .-]", lambda match: f"#{ord(match[0])};", text)
