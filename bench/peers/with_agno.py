"""Workflows and agents of Agno, served by AgentOS with SQLite: python -m bench.peers.with_agno PORT"""

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator

import pydantic
import uvicorn
from agno.agent import Agent
from agno.db.sqlite import AsyncSqliteDb
from agno.models.openai.like import OpenAILike
from agno.os import AgentOS
from agno.run.agent import RunContentEvent
from agno.workflow import Step, StepInput, StepOutput, Workflow


class Review(pydantic.BaseModel):
    summary: str
    is_good: bool


async def add(step_input: StepInput) -> StepOutput:
    inputs = json.loads(str(step_input.input))
    return StepOutput(content=str(inputs["a"] + inputs.get("b", 2)))


async def write(step_input: StepInput) -> AsyncIterator[RunContentEvent]:
    inputs = json.loads(str(step_input.input))
    await asyncio.sleep(1)
    for _ in range(inputs["pieces"]):
        yield RunContentEvent(content=f"{time.monotonic_ns()} ")
        await asyncio.sleep(inputs["interval_s"])


db = AsyncSqliteDb(db_file="agno.db")
model = OpenAILike(id="fake", api_key="x", base_url=os.environ["OPENAI_BASE_URL"])
#: AgentOS is asked to look for nothing on the network.
agent_os = AgentOS(
    agents=[Agent(id="review", model=model, output_schema=Review, instructions="You review.", db=db, telemetry=False)],
    workflows=[
        Workflow(id="add", name="add", steps=[Step(name="add", executor=add)], db=db, telemetry=False),
        Workflow(id="write", name="write", steps=[Step(name="write", executor=write)], db=db, telemetry=False),
    ],
    telemetry=False,
)

if __name__ == "__main__":
    uvicorn.run(agent_os.get_app(), port=int(sys.argv[1]), access_log=False)
