"""All errors of this package, in one tree.

    FlockError
    ├── DefinitionError          an agent or a flock is defined incorrectly; raised at the definition
    │   └── SignatureError       a signature is invalid; has the column
    ├── MalformedJSON            the text is not valid JSON; has line and column
    ├── InvalidData              JSON does not match the expected type; has one FieldError per problem
    ├── NotFound
    │   ├── AgentNotFound
    │   ├── RunNotFound
    │   ├── CallNotFound         a run does not ask this question
    │   ├── BatchNotFound
    │   └── SessionNotFound
    ├── AccessDenied             raised before the request is processed
    │   ├── Unauthenticated      the API key or the user is missing or unknown
    │   ├── Forbidden            the caller, or its origin, lacks permission
    │   └── WrongHost            the Host header does not name this server
    ├── Conflict                 the request conflicts with the current state
    │   ├── KeyInUse             a request with the same idempotency key is being accepted
    │   └── StaleAnswer          the question is no longer open; has those that are
    ├── KeyReused                an idempotency key was already used for a different request
    ├── Replayed                 not an error: the request was already accepted under the same key
    ├── EngineFull               a queue is full; retry after ``retry_after_s``
    ├── TooManyRequests          a caller exceeds its share; retry after ``retry_after_s``
    ├── TooLarge                 the request exceeds a size limit
    ├── EngineStopped            the engine is not running, or is shutting down
    ├── StoreError               the store cannot be opened, read or written
    ├── OwnershipLost            another engine now owns the run
    ├── RunFailed                raised by ``flock.run`` if the run fails
    └── StepError                fails the run; its text is sent to the client
        ├── AgentError           raised by an agent's own code
        ├── CallError            a call cannot be made, or its result cannot be stored
        │   ├── Expired          nobody has answered a question of an agent that was called
        │   └── Uncertain        a call that may be executed only once was started, and its end is not recorded
        ├── InvalidOutput        the result does not match the output signature
        ├── InvalidHandoff       the next agent does not exist, or its inputs are missing
        ├── Unstorable           a record has a value that the store cannot write
        ├── Unreadable           the run's record is damaged
        ├── ResultTooLarge       the result exceeds ``max_result_bytes``
        ├── TooManySteps         the run exceeds ``max_steps``
        ├── TooManyTokens        the run has spent ``max_tokens``
        ├── CostLimit            the run has spent ``max_cost``
        ├── QueueTimeout         the run waited longer than ``queue_timeout_s`` for its first step
        ├── Interrupted          the process died during a step that must not be repeated
        ├── ChangedProgram       a step that runs again makes other calls than before
        └── ModelError           a model call failed; ``error_type`` has the reason

``flockapi.py`` maps each class to an HTTP status by its MRO. A ``StepError`` has no status: a failed run is a valid
response, not a failed request.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from flock.nearest import did_you_mean

#: Max errors in the message of an ``InvalidData``; ``errors`` has all of them.
MAX_LISTED_ERRORS = 10
#: Max characters of a client's text that a message repeats.
MAX_ECHOED_CHARS = 100
#: Max length, in bytes of UTF-8, of a text that is stored or sent: an error, a pointer, or a progress message.
MAX_TEXT_BYTES = 8 * 1024
#: Marks the end of a truncated text.
CUT = "… (cut)"


#: Each ``error_type`` that is not an agent's own; docs/errors.md has its cause, and what helps.
ERROR_TYPES: frozenset[str] = frozenset(
    """
    agent_error agent_exception call_error uncertain invalid_output invalid_handoff invalid_input result_too_large
    too_many_steps too_many_tokens cost_limit timeout queue_timeout expired cancelled interrupted crashed
    changed_program unstorable unreadable payload_lost model_not_configured model_authentication model_not_found
    model_bad_request model_context_length model_content_filter model_refusal model_rate_limited model_quota
    model_unavailable model_timeout model_truncated model_bad_response max_failures not_chosen
    """.split()
)
#: The types of model errors that all calls of the same models have until somebody does something about it.
LASTING_ERRORS = ("model_not_configured", "model_authentication", "model_not_found", "model_quota")


def cut(text: str) -> str:
    """Return *text*, truncated and marked if it is longer than ``MAX_TEXT_BYTES``."""
    if len(text) * 4 <= MAX_TEXT_BYTES:
        return text
    start = text[:MAX_TEXT_BYTES].encode("utf-8", "replace")
    if len(text) <= MAX_TEXT_BYTES and len(start) <= MAX_TEXT_BYTES:
        return text
    return start[: MAX_TEXT_BYTES - len(CUT.encode())].decode("utf-8", "ignore") + CUT


class FlockError(Exception):
    """The base class of all errors that this package raises on purpose."""


class DefinitionError(FlockError):
    """An agent or a flock is defined incorrectly."""


class SignatureError(DefinitionError):
    """A signature is invalid.

    Attributes:
        column: position of the error in the signature's text, from 1; None if the signature is not a text.
    """

    def __init__(self, message: str, column: int | None = None) -> None:
        super().__init__(message if column is None else f"{message} (column {column})")
        self.column = column


class MalformedJSON(FlockError):
    """A text is not valid JSON.

    Attributes:
        line, column: position of the error, both from 1; the column counts characters.
    """

    def __init__(self, reason: str, line: int, column: int) -> None:
        super().__init__(f"Not valid JSON: {reason} at line {line}, column {column}.")
        self.line = line
        self.column = column


class FieldError(msgspec.Struct, frozen=True, kw_only=True):
    """One problem in JSON data: a description, and its location as a JSON pointer (RFC 6901).

    If the data has lines, ``line`` is the line, and the pointer is relative to it. A long detail or pointer is
    truncated.
    """

    detail: str
    pointer: str
    line: int | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        for name in ("detail", "pointer"):
            msgspec.structs.force_setattr(self, name, cut(getattr(self, name)))

    def __str__(self) -> str:
        line = "" if self.line is msgspec.UNSET else f"line {self.line}"
        return ": ".join(filter(None, [" ".join(filter(None, [line, self.pointer])), self.detail]))


class InvalidData(FlockError):
    """JSON does not match the expected type. ``errors`` has one entry per problem, at least one."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        listed = [str(error) for error in errors[:MAX_LISTED_ERRORS]]
        more = [f"and {len(errors) - MAX_LISTED_ERRORS} more"] if len(errors) > MAX_LISTED_ERRORS else []
        super().__init__(cut("; ".join(listed + more)))
        self.errors = list(errors)

    @classmethod
    def of(cls, detail: str, pointer: str = "", line: int | msgspec.UnsetType = msgspec.UNSET) -> "InvalidData":
        """Return the error for a single problem."""
        return cls([FieldError(detail=detail, pointer=pointer, line=line)])


