"""Everything that can go wrong, as one tree.

    FlockError
    ├── DefinitionError          what the author wrote cannot work; said where it is written
    │   └── SignatureError       … in a signature, with the column
    ├── MalformedJSON            the text is not JSON: line and column
    ├── InvalidData              JSON that does not fit a type: one FieldError for each place
    ├── NotFound
    │   ├── AgentNotFound
    │   ├── RunNotFound
    │   └── BatchNotFound
    ├── AccessDenied             before anything is looked at
    │   ├── Unauthenticated      nobody knows who asks
    │   ├── Forbidden            somebody is known, or a page, and may not
    │   └── WrongHost            another server is meant
    ├── Conflict                 what is asked for does not go with how things stand
    ├── KeyReused                an idempotency key was used for another request
    ├── Replayed                 not an error: the request was accepted before, under the same key
    ├── EngineFull               no room now; try again in ``retry_after_s``
    ├── TooManyRequests          one caller asks for more than its share; in ``retry_after_s``
    ├── TooLarge                 more was sent than is taken at once
    ├── EngineStopped            the engine is not running, or is leaving
    ├── StoreError               the store cannot be opened, read or written
    ├── OwnershipLost            another engine has taken the run over
    ├── RunFailed                what ``flock.run`` raises for a run that ended as failed
    └── StepError                ends its run as failed; its text is meant for the client
        ├── AgentError           raised by an agent's own code
        ├── InvalidOutput        the result does not fit the output signature
        ├── InvalidHandoff       the next agent does not exist, or cannot be given its inputs
        ├── Unstorable           a record has a value that the store does not take
        ├── Unreadable           the record of the run is damaged
        ├── ResultTooLarge       it is longer than ``max_result_bytes``
        ├── TooManySteps         the hand-offs go on beyond ``max_steps``
        ├── TooManyTokens        its models have cost ``max_tokens``, and it wants to ask one again
        └── ModelError           the model gave no usable answer; ``error_type`` says why

``flockapi.py`` maps a class to an HTTP status by its MRO. A ``StepError`` never becomes one: a run that failed is an
answer, not an error of the request.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import msgspec

__all__ = [
    "AccessDenied",
    "AgentError",
    "AgentNotFound",
    "BatchNotFound",
    "Conflict",
    "DefinitionError",
    "EngineFull",
    "EngineStopped",
    "FieldError",
    "FlockError",
    "Forbidden",
    "Interrupted",
    "InvalidData",
    "InvalidHandoff",
    "InvalidOutput",
    "KeyReused",
    "MalformedJSON",
    "ModelError",
    "NotFound",
    "OwnershipLost",
    "QueueTimeout",
    "Replayed",
    "ResultTooLarge",
    "RunFailed",
    "RunNotFound",
    "SignatureError",
    "StepError",
    "StoreError",
    "TooLarge",
    "TooManyRequests",
    "TooManySteps",
    "TooManyTokens",
    "Unauthenticated",
    "Unreadable",
    "Unstorable",
    "WrongHost",
    "cut",
]


#: How many places a message names, of all that ``InvalidData.errors`` has.
MAX_TOLD_ERRORS = 10
#: How much of what a client sent a message repeats.
MAX_ECHOED_CHARS = 100
#: The longest text that is kept or sent for people to read: an error, a pointer, a progress message; in bytes of UTF-8.
MAX_TEXT_BYTES = 8 * 1024
#: The end of a text that was longer.
CUT = "… (cut)"


def cut(text: str) -> str:
    """*text*, or its beginning and a mark if it is longer than MAX_TEXT_BYTES."""
    if len(text) * 4 <= MAX_TEXT_BYTES:
        return text
    start = text[:MAX_TEXT_BYTES].encode("utf-8", "replace")
    if len(text) <= MAX_TEXT_BYTES and len(start) <= MAX_TEXT_BYTES:
        return text
    return start[: MAX_TEXT_BYTES - len(CUT.encode())].decode("utf-8", "ignore") + CUT


class FlockError(Exception):
    """The root: ``except FlockError`` catches all that this package raises on purpose."""


class DefinitionError(FlockError):
    """An agent or a flock is put together in a way that cannot work."""


class SignatureError(DefinitionError):
    """A signature cannot be understood.

    Attributes:
        column: where, counted from 1 in the signature's text; None where there is no text.
    """

    def __init__(self, message: str, column: int | None = None) -> None:
        super().__init__(message if column is None else f"{message} (column {column})")
        self.column = column


class MalformedJSON(FlockError):
    """A text is not JSON.

    Attributes:
        line, column: where, both counted from 1; the column counts characters.
    """

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(f"Not valid JSON: {reason} at line {line}, column {column}.")
        self.line = line
        self.column = column


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """One place that is wrong: what, and where as a JSON pointer (RFC 6901); within its line where there are lines.

    A long detail or pointer is cut.
    """

    detail: str
    pointer: str
    line: int | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        for name in ("detail", "pointer"):
            msgspec.structs.force_setattr(self, name, cut(getattr(self, name)))

    def __str__(self) -> str:
        line = "" if self.line is msgspec.UNSET else f"line {self.line}"
        return f"{' '.join(filter(None, [line, self.pointer])) or 'the value'}: {self.detail}"


class InvalidData(FlockError):
    """JSON that does not fit the type it is meant for. ``errors`` has every place, at least one."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        told = [str(error) for error in errors[:MAX_TOLD_ERRORS]]
        more = [f"and {len(errors) - MAX_TOLD_ERRORS} more"] if len(errors) > MAX_TOLD_ERRORS else []
        super().__init__(cut("; ".join(told + more)))
        self.errors = list(errors)


class NotFound(FlockError):
    """Nothing here has that name or id."""


