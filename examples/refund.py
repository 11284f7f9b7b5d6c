"""An agent that asks a person: flockapi serve examples/refund.py"""

import dataclasses

from flock.core import Flock
from flock.runs import RunContext

flock = Flock()


@dataclasses.dataclass
class Approval:
    approved: bool
    reason: str = ""


async def price_of(order: str) -> float:
    return {"A7": 40.0, "B2": 8.5}.get(order, 0.0)


async def pay_back(order: str, amount: float, context: RunContext) -> str:
    # send context.idempotency_key with the payment
    return f"{amount:.2f} € paid back for {order}"


@flock.agent
async def refund(order: str, context: RunContext) -> str:
    amount = await context.call(price_of, order)
    if amount > 10:
        answer = await context.ask(f"Refund {amount:.2f} € for the order {order}?", Approval)
        if not answer.approved:
            return f"refused: {answer.reason}"
    paid: str = await context.call(pay_back, order, amount)
    return paid
