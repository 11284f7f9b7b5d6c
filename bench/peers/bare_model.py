"""The bare equal with model agents: uvicorn bench.peers.bare_model:app

They call the provider with httpx2 if it is installed, as ``flockapi`` does, and otherwise with httpx, unless
``BENCH_CLIENT`` has the name of one.
"""

import importlib
import json
import os
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import msgspec

from bench.peers import work
from bench.peers.bare import app

__all__ = ["app"]


class TextInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


class Message(msgspec.Struct, frozen=True):
    content: str | None = None


class Choice(msgspec.Struct):
    message: Message = Message()
    delta: Message = Message()


class Completion(msgspec.Struct):
    choices: list[Choice]


class Judgement(msgspec.Struct, forbid_unknown_fields=True):
    is_good: bool


class Review(msgspec.Struct, forbid_unknown_fields=True):
    summary: str
    is_good: bool


def schema_of(**types: str) -> Any:
    properties = {name: {"type": type_} for name, type_ in types.items()}
    fixed = {"type": "object", "required": list(types), "additionalProperties": False}
    return {**fixed, "properties": properties}


SCHEMAS = {"judge": schema_of(is_good="boolean"), "review": schema_of(summary="string", is_good="boolean")}
CLIENT_LIBRARY = os.environ.get("BENCH_CLIENT") or ("httpx2" if find_spec("httpx2") else "httpx")
CLIENT = importlib.import_module(CLIENT_LIBRARY).AsyncClient(
    base_url=os.environ.get("OPENAI_BASE_URL", ""),
    headers={"Authorization": "Bearer x", "Content-Type": "application/json"},
)
COMPLETIONS = msgspec.json.Decoder(Completion)
JUDGEMENTS, REVIEWS = msgspec.json.Decoder(Judgement), msgspec.json.Decoder(Review)


def asked(agent: str, inputs: TextInputs, **more: Any) -> bytes:
    """Return a request with the same messages and schema as those of ``flockapi``."""
    text = msgspec.json.encode({"text": inputs.text}).decode()
    fields = "\n".join(f"- {name} ({field['type']})" for name, field in SCHEMAS[agent]["properties"].items())
    question = f"{text}\n\nDetermine:\n{fields}\nAnswer with a JSON object only."
    messages = [{"role": "system", "content": f"You are {agent}."}, {"role": "user", "content": question}]
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMAS[agent]}}
    return msgspec.json.encode({"model": "fake", "messages": messages, "response_format": format_, **more})


async def ask(body: bytes) -> str:
    response = await CLIENT.post("/chat/completions", content=body)
    response.raise_for_status()
    return COMPLETIONS.decode(response.content).choices[0].message.content or ""


async def judge(inputs: TextInputs) -> Any:
    return JUDGEMENTS.decode(await ask(asked("judge", inputs)))


async def review(inputs: TextInputs) -> Any:
    return REVIEWS.decode(await ask(asked("review", inputs)))


async def reviewed(inputs: TextInputs) -> AsyncIterator[bytes]:
    """Pass on the pieces of an answer as they come, then the answer, which is checked."""
    answer = ""
    async with CLIENT.stream("POST", "/chat/completions", content=asked("review", inputs, stream=True)) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in COMPLETIONS.decode(line[6:]).choices:
                if choice.delta.content:
                    answer += choice.delta.content
                    yield f"data: {json.dumps(choice.delta.content)}\n\n".encode()
    yield b"data: %b\n\n" % work.ENCODE(REVIEWS.decode(answer))


INPUTS = msgspec.json.Decoder(TextInputs)
work.AGENTS |= {"judge": (INPUTS, judge), "review": (INPUTS, review)}
work.STREAMS["review"] = reviewed
