"""flockapi serve examples/plain_function.py"""

from flock.core import Flock

flock = Flock("greeter")


@flock.agent
def greet(name: str, times: int = 1) -> str:
    """Greets somebody."""
    return " ".join([f"Hello, {name}!"] * times)