class NotFound(FlockError):
    """There is nothing with the requested name or id."""


class AgentNotFound(NotFound):
    """There is no agent with that name. The message lists the known agents."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        listed = ", ".join(known) or "none yet (add one with flock.add_agent(...))"
        echoed = name[:MAX_ECHOED_CHARS]
        super().__init__(f"There is no agent {echoed!r}.{did_you_mean(echoed, known)} Known agents: {listed}.")


class RunNotFound(NotFound):
    """There is no run with that id, or it is no longer stored."""

    def __init__(self, run_id: str) -> None:
        echoed = run_id[:MAX_ECHOED_CHARS]
        reason = "To start one, use POST." if run_id == "flock" else "It was never accepted, or is no longer stored."
        super().__init__(f"There is no run with the id {echoed!r}. {reason}")


class CallNotFound(NotFound):
    """The run does not ask a question with that id, and has not asked it before."""

    def __init__(self, run_id: str, call_id: str) -> None:
        echoed = call_id[:MAX_ECHOED_CHARS]
        super().__init__(
            f"The run {run_id} does not ask a question with the id {echoed!r}. Its open questions are in waiting_for."
        )


class BatchNotFound(NotFound):
    """There is no batch with that id, or it is no longer stored."""

    def __init__(self, batch_id: str) -> None:
        echoed = batch_id[:MAX_ECHOED_CHARS]
        super().__init__(f"There is no batch with the id {echoed!r}. It was never accepted, or is no longer stored.")


class SessionNotFound(NotFound):
    """The session has no runs, or they are no longer stored."""

    def __init__(self, session_id: str) -> None:
        echoed = session_id[:MAX_ECHOED_CHARS]
        super().__init__(f"There are no runs with the session id {echoed!r}, or they are no longer stored.")


class EngineFull(FlockError):
    """A queue is full. Retry after ``retry_after_s`` seconds."""

    retry_after_s = 1


class TooManyRequests(FlockError):
    """A caller exceeds its share; ``headers`` describe the limit. Retry after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: int = 1, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.headers = headers or {}


class TooLarge(FlockError):
    """The request exceeds a size limit."""


class EngineStopped(FlockError):
    """The engine does not accept work: it is not running, or is shutting down."""

    def __init__(
        self, message: str = "The engine is not running. Enter it with 'async with', or run the app's lifespan."
    ) -> None:
        super().__init__(message)


class AccessDenied(FlockError):
    """The base class of errors about the caller's identity or origin."""


class Unauthenticated(AccessDenied):
    """The API key is missing or unknown, or ``auth=`` found no user."""


class Forbidden(AccessDenied):
    """The caller does not have permission."""


class WrongHost(AccessDenied):
    """The request's Host header does not name this server."""


class Conflict(FlockError):
    """The request conflicts with the current state of the run or batch."""

    @classmethod
    def continued(cls, run_id: str) -> "Conflict":
        """Return the error for a run that would continue a session as *run_id* has."""
        return cls(f"The later run {run_id} has continued this session. Continue that one.")


