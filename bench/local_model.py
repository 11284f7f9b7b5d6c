"""How good is the first example with the small in-process model?

    python -m bench.local_model            # the twenty texts of examples/texts.csv

Prints each result, how many results are valid by the output signature, and how many have the sentiment that a person
assigned to the text. The last figure is rough, because sentiments are compared with a list of synonyms.
"""

import csv
import sys
import time
from pathlib import Path

from examples.text_analyzer import flock
from flock.errors import RunFailed

EXAMPLES = Path(__file__).parent.parent / "examples"

#: The sentiment of each text, assigned by a person: positive, negative or neutral.
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
