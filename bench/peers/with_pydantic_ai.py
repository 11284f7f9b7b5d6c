"""Agents of pydantic-ai with routes of FastAPI: python -m bench.peers.with_pydantic_ai PORT"""

import json
import os
import sys
from collections.abc import AsyncIterator

import fastapi
import pydantic
import uvicorn
from fastapi.responses import StreamingResponse
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from bench.peers.shared import tune_gc


class Review(pydantic.BaseModel):
    summary: str
    is_good: bool


class Text(pydantic.BaseModel):
    text: str


provider = OpenAIProvider(base_url=os.environ["OPENAI_BASE_URL"], api_key="x")
agent = Agent(OpenAIChatModel("fake", provider=provider), output_type=NativeOutput(Review), instructions="You review.")
app = fastapi.FastAPI()


@app.post("/review")
async def review(inputs: Text) -> Review:
    return (await agent.run(inputs.text)).output


@app.post("/review/stream")
async def review_in_pieces(inputs: Text) -> StreamingResponse:
    async def events() -> AsyncIterator[str]:
        sent = ""
        async with agent.run_stream(inputs.text) as result:
            async for response in result.stream_response(debounce_by=None):
                text = response.text or ""
                yield f"data: {json.dumps(text[len(sent) :])}\n\n"
                sent = text
            yield f"data: {(await result.get_output()).model_dump_json()}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


if __name__ == "__main__":
    tune_gc()
    uvicorn.run(app, port=int(sys.argv[1]), access_log=False)
