"""Replies of a model server: a chat completion, or an error."""

import email.utils
import json
import math
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from flock.errors import ModelError
from flock.models.bodies import Whole
from flock.models.completions import Completion, FunctionCall, ToolCall
from flock.models.requests import Request
from flock.runs import Usage, safe_text

if TYPE_CHECKING:
    import httpx

#: Max characters of a provider's message in the log.
MAX_LOGGED_CHARS = 500
#: The largest number of tokens that a reply may have used. A larger one is ignored.
MAX_TOKENS = 10**12
#: Longer integers in a reply are out of range.
MAX_DIGITS = 500
#: A number in a header. Others, such as ``1e400`` and digits of other scripts, are ignored.
NUMBER = r"[0-9]{1,15}(\.[0-9]{1,15})?"


class _AnswerFunction(msgspec.Struct):
    name: str | None = None
    arguments: Any = None


class _AnswerCall(msgspec.Struct):
    function: _AnswerFunction
    id: str | None = None


class _AnswerMessage(msgspec.Struct):
    content: str | list[Any] | None = None
    refusal: str | None = None
    tool_calls: list[_AnswerCall] | None = None


class _Choice(msgspec.Struct):
    message: _AnswerMessage
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]
    # Any: an answer must not be lost because of a detail.
    usage: dict[str, Any] | None = None


_DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < MAX_DIGITS else math.inf)


def decoded(reply: bytes) -> Any:
    """Decode JSON. An integer with too many digits for Python becomes infinite.

    Raises: ValueError, RecursionError.
    """
    return _DECODER.decode(reply.decode(json.detect_encoding(reply), "surrogatepass"))


def completion_of(answer: Any, request: Request) -> Completion:
    """Return the answer in a 200 response. Some of these are failures that the providers' clients return as success."""
    name = request.name
    if isinstance(answer, dict) and answer.get("error"):
        raise bad_response(name, "returned status 200 with an error in the body", str(answer["error"]))
    try:
        parsed = msgspec.convert(answer, _Answer)
    except msgspec.ValidationError as exc:
        raise bad_response(name, "returned status 200 without a valid chat completion", str(exc)) from exc
    usage = _usage_of(parsed.usage)
    try:
        return _completion_of(parsed, usage, request)
    except ModelError as exc:
        exc.usage, exc.model = usage, name
        raise


def _completion_of(parsed: _Answer, usage: Usage, request: Request) -> Completion:
    name = request.name
    if not parsed.choices:
        raise bad_response(name, "returned no choices", "choices: []")
    choice = parsed.choices[0]
    if choice.finish_reason == "content_filter":
        raise model_error(name, "model_content_filter", "was blocked by its provider's content filter")
    if choice.message.refusal:
        raise model_error(name, "model_refusal", "declined to answer", choice.message.refusal)
    if choice.finish_reason == "length":
        raise model_error(
            name,
            "model_truncated",
            "was cut off at its token limit. Raise max_tokens, or ask for a shorter answer",
            "length",
        )
    text, calls = text_of(choice.message.content), (choice.message.tool_calls or ()) if request.tools else ()
    if calls and not isinstance(text, str):
        text = ""
    if not isinstance(text, str) or not (calls or text.strip()):
        raise bad_response(name, "returned an empty answer", f"finish_reason {choice.finish_reason}")
    return Completion(
        text=_without_fence(safe_text(text)),
        usage=usage,
        tool_calls=tuple(_tool_call(call, number) for number, call in enumerate(calls)),
        model=name,
    )


