"""The record of a webhook: what happened to a run or a batch, and whether its receiver knows."""

from datetime import datetime

import msgspec

__all__ = ["Webhook"]


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """One event, which is sent until its receiver has accepted it, or until it is given up.

    Attributes:
        type: what happened, such as ``run.completed``.
        record_id: the id of the run or the batch.
        call_id: of a question.
        attempt: that of the run or the batch.
        status: ``pending``, ``sent`` or ``given_up``.
        tries: how often it was sent.
        first_try_at: when it was sent first, or would have been if its receiver had not been down.
        ended_at: when it was accepted or given up.
        error: why the last try failed.
        url: the current address of the receiver; None if the agent has none any more.
    """

    webhook_id: str
    type: str
    record_id: str
    call_id: str | None = None
    agent_name: str
    attempt: int
    status: str
    tries: int
    created_at: datetime
    next_try_at: datetime
    first_try_at: datetime | None = None
    ended_at: datetime | None = None
    error: str | None = None
    url: str | None = None
