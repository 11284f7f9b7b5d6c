"""Pipelines of Haystack, served by Hayhooks: python -m bench.peers.with_hayhooks PORT"""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pydantic
from hayhooks import AsyncPipeline, BasePipelineWrapper, SSEStream, async_streaming_generator
from haystack.components.generators.chat import OpenAIChatGenerator
from haystack.dataclasses import ChatMessage


class Review(pydantic.BaseModel):
    summary: str
    is_good: bool


async def pieces_of(pieces: int, interval_s: float) -> AsyncGenerator[str]:
    await asyncio.sleep(1)
    for _ in range(pieces):
        yield f"{time.monotonic_ns()} "
        await asyncio.sleep(interval_s)


class Add(BasePipelineWrapper):
    def setup(self) -> None:
        pass

    async def run_api_async(self, a: int, b: int = 2) -> int:
        return a + b


class Write(Add):
    async def run_api_async(self, pieces: int, interval_s: float) -> Any:  # type: ignore[override]
        return SSEStream(pieces_of(pieces, interval_s))

    async def run_chat_completion_async(self, model: str, messages: list[dict[str, Any]], body: dict[str, Any]) -> Any:
        pieces, interval_s = messages[-1]["content"].split()
        return pieces_of(int(pieces), float(interval_s))


class Ask(BasePipelineWrapper):
    def setup(self) -> None:
        self.pipeline = AsyncPipeline()
        format_ = {"name": "answer", "strict": True, "schema": Review.model_json_schema()}
        options = {"response_format": {"type": "json_schema", "json_schema": format_}}
        self.pipeline.add_component("llm", OpenAIChatGenerator(model="fake", generation_kwargs=options))

    async def run_api_async(self, text: str) -> Any:
        messages = [ChatMessage.from_system("You review."), ChatMessage.from_user(text)]
        done = await self.pipeline.run_async({"llm": {"messages": messages}})
        return Review.model_validate_json(done["llm"]["replies"][0].text).model_dump()


class Tell(Ask):
    async def run_api_async(self, text: str) -> Any:
        inputs = {"llm": {"messages": [ChatMessage.from_system("You review."), ChatMessage.from_user(text)]}}
        return SSEStream(async_streaming_generator(pipeline=self.pipeline, pipeline_run_args=inputs))


if __name__ == "__main__":
    for served in (Add, Write, Ask, Tell):
        folder = Path("pipelines", served.__name__.lower())
        folder.mkdir(parents=True)
        line = f"from bench.peers.with_hayhooks import {served.__name__} as PipelineWrapper\n"
        (folder / "pipeline_wrapper.py").write_text(line)
    command = str(Path(sys.executable).with_name("hayhooks"))
    os.execv(command, [command, "run", "--port", sys.argv[1], "--pipelines-dir", "pipelines"])
