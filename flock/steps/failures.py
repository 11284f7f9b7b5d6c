"""When a batch ends before all its items have: all would fail, or too many have. Both engines decide alike."""

import math
import random

from flock.agents.agent import Agent, ModelAgent
from flock.errors import ModelError
from flock.runs import Batch, BatchOptions, Run


def lasting_of(item: Run, agent: Agent | None, exc: BaseException | None) -> bool | None:
    """Whether all items of a batch would fail as *item* has, whose *agent* has raised *exc*.

    None if it takes ``alike_of`` such items in a row to prove it. All items of a model agent ask the same models, so
    one such error of theirs is enough.
    """
    while isinstance(exc, BaseExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    if not isinstance(exc, ModelError) or exc.is_lasting is False:
        return False
    return True if exc.is_lasting and isinstance(agent, ModelAgent) and not item.steps else None


def alike_of(options: BatchOptions) -> int:
    """Return how many items in a row prove that all would fail."""
    return max(3, options.max_workers if options.parallel else 1)


def failures_of(batch: Batch) -> float:
    """Return how many items of *batch* may fail in an attempt."""
    limit = batch.options.max_failures
    return math.inf if limit is None else limit * batch.total_items if limit < 1 else limit


def sample_of(batch: Batch) -> frozenset[int] | None:
    """Return the positions of the random items of *batch* that may start; None if it has no ``sample``."""
    options, total = batch.options, batch.total_items
    if options.sample is None:
        return None
    rows = range(min(total, options.limit or total))
    return frozenset(random.Random(options.seed).sample(rows, min(len(rows), options.sample)))
