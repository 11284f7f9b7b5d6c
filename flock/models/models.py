"""Models as programs name them: one, or several of which the next is asked if one cannot answer."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec.structs import force_setattr

from flock.errors import DefinitionError
from flock.options import Option, Options, of_type, whole


def _is_text(value: Any, pattern: str) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _are_headers(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_text(name, r"[!#$%&'*+.^`|~\w-]+") and _is_text(text, r"[\t\x20-\x7e]*") for name, text in value.items()
    )


def _is_json_object(value: Any) -> bool:
    try:
        msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return isinstance(value, Mapping)


_NAME = Option(
    is_valid=lambda value: _is_text(value, r"[^/\s]+/\S+"), words="a name such as 'openai/gpt-4o': provider/model"
)
_URL = Option(is_valid=lambda value: _is_text(value, r"https?://[^\s?#]+"), words="a URL that begins with http(s)://")
_KEY = Option(is_valid=lambda value: _is_text(value, r"[\x21-\x7e]+"), words="a key without spaces", is_secret=True)
_HEADERS = Option(is_valid=_are_headers, words="a mapping of header names to texts", is_secret=True)
_BODY = Option(is_valid=_is_json_object, words="a mapping that can be converted to JSON", is_secret=True)


class _Named(Options, frozen=True):
    name: Annotated[str, _NAME]


class Model(_Named, frozen=True, kw_only=True):
    """A model with its limits and its address. It can be used wherever a model's name can.

    Equal models share their limits, over all runs and batch items of a process.

    Args:
        name: ``provider/model``.
        requests_per_minute: max calls per minute, evenly spread.
        tokens_per_minute: max input and output tokens per minute. A call is estimated before, and corrected after it.
        max_concurrency: max calls at the same time.
        base_url: the address of a server with OpenAI's API, without ``/chat/completions``. The provider's name is then
            free.
        api_key: the key; None reads the provider's environment variable.
        headers: additional headers of each request.
        extra_body: additional members of each request's body.
        strict: whether the model enforces the schema of an output, in the strict mode of OpenAI. Then an output that
            this mode does not allow is an error at the definition. False asks without it, and allows any output. None
            means True for the models of OpenAI that are known to have it; others are asked for it if it is possible.
        strip_metadata: whether images (JPEG, PNG, WebP) are sent without EXIF, such as the place where they were taken,
            XMP and comments. The orientation and the picture stay.
        batch: whether the calls of a batch's items go through the provider's batch endpoint, at the price of that. The
            first answer of a step does; a repair, and the calls of single runs, are normal calls. See
            ``docs/batch-prices.md``.
        batch_fallback: whether a call that the endpoint could not make, or not in time, is made again as a normal one.

    Raises: DefinitionError if a value is invalid.
    """

    TAKEN_BY: ClassVar[str] = "Model"

    requests_per_minute: Annotated[int | None, whole(1)] = None
    tokens_per_minute: Annotated[int | None, whole(1)] = None
    max_concurrency: Annotated[int | None, whole(1)] = None
    base_url: Annotated[str | None, _URL] = None
    api_key: Annotated[str | None, _KEY] = None
    headers: Annotated[Mapping[str, str], _HEADERS] = {}
    extra_body: Annotated[Mapping[str, Any], _BODY] = {}
    strict: Annotated[bool | None, of_type(bool, "True or False")] = None
    strip_metadata: Annotated[bool, of_type(bool, "True or False")] = False
    batch: Annotated[bool, of_type(bool, "True or False")] = False
    batch_fallback: Annotated[bool, of_type(bool, "True or False")] = True

    def __repr__(self) -> str:
        """Return the name and the limits, since the other members may be secret."""
        limits = [f"{name}={value}" for name, value in zip(_LIMITS, self.limits, strict=True) if value is not None]
        return f"Model({', '.join([repr(self.name), *limits])})"

    def __rich_repr__(self) -> Any:
        yield self.name

    @property
    def provider(self) -> str:
        return self.name.partition("/")[0]

    @property
    def limits(self) -> tuple[int | None, int | None, int | None]:
        return self.requests_per_minute, self.tokens_per_minute, self.max_concurrency


_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")

#: A model, or several in the order in which they are asked. None means the default.
ModelChoice = str | Model | Sequence[str | Model] | None


def models_of(choice: ModelChoice, owner: str) -> tuple[Model, ...]:
    """Return the models of *choice*; none if it is None or "". Raises DefinitionError if it is not a valid choice.

    A name alone may be any text: what is wrong with it is the error of each call.
    """
    models = (choice,) if isinstance(choice, str | Model) else choice
    if models is None or models == ("",):
        return ()
    if not isinstance(models, Sequence) or not all(isinstance(model, str | Model) and model for model in models):
        raise DefinitionError(
            f"model= of {owner} must be a name such as 'openai/gpt-4o', a Model, or a list of these, not {choice!r}."
        )
    if not models:
        raise DefinitionError(f"model= of {owner} is an empty list. Name a model, or omit it.")
    return tuple(_named(model) if isinstance(model, str) else model for model in models)


@functools.lru_cache(maxsize=1000)  # each step names its models
def _named(name: str) -> Model:
    model = Model("any/model")
    force_setattr(model, "name", name)
    return model


def names_of(models: Sequence[Model]) -> list[str]:
    return [model.name for model in models]