def text_of(content: Any) -> Any:
    """Return the text of an answer. Reasoning models of Mistral send it in parts, beside their thoughts."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _usage_of(sent: Any) -> Usage:
    """Return the token counts in a response. DeepSeek has a name of its own for tokens from the cache."""
    cached = token_count(sent, "prompt_tokens_details", "cached_tokens")
    return Usage(
        input_tokens=token_count(sent, "prompt_tokens"),
        output_tokens=token_count(sent, "completion_tokens"),
        cached_tokens=cached or token_count(sent, "prompt_cache_hit_tokens"),
        reasoning_tokens=token_count(sent, "completion_tokens_details", "reasoning_tokens"),
    )


def unfinished_usage(sent: Any, input_tokens: int, output_tokens: int) -> Usage:
    """Return the tokens of a reply that was not read to its end: at least what was *sent*, or else the estimates."""
    counted = _usage_of(sent)
    usage = replace(
        counted,
        input_tokens=counted.input_tokens or input_tokens,
        output_tokens=max(counted.output_tokens, output_tokens),
    )
    known, total = (of.input_tokens + of.output_tokens for of in (counted, usage))
    return replace(usage, estimated_tokens=total - known)


def token_count(sent: Any, *path: str) -> int:
    """Return the number of tokens at *path* in what a server has sent, or 0 if there is none."""
    for name in path:
        sent = sent.get(name) if isinstance(sent, dict) else None
    is_count = isinstance(sent, int | float) and 0 <= sent <= MAX_TOKENS and sent == int(sent)
    return int(sent) if is_count else 0


def _tool_call(call: _AnswerCall, number: int) -> ToolCall:
    """Return a call with its arguments as text. Some servers send them as an object, and omit the id."""
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments)
    function = FunctionCall(name=safe_text(call.function.name or ""), arguments=safe_text(arguments) or "{}")
    return ToolCall(id=safe_text(call.id or f"call_{number}"), function=function)


def _without_fence(text: str) -> str:
    """Remove a code fence. Models without a JSON mode often put JSON between ```json and ```."""
    match = re.fullmatch(r"\s*```\w*\s*\n(.*?)\s*```\s*", text, re.DOTALL)
    return match[1] if match else text


# Errors

#: Errors for which a retry may succeed.
TRANSIENT = ("model_timeout", "model_unavailable", "model_rate_limited")

#: By status: the type of the error, what the model did, and what to do.
_STATUS_ERRORS: Mapping[int, tuple[str, str, str]] = {
    401: ("model_authentication", "rejected the API key", "Set a valid key"),
    403: ("model_authentication", "is not available to this API key", "Use another key or another model"),
    404: ("model_not_found", "does not exist at this provider", "Check its name"),
    408: ("model_unavailable", "timed out at its provider", "Try again later"),
    409: ("model_unavailable", "was busy with a conflicting request", "Try again later"),
    429: ("model_rate_limited", "is over its rate limit", "Try again later"),
}
_BAD_REQUEST = "model_bad_request", "rejected the request", "Check the inputs and the options of the model"
_FAILED = "model_unavailable", "failed", "Try again later"

#: Errors by the text of the body, for any status: providers use the same texts with different statuses.
_BODY_ERRORS: Mapping[str, tuple[str, str, str]] = {
    r"insufficient_quota": ("model_quota", "has no quota left", "Check the plan and billing of this API key"),
    r"context_length_exceeded|exceed_context_size|maximum context length": (
        "model_context_length",
        "received an input that exceeds its context window",
        "Send shorter inputs",
    ),
    r"content_filter|content_policy": (
        "model_content_filter",
        "was blocked by its provider's content filter",
        "Change the inputs or the instructions",
    ),
}


def status_error(name: str, response: "httpx.Response | Whole", key_variable: str | None = None) -> ModelError:
    message, status = provider_message(response), response.status_code
    error_type, reason, remedy = _kind_of(status, response.text)
    if status == 401 and key_variable is not None:
        reason += f" in {key_variable}"
    error = model_error(name, error_type, f"{reason} (HTTP {status}). {remedy}", message)
    error.is_lasting = error.is_lasting and (None if status == 403 else True)
    return error


def stream_error(name: str, error: Any) -> ModelError:
    """Return the error that a server has sent as an event, after status 200. Some have a status as their code."""
    error = error.get("error") or error if isinstance(error, Mapping) else error
    code, text = error.get("code") if isinstance(error, Mapping) else None, json.dumps(error)
    error_type, reason, remedy = _kind_of(code if isinstance(code, int) and 400 <= code < 600 else 500, text)
    detail = _without_keys(text[:MAX_LOGGED_CHARS])
    return model_error(name, error_type, f"{reason} (reported in its stream). {remedy}", detail)


def _kind_of(status: int, text: str) -> tuple[str, str, str]:
    """Return the type and the reason of an error with this status and body, and its remedy."""
    kinds = [kind for pattern, kind in _BODY_ERRORS.items() if re.search(pattern, text)]
    return kinds[-1] if kinds else _STATUS_ERRORS.get(status, _FAILED if status >= 500 else _BAD_REQUEST)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the requested wait: ``Retry-After`` in seconds or as a date (RFC 9110, section 10.2.3), or its ms form."""
    value = headers.get("retry-after", "")
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif value.strip()[:1].isdecimal():
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, OverflowError):
        return None
    return max(0.0, seconds)


#: What OpenAI's and Anthropic's headers count.
COUNTED = ("requests", "tokens", "input-tokens", "output-tokens")


def hold_s(headers: Mapping[str, str], *, is_refused: bool, tokens: float = 0) -> float:
    """Return how long to wait if a limit is used up, according to the headers: ``x-ratelimit-remaining-requests``,
    ``anthropic-ratelimit-tokens-reset`` and the like. 0 if something is left.

    A limit is replenished evenly until its reset. So after an answer, the next call only has to wait for its own share.
    """
    longest = 0.0
    for counted in COUNTED:
        for prefix, suffix in (("x-ratelimit-", f"-{counted}"), (f"anthropic-ratelimit-{counted}-", "")):
            if headers.get(f"{prefix}remaining{suffix}", "").strip() != "0":
                continue
            wait_s = _reset_s(headers.get(f"{prefix}reset{suffix}", ""))
            limit = headers.get(f"{prefix}limit{suffix}", "").strip()
            if not is_refused and re.fullmatch(NUMBER, limit) and float(limit):
                wait_s *= min(1.0, (1 if counted == "requests" else tokens) / float(limit))
            longest = max(longest, wait_s)
    return longest


def _reset_s(text: str) -> float:
    """Return the seconds until a reset: ``1s``, ``6m0s``, ``12ms``, seconds, or a time (RFC 3339); 0 if invalid."""
    units = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001, "": 1.0}
    parts = re.findall(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(ms|[hms]|$)", text)
    if parts and "".join(map("".join, parts)) == text:
        return sum(float(number) * units[unit] for number, unit in parts)
    try:
        return max(0.0, datetime.fromisoformat(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def provider_message(response: "httpx.Response | Whole") -> str:
    """Return the provider's message for the log, without API keys."""
    request_id = response.headers.get("x-request-id", "none")
    return _without_keys(f"x-request-id {request_id}: {response.text[:MAX_LOGGED_CHARS]!r}")


def _without_keys(text: str) -> str:
    return re.sub(r"\b(sk|gsk|fk)[-_][\w*.-]+", r"\1-…", text)


def model_error(name: str, error_type: str, reason: str, log_detail: str = "") -> ModelError:
    return ModelError(f"The model {name} {reason}.", error_type, log_detail)


def bad_response(name: str, reason: str, log_detail: str = "") -> ModelError:
    return model_error(name, "model_bad_response", reason, log_detail)
