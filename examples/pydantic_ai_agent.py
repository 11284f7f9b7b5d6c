"""An agent of another framework, unchanged: flockapi serve examples/pydantic_ai_agent.py"""

from pydantic_ai import Agent

from flock.core import Flock

flock = Flock("other")
translator = Agent("test", instructions="Translate into French.")  # any model that pydantic-ai knows


@flock.agent
async def translate(text: str) -> str:
    return (await translator.run(text)).output