class AgentNotFound(NotFound):
    """No agent has that name; the message lists the known ones."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        listed = ", ".join(known) or "none yet: add one with flock.add_agent(...)"
        super().__init__(f"No agent is called {name[:MAX_ECHOED_CHARS]!r}. Known agents: {listed}.")


class RunNotFound(NotFound):
    """No run has that id, or it is no longer kept."""

    def __init__(self, run_id: str) -> None:
        echoed = run_id[:MAX_ECHOED_CHARS]
        super().__init__(f"No run has the id {echoed!r}. It may never have been accepted, or is no longer kept.")


class BatchNotFound(NotFound):
    """No batch has that id, or it is no longer kept."""

    def __init__(self, batch_id: str) -> None:
        echoed = batch_id[:MAX_ECHOED_CHARS]
        super().__init__(f"No batch has the id {echoed!r}. It may never have been accepted, or is no longer kept.")


class EngineFull(FlockError):
    """As much as was agreed is already accepted. Try again in ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequests(FlockError):
    """One caller asks for more than its share, which ``headers`` tell. Try again in ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class TooLarge(FlockError):
    """More was sent than is taken at once."""


class EngineStopped(FlockError):
    """The engine takes no work: it was not started, or is stopping."""

    def __init__(
        self, message: str = "The engine is not running: enter it with 'async with', or run the app's lifespan."
    ) -> None:
        super().__init__(message)


class AccessDenied(FlockError):
    """The base of what is refused because of who asks, or from where."""


class Unauthenticated(AccessDenied):
    """There is no key, or none that is known."""


class Forbidden(AccessDenied):
    """Whoever asks may not do this."""


class WrongHost(AccessDenied):
    """The request names a host that this server is not."""


class Conflict(FlockError):
    """What is asked for does not go with how the run or batch stands."""


class KeyReused(FlockError):
    """An idempotency key stands for one request only."""

    def __init__(self, key: str) -> None:
        super().__init__(f"The idempotency key {key!r} was used for another request. Send a new key for a new request.")


class Replayed(FlockError):
    """The request was accepted before. ``made_id`` is the run or batch that came of it."""

    def __init__(self, made_id: str) -> None:
        super().__init__(f"This request was accepted before, as {made_id}.")
        self.made_id = made_id


class StoreError(FlockError):
    """The store cannot be opened, read or written now. Nothing that was acknowledged is lost."""


class OwnershipLost(FlockError):
    """Another engine has taken the run over, so this one must not go on with it."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"The run {run_id} belongs to another engine by now.")


class RunFailed(FlockError):
    """A run ended as failed. ``str()`` is its ``error``; ``error_type`` is a stable word for programs."""

    def __init__(self, error: str, error_type: str) -> None:
        super().__init__(error)
        self.error_type = error_type


class StepError(FlockError):
    """Ends the run as failed. The text reaches the client; ``log_detail`` only the log."""

    error_type: str = "step_error"
    log_detail: str = ""


class AgentError(StepError):
    """Raise this in an agent to fail its run with a text that the client shall read.

    The text of every other exception stays in the log. Subclasses may set an ``error_type`` of their own.
    """

    error_type = "agent_error"


class InvalidOutput(StepError):
    """What an agent returned does not fit its output signature, or cannot be JSON."""

    error_type = "invalid_output"


class InvalidHandoff(StepError):
    """The agent that should go on does not exist, or what is known does not give it its inputs."""

    error_type = "invalid_handoff"


class Unstorable(StepError):
    """One record has a value that SQLite refuses (its type, range, size or encoding). Other records can be written."""

    error_type = "unstorable"


class Unreadable(StepError):
    """The run was read again from the store when its turn came, and its record is damaged.

    Attributes:
        is_writable: False if its end cannot be written there either.
    """

    error_type = "unreadable"
    is_writable = True


class ResultTooLarge(StepError):
    """What an agent gave is longer than is kept. It is not cut: half of a JSON object is none."""

    error_type = "result_too_large"


class TooManySteps(StepError):
    """The run was handed on more often than ``max_steps`` allows."""

    error_type = "too_many_steps"


class TooManyTokens(StepError):
    """The run wants to ask a model after it has spent ``max_tokens``."""

    error_type = "too_many_tokens"


class QueueTimeout(StepError):
    """The run waited longer for its first step than ``queue_timeout_s``."""

    error_type = "queue_timeout"


class Interrupted(StepError):
    """The process died while an agent with ``on_interrupt="fail"`` was at work."""

    error_type = "interrupted"


class ModelError(StepError):
    """A model call failed for good.

    Attributes:
        error_type: one of ``ERROR_TYPES``.
        log_detail: the provider's own words and its request id: for the log, since they may hold anything.
    """

    ERROR_TYPES: ClassVar = frozenset(
        {
            "model_not_configured",  # no model, no key, an unknown provider, a missing extra
            "model_authentication",  # 401, 403
            "model_not_found",  # 404
            "model_bad_request",  # 400, 422 and what else no retry can mend
            "model_context_length",  # the prompt is longer than the model takes
            "model_content_filter",  # the provider's filter stopped the prompt or the answer
            "model_refusal",  # the model declined to answer
            "model_rate_limited",  # 429, after the retries
            "model_quota",  # 429 that only money mends
            "model_unavailable",  # 408, 409, 5xx, connection lost, after the retries
            "model_timeout",  # no answer in time
            "model_truncated",  # the answer was cut at the token limit
            "model_bad_response",  # 200 with something else than an answer
        }
    )

    def __init__(self, message: str, error_type: str, log_detail: str = "") -> None:
        super().__init__(message)
        self.error_type = error_type
        self.log_detail = log_detail
