"""A model reads a photo of a receipt, and a function checks the sum.

Run it with a model that sees images: ``flockapi serve examples/receipt.py`` (pip install 'flockapi[files]'). Then:
``curl -F agent_name=receipt -F photo=@receipt.jpg -F note=lunch http://127.0.0.1:8344/run/flock``
"""

from decimal import Decimal

import msgspec

from flock.core import Flock, FlockFactory
from flock.errors import AgentError

flock = Flock("receipts", model="openai/gpt-4o-mini")


class Line(msgspec.Struct):
    """What was bought, and what all of it costs."""

    what: str
    price: Decimal


class Receipt(msgspec.Struct):
    shop: str
    lines: list[Line]
    total: Decimal


def check_sum(receipt: Receipt) -> None:
    """Send a receipt back to the model whose lines do not add up."""
    total = sum(line.price for line in receipt.lines)
    if total != receipt.total:
        raise AgentError(f"The lines add up to {total}, and the total is {receipt.total}. Look at each line again.")


flock.add_agent(
    FlockFactory.create_default_agent(
        "receipt",
        description="Reads a receipt.",
        input="photo: Image | the receipt, note: str | None | what the customer says about it",
        output=Receipt,
        validate=check_sum,
    )
)
