"""How good is the page's own example on the small model in this process?

    python -m bench.local_model            # the twenty texts of examples/texts.csv

Prints each answer, how many are valid by the agent's output signature, and how many name the sentiment that a person
gave the text (by a list of words that mean the same, so it is a rough figure).
"""

import csv
import sys
import time
from pathlib import Path

from examples.text_analyzer import flock
from flock.errors import RunFailed

EXAMPLES = Path(__file__).parent.parent / "examples"

#: What a person says of the twenty texts: positive, negative or neutral.
EXPECTED = "+-0+-0+-+-+-0+-0+-+-"

WORDS = {
    "+": "positive happy happiness joy great excellent amazing satisfied delighted fantastic enthusiastic grateful",
    "-": "negative bad angry anger frustrated frustration sad sadness terrible awful horrible disappointed",
    "0": "neutral informative informational factual objective curious inquiry",
}


def main() -> int:
    flock.model = "local/smollm2-135m"
    valid = right = 0
    with (EXAMPLES / "texts.csv").open(newline="", encoding="utf-8") as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    started = time.monotonic()
    for text, expected in zip(texts, EXPECTED, strict=True):
        try:
            result = flock.run("text_analyzer", {"text": text})
        except RunFailed as exc:
            print(f"{expected}  FAILED {exc.error_type}: {exc}")
            continue
        valid += 1
        right += result["sentiment"].lower() in WORDS[expected].split()
        print(f"{expected}  {result}")
    seconds = (time.monotonic() - started) / len(texts)
    print(f"valid: {valid} of {len(texts)}, sentiment as expected: {right} of {len(texts)}, {seconds:.2f} s each")
    return 0 if valid >= 18 else 1


if __name__ == "__main__":
    sys.exit(main())
