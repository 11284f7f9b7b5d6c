"""How good is the first example with the small in-process model, without and with ``examples=``?

    python -m bench.local_model            # the twenty texts of examples/texts.csv

Prints each result, how many results are valid by the output signature, and how many have the sentiment that a person
assigned to the text. The last figure is rough, because sentiments are compared with a list of synonyms. Each text goes
to both agents, one after the other.
"""

import csv
import sys
import time
from pathlib import Path
from typing import Any

from examples.text_analyzer import analyzer_agent
from flock.agents.agent import ModelAgent
from flock.core import Flock
from flock.errors import RunFailed

TEXTS = Path(__file__).parent.parent / "examples" / "texts.csv"

#: The sentiment of each text, assigned by a person: positive, negative or neutral.
EXPECTED = "+-0+-0+-+-+-0+-0+-+-"

WORDS = {
    "+": "positive happy happiness joy great excellent amazing satisfied delighted fantastic enthusiastic grateful",
    "-": "negative bad angry anger frustrated frustration sad sadness terrible awful horrible disappointed",
    "0": "neutral informative informational factual objective curious inquiry",
}

#: One of each sentiment. They were written before they were measured, and not changed afterwards.
SHOWN: list[tuple[Any, Any]] = [
    (
        {"text": "The soup was delicious, and our waiter made us laugh all evening."},
        {"sentiment": "positive", "keywords": ["delicious soup", "waiter"]},
    ),
    (
        {"text": "My flight was cancelled without notice, and nobody offered us a hotel."},
        {"sentiment": "negative", "keywords": ["cancelled flight", "no hotel"]},
    ),
    (
        {"text": "The museum has three floors and is open from ten to six."},
        {"sentiment": "neutral", "keywords": ["museum", "opening hours"]},
    ),
]


class Score:
    """The answers of one agent."""

    def __init__(self, label: str, agent: ModelAgent) -> None:
        self.label = label
        self.flock = Flock(model="local/smollm2-135m")
        self.flock.add_agent(agent)
        self.valid = self.right = 0
        self.seconds = 0.0

    def ask(self, text: str, expected: str) -> None:
        started = time.monotonic()
        try:
            result = self.flock.run("text_analyzer", {"text": text})
        except RunFailed as exc:
            print(f"{expected}  {self.label}  FAILED {exc.error_type}: {exc}")
        else:
            self.valid += 1
            self.right += result["sentiment"].lower() in WORDS[expected].split()
            print(f"{expected}  {self.label}  {result}")
        self.seconds += time.monotonic() - started


def main() -> int:
    with TEXTS.open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    assert not {inputs["text"] for inputs, _ in SHOWN} & {*texts}
    # The same name, because it is part of the prompt.
    shown = ModelAgent(analyzer_agent.name, analyzer_agent.input, analyzer_agent.output, examples=SHOWN)
    scores = [Score("without examples", analyzer_agent), Score("with examples   ", shown)]
    for text, expected in zip(texts, EXPECTED, strict=True):
        for score in scores:
            score.ask(text, expected)
    for score in scores:
        figures = f"valid: {score.valid} of {len(texts)}, sentiment as expected: {score.right} of {len(texts)}"
        print(f"{score.label}  {figures}, {score.seconds / len(texts):.2f} s each")
    return 0 if all(score.valid >= 18 for score in scores) else 1


if __name__ == "__main__":
    sys.exit(main())
