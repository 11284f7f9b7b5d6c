"""A model that calls a function: flockapi serve examples/tools.py --model local/smollm2-135m"""

from flock.core import Flock, FlockFactory

flock = Flock("shop", model="openai/gpt-4o")


def stock(item: str) -> int:
    """Find how many pieces of an item are in stock."""
    return {"cup": 12, "pot": 3}.get(item, 0)


flock.add_agent(FlockFactory.create_default_agent("clerk", input="question", output="answer", tools=[stock]))
