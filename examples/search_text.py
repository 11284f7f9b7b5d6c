"""A model that searches documents with SQLite's FTS5: flockapi serve examples/search_text.py --model openai/gpt-4o"""

import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from flock.core import Flock, FlockFactory
from flock.runs import RunContext

DOCUMENTS = {
    "returns": "Cups can be returned within 30 days. Send them in their box.",
    "shipping": "We ship to Sweden and Norway. It takes three days.",
    "care": "Cups may be washed in a dishwasher, pots may not.",
}


@asynccontextmanager
async def index() -> AsyncIterator[sqlite3.Connection]:
    """Make the index. In a program of yours it is a file that something else has filled."""
    connection = sqlite3.connect(":memory:", check_same_thread=False)
    connection.execute("CREATE VIRTUAL TABLE documents USING fts5(name, text, tokenize = 'porter')")
    connection.executemany("INSERT INTO documents VALUES (?, ?)", DOCUMENTS.items())
    yield connection
    connection.close()


flock = Flock("search-text", model="openai/gpt-4o", state=index)


def search(words: str, context: RunContext[sqlite3.Connection]) -> list[dict[str, str]]:
    """Find up to three documents about some words, the best first."""
    # Quoted, because FTS5 would read NOT, AND and punctuation as its query language.
    query = " OR ".join(f'"{word}"' for word in re.findall(r"\w+", words))
    rows = context.state.execute(
        "SELECT name, text FROM documents WHERE documents MATCH ? ORDER BY rank LIMIT 3", [query or '""']
    )
    return [{"name": name, "text": text} for name, text in rows]


flock.add_agent(
    FlockFactory.create_default_agent(
        "clerk",
        input="question: str",
        output="answer: str, sources: list[str] | the names of the documents that say so",
        instructions="Search before you answer. Answer only what a document says.",
        tools=[search],
    )
)
