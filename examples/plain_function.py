"""A typed function as an agent: flockapi serve examples/plain_function.py"""

from flock.core import Flock

flock = Flock("greeter")


@flock.agent
def greet(name: str, times: int = 1) -> str:
    """Greet a person by name."""
    return " ".join([f"Hello, {name}!"] * times)
