"""Research in parallel: flockapi serve examples/research.py"""

import asyncio

from flock.core import Flock, FlockFactory
from flock.runs import RunContext

flock = Flock("research", model="openai/gpt-4o")
for name, inputs, output in (
    ("plan", "question", "topics: list[str] | three topics to look into"),
    ("look_into", "topic", "findings: str | in three sentences"),
    ("conclude", "question, findings: list[str]", "answer"),
):
    flock.add_agent(FlockFactory.create_default_agent(name, input=inputs, output=output))


@flock.agent
async def research(question: str, context: RunContext) -> str:
    topics = (await context.run_agent("plan", {"question": question}))["topics"]
    found = await asyncio.gather(*(context.run_agent("look_into", {"topic": topic}) for topic in topics))
    findings = [each["findings"] for each in found]
    answer: str = (await context.run_agent("conclude", {"question": question, "findings": findings}))["answer"]
    return answer
