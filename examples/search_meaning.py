"""A model that searches documents by meaning: OPENAI_API_KEY=… flockapi serve examples/search_meaning.py"""

import operator
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from flock.core import Flock, FlockFactory
from flock.runs import RunContext

DOCUMENTS = [
    "Cups can be returned within 30 days. Send them in their box.",
    "We ship to Sweden and Norway. It takes three days.",
    "Cups may be washed in a dishwasher, pots may not.",
]


class Library:
    """Documents with their embeddings. For more than some ten thousand, use a database that has an index for them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client
        self.vectors: list[Sequence[float]] = []

    async def embed(self, texts: Sequence[str]) -> list[Sequence[float]]:
        body: Any = {"model": "text-embedding-3-small", "input": texts}
        response = (await self.client.post("embeddings", json=body)).raise_for_status()
        return [each["embedding"] for each in response.json()["data"]]

    async def search(self, question: str, most: int = 2) -> list[str]:
        self.vectors = self.vectors or await self.embed(DOCUMENTS)
        [asked] = await self.embed([question])
        closeness = [sum(map(operator.mul, asked, vector)) for vector in self.vectors]  # their length is 1
        return [text for _, text in sorted(zip(closeness, DOCUMENTS, strict=True), reverse=True)[:most]]


@asynccontextmanager
async def library() -> AsyncIterator[Library]:
    base_url = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1")
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY')}"}
    async with httpx.AsyncClient(base_url=base_url, headers=headers) as client:
        yield Library(client)


flock = Flock("search-meaning", model="openai/gpt-4o", state=library)


async def search(question: str, context: RunContext[Library]) -> list[str]:
    """Find the documents that are about a question, the best first."""
    return await context.state.search(question)


flock.add_agent(FlockFactory.create_default_agent("clerk", input="question: str", output="answer: str", tools=[search]))
