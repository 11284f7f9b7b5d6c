"""Graphs of LangGraph, served by its in-memory development server: python -m bench.peers.with_langgraph PORT

The durable one needs Postgres, Redis and a licence; aegra (Postgres) and langhost (Postgres, Redis) need no licence.
"""

import asyncio
import os
import sys
import time
from typing import Any, TypedDict

import pydantic
from langchain_openai import ChatOpenAI
from langgraph.config import get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph_api.cli import run_server


class State(TypedDict, total=False):
    a: int
    b: int
    pieces: int
    interval_s: float
    text: str
    result: Any


class Review(pydantic.BaseModel):
    summary: str
    is_good: bool


async def adding(state: State) -> State:
    return {"result": state["a"] + state.get("b", 2)}


async def writing(state: State) -> State:
    send = get_stream_writer()
    await asyncio.sleep(1)
    for _ in range(state["pieces"]):
        send(f"{time.monotonic_ns()} ")
        await asyncio.sleep(state["interval_s"])
    return {"result": "done"}


async def reviewing(state: State) -> State:
    found = await MODEL.ainvoke([("system", "You review."), ("user", state["text"])])
    return {"result": found.model_dump()}


MODEL = ChatOpenAI(model="fake", api_key="x", base_url=os.environ["OPENAI_BASE_URL"]).with_structured_output(
    Review, method="json_schema"
)


def graph_of(node: Any) -> Any:
    graph = StateGraph(State)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    graph.add_edge("node", END)
    return graph.compile()


add, write, review = map(graph_of, (adding, writing, reviewing))

if __name__ == "__main__":
    graphs = {name: f"{__file__}:{name}" for name in ("add", "write", "review")}
    environment = {
        "LANGSMITH_TRACING": "false",
        "LANGGRAPH_NO_VERSION_CHECK": "true",
        "LANGGRAPH_CLI_NO_ANALYTICS": "1",
    }
    run_server(port=int(sys.argv[1]), graphs=graphs, n_jobs_per_worker=100, env=environment)