class StaleAnswer(Conflict):
    """The question that is answered is no longer open. ``open_questions`` are those of the run that are."""

    def __init__(self, message: str, open_questions: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.open_questions = open_questions


class KeyInUse(Conflict):
    """Another request with the same idempotency key is being accepted. Send this one again."""

    def __init__(self, key: str) -> None:
        super().__init__(f"A request with the idempotency key {key!r} is still being accepted. Try again in a moment.")


class KeyReused(FlockError):
    """An idempotency key was already used for a different request."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The idempotency key {key!r} was already used for a different request. Send a new key for a new request."
        )


class Replayed(FlockError):
    """The request was already accepted. ``made_id`` is the id of the run or batch that it created."""

    def __init__(self, made_id: str) -> None:
        super().__init__(f"This request was already accepted as {made_id}.")
        self.made_id = made_id


class StoreError(FlockError):
    """The store cannot be opened, read or written at the moment. No acknowledged work is lost."""


class OwnershipLost(FlockError):
    """Another engine now owns the run, so this engine must stop working on it."""

    def __init__(self, run_id: str) -> None:
        super().__init__(f"The run {run_id} now belongs to another engine.")


class RunFailed(FlockError):
    """A run failed. ``str()`` is its ``error``; ``error_type`` is one of ``ERROR_TYPES``, or the agent's own."""

    def __init__(self, error: str, error_type: str) -> None:
        super().__init__(error)
        self.error_type = error_type


class StepError(FlockError):
    """An error that fails the run. Its text is sent to the client, or ``shown``; ``log_detail`` is only logged."""

    error_type: str = "step_error"
    log_detail: str = ""
    shown: str = ""


class AgentError(StepError):
    """Raise this in an agent to fail its run with a message for the client.

    The text of any other exception is only logged. Subclasses may set their own ``error_type``.
    """

    error_type = "agent_error"


class CallError(StepError):
    """A call of a step cannot be made, or its result cannot be stored. The message names the call."""

    error_type = "call_error"


class Expired(CallError):
    """Nobody has answered a question of an agent that was called, in time; see ``RunContext.ask``."""

    error_type = "expired"


class Uncertain(CallError):
    """A call that may be executed only once was started, and its end is not stored; see ``call_once``."""

    error_type = "uncertain"


class InvalidOutput(StepError):
    """An agent's result does not match its output signature, or cannot be encoded as JSON."""

    error_type = "invalid_output"


class InvalidHandoff(StepError):
    """The next agent does not exist, or the inputs and results so far do not match its inputs."""

    error_type = "invalid_handoff"


class Unstorable(StepError):
    """SQLite rejects a value of one record: its type, range, size or encoding. Other records can be written."""

    error_type = "unstorable"


class Unreadable(StepError):
    """The run's record was found to be damaged when it was read back from the store.

    Attributes:
        is_writable: False if its final status cannot be written either.
    """

    error_type = "unreadable"
    is_writable = True


class ResultTooLarge(StepError):
    """An agent's result is too long. It is not truncated, because part of a JSON object is not valid JSON."""

    error_type = "result_too_large"


class TooManySteps(StepError):
    """The run exceeds ``max_steps``."""

    error_type = "too_many_steps"


class TooManyTokens(StepError):
    """The run tried to call a model after it had spent ``max_tokens``."""

    error_type = "too_many_tokens"


class CostLimit(StepError):
    """The run tried to call a model after it had spent ``max_cost``, or to call a model without a price.

    Attributes:
        limit: what is spent: "max_cost", or the "max_cost_per_day" of its principal. None if a model has no price.
    """

    error_type = "cost_limit"

    def __init__(self, message: str, limit: str | None = None) -> None:
        super().__init__(message)
        self.limit = limit


class QueueTimeout(StepError):
    """The run waited longer than ``queue_timeout_s`` for its first step."""

    error_type = "queue_timeout"


class Interrupted(StepError):
    """The process died while an agent with ``on_interrupt="fail"`` was running."""

    error_type = "interrupted"


class ChangedProgram(StepError):
    """A step that runs again makes other calls than before, because its program was changed."""

    error_type = "changed_program"


class ModelError(StepError):
    """A model call failed, after its retries.

    Attributes:
        error_type: one of ``ERROR_TYPES``.
        log_detail: the provider's message and request id. They are only logged, because they may contain anything.
        usage, model: the tokens of an answer that cannot be used (a ``Usage``), and the model that has counted them.
        is_lasting: whether every call of the same models would fail in this way. None if one error does not prove it:
            some providers also answer 403 to single requests.
    """

    usage: Any = None
    model: str = ""
    is_lasting: bool | None = False

    ERROR_TYPES: ClassVar = frozenset(name for name in ERROR_TYPES if name.startswith("model_"))

    def __init__(self, message: str, error_type: str, log_detail: str = "") -> None:
        super().__init__(message)
        self.error_type = error_type
        self.log_detail = log_detail
        self.is_lasting = error_type in LASTING_ERRORS
