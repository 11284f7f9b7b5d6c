"""A chat: flockapi serve examples/chat.py, then send each message with the same session_id."""

from flock.core import Flock, FlockFactory

flock = Flock("chat", model="openai/gpt-4o")
flock.add_agent(
    FlockFactory.create_default_agent("chat", input="message: str", output="reply: str", history=20),
)
