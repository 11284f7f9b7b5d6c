"""The bare equal with a model agent, which calls the provider with httpx: uvicorn bench.peers.bare_model:app"""

import os
from typing import Any

import httpx
import msgspec

from bench.peers import work
from bench.peers.bare import app

__all__ = ["app"]


class JudgeInputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


class Message(msgspec.Struct):
    content: str


class Choice(msgspec.Struct):
    message: Message


class Completion(msgspec.Struct):
    choices: list[Choice]


class Judgement(msgspec.Struct, forbid_unknown_fields=True):
    is_good: bool


SCHEMA = {
    "title": "judge_output",
    "type": "object",
    "properties": {"is_good": {"type": "boolean"}},
    "required": ["is_good"],
    "additionalProperties": False,
}
CLIENT = httpx.AsyncClient(base_url=os.environ.get("OPENAI_BASE_URL", ""), headers={"Authorization": "Bearer x"})
COMPLETIONS = msgspec.json.Decoder(Completion)
JUDGEMENTS = msgspec.json.Decoder(Judgement)


async def judge(inputs: JudgeInputs) -> Any:
    """Ask the model with the same messages and schema as ``flockapi``."""
    text = msgspec.json.encode({"text": inputs.text}).decode()
    question = f"{text}\n\nDetermine:\n- is_good (boolean)\nAnswer with a JSON object only."
    messages = [{"role": "system", "content": "You are judge."}, {"role": "user", "content": question}]
    format_ = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": SCHEMA}}
    body = msgspec.json.encode({"model": "fake", "messages": messages, "response_format": format_})
    response = await CLIENT.post("/chat/completions", content=body, headers={"Content-Type": "application/json"})
    response.raise_for_status()
    return JUDGEMENTS.decode(COMPLETIONS.decode(response.content).choices[0].message.content)


work.AGENTS["judge"] = (msgspec.json.Decoder(JudgeInputs), judge)
