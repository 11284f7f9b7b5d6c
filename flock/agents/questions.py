"""Questions to a person: the JSON Schema of the answer, and the check of an answer against it.

Only the schema of the type is stored, so any process can check an answer, even one without the agent.
"""

import contextlib
import datetime
import decimal
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import msgspec

from flock.agents.signature import Signature
from flock.errors import CallError, FieldError, InvalidData, SignatureError
from flock.jsontype import Field, escape_pointer, explain, unknown_field
from flock.runs import Question

#: What questions, sleeps and awaited messages are called among the calls of their step.
ASK, SLEEP, RECEIVE = "ask", "sleep", "receive"
#: What identifies the wait for the reply to a call of a model. No message has such a name.
BATCH_REPLY = "batch+reply"
#: What ``RunContext.timeout`` is called among them: its deadline, and what waits for it.
TIMEOUT, TIMER = "timeout", "timeout-end"

NOBODY = "Pass on_question= to flock.run and flock.run_batch, or serve the flock and answer over HTTP."
NO_SENDER = "Pass on_question= to flock.run and flock.run_batch, or serve the flock and send it over HTTP."
#: What an answer and a message are called in requests, and in pointers.
OUTPUT, MESSAGE = "output", "message"
REF = "#/$defs/"
SIMPLE_TYPES: Mapping[str, Any] = {"string": str, "integer": int, "number": float, "boolean": bool, "null": None}
FORMATS: Mapping[str, Any] = {
    "date-time": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
    "duration": datetime.timedelta,
    "uuid": uuid.UUID,
    "decimal": decimal.Decimal,
}
#: The names that msgspec gives to limits of JSON Schema.
LIMITS = {
    "minimum": "ge",
    "maximum": "le",
    "exclusiveMinimum": "gt",
    "exclusiveMaximum": "lt",
    "multipleOf": "multiple_of",
    "minLength": "min_length",
    "maxLength": "max_length",
    "pattern": "pattern",
    "minItems": "min_length",
    "maxItems": "max_length",
}


def schema_of(type_: Any) -> msgspec.Raw:
    """Return the JSON Schema of *type_*. Raises CallError if it cannot be read from JSON."""
    try:
        schema = Signature([Field(name=OUTPUT, type=type_)]).schema
    except (SignatureError, TypeError, NameError) as exc:
        raise CallError(f"The answer cannot be of type {type_!r}: {exc}") from exc
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    return msgspec.Raw(msgspec.json.encode(schema["properties"][OUTPUT] | definitions))


def nobody(question: Question) -> None:
    """Raise CallError: the ``Answer`` of a program without people to ask."""
    if question.is_question:
        raise CallError(f"Nobody is here to answer a question of the agent. {NOBODY} The question: {question.question}")
    raise CallError(f"Nobody is here to send the message {question.question!r} to the agent. {NO_SENDER}")


def question_json(text: str, about: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET) -> msgspec.Raw:
    """Return the arguments of the call that asks a question, with the arguments that it is *about*."""
    more = {} if isinstance(about, msgspec.UnsetType) else {"arguments": about}
    return msgspec.Raw(msgspec.json.encode({"question": text, **more}))


def message_json(name: str) -> msgspec.Raw:
    """Return the arguments of the call that receives a message."""
    return msgspec.Raw(msgspec.json.encode({"name": name}))


def check_answer(question: Question, output: msgspec.Raw, name: str = OUTPUT) -> None:
    """Raise InvalidData if *output*, which is valid JSON, does not match the schema of *question*.

    Args:
        name: what it is called; pointers begin with it.
    """
    schema, at = msgspec.json.decode(question.schema), f"/{name}"
    errors = explain(Any, bytes(output), at)  # a number may be out of range
    if errors := errors or list(_errors(msgspec.json.decode(output), schema, at, schema.get("$defs", {}))):
        raise InvalidData(errors)


def _errors(value: Any, schema: Any, at: str, definitions: Mapping[str, Any]) -> Iterator[FieldError]:
    """Yield what is wrong with *value*. The schema is one that msgspec or pydantic has made."""
    schema = definitions[schema["$ref"].removeprefix(REF)] if "$ref" in schema else schema
    if "anyOf" in schema:
        yield from _errors_of_union(value, schema["anyOf"], at, definitions)
    elif "enum" in schema or "const" in schema:
        choices = schema["enum"] if "enum" in schema else [schema["const"]]
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            yield FieldError(detail="This value is not one of the allowed values.", pointer=at)
    elif schema.get("type") == "object":
        yield from _errors_of_members(value, schema, at, definitions)
    elif schema.get("type") == "array":
        yield from _errors_of_items(value, schema, at, definitions)
    elif schema.get("type") in list(SIMPLE_TYPES):  # another schema of the user's own allows any value
        yield from _explain(FORMATS.get(schema.get("format"), SIMPLE_TYPES[schema["type"]]), value, schema, at)


def _errors_of_union(value: Any, choices: Any, at: str, definitions: Mapping[str, Any]) -> Iterator[FieldError]:
    """Yield the errors of the choice that fits best: one of the right type, with few errors."""
    found = [list(_errors(value, choice, at, definitions)) for choice in choices]
    if all(found):
        yield from min(found, key=lambda errors: (errors[0].pointer == at, len(errors)))


def _errors_of_members(value: Any, schema: Any, at: str, definitions: Mapping[str, Any]) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield from _explain(dict, value, {}, at)
        return
    properties, other = schema.get("properties", {}), schema.get("additionalProperties", "properties" not in schema)
    for name, member in value.items():
        pointer = f"{at}/{escape_pointer(name)}"
        if name in properties:
            yield from _errors(member, properties[name], pointer, definitions)
        elif other is False:
            yield unknown_field(properties, pointer)
        elif other is not True:
            yield from _errors(member, other, pointer, definitions)
    for name in schema.get("required", ()):
        if name not in value:
            yield FieldError(detail="This field is required.", pointer=f"{at}/{escape_pointer(name)}")


def _errors_of_items(value: Any, schema: Any, at: str, definitions: Mapping[str, Any]) -> Iterator[FieldError]:
    errors = _explain(list, value, schema, at)
    yield from errors
    if not errors:
        first = schema.get("prefixItems", ())
        for position, item in enumerate(value):
            of_item = first[position] if position < len(first) else schema.get("items") or {}
            yield from _errors(item, of_item, f"{at}/{position}", definitions)


def _explain(type_: Any, value: Any, schema: Any, at: str) -> list[FieldError]:
    """Return the error of *value* as *type_* within the limits of *schema*, in the words of all other errors."""
    limits = {LIMITS[name]: limit for name, limit in schema.items() if name in LIMITS}
    with contextlib.suppress(re.error):  # a pattern of Rust, which the type itself checks in the step
        type_ = Annotated[type_, msgspec.Meta(**limits)] if limits else type_
    return explain(type_, msgspec.json.encode(value), at)
