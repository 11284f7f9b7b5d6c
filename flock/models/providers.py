"""Model providers: the URL of each, the environment variable of its key, and what it supports.

A model is named ``provider/model``. All built-in providers support OpenAI's ``/chat/completions``, and so do the small
model in this process, and a provider with an address: ``{NAME}_BASE_URL``. Others are called through litellm, if it is
installed.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import anyio.to_thread
import msgspec

from flock.errors import DefinitionError, ModelError
from flock.extras import pip_install
from flock.models import localmodel
from flock.models.models import Model, models_of
from flock.nearest import did_you_mean


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A server that supports chat completions, and what it does not support.

    Attributes:
        base_url: the URL without ``/chat/completions``. The environment variable ``{NAME}_BASE_URL`` overrides it.
        url_variables: other environment variables with the URL, if each customer has their own.
        key_variable: the environment variable with the key; None if no key is needed.
        other_key_variables: other names of that variable.
        key_header: the header with the key, if it is not ``Authorization``.
        max_tokens_field: the name of the request field that limits the answer's length.
        first_format: the strictest way to request JSON that it supports; see ``flock.models.requests.FORMATS``.
        fixed_temperature: a pattern of the models that reject ``temperature``, or None.
        strict: a pattern of the models that are known to enforce schemas in OpenAI's strict mode, or None.
        has_batches: it has OpenAI's batch endpoint, ``/files`` and ``/batches``.
        api_version: if it has a URL for each deployment, with this version unless ``{NAME}_OPENAI_API_VERSION`` is set.
    """

    base_url: str = ""
    url_variables: tuple[str, ...] = ()
    key_variable: str | None = None
    other_key_variables: tuple[str, ...] = ()
    key_header: str | None = None
    max_tokens_field: str = "max_tokens"
    first_format: str = "json_schema"
    fixed_temperature: str | None = None
    strict: str | None = None
    has_batches: bool = False
    api_version: str | None = None


#: OpenAI's reasoning models.
REASONING = r"(o\d|gpt-[5-9](?!\S*chat))\S*"

PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider(
        base_url="https://api.openai.com/v1",
        key_variable="OPENAI_API_KEY",
        max_tokens_field="max_completion_tokens",
        fixed_temperature=REASONING,
        strict=r"(gpt-4o|gpt-4\.1|gpt-[5-9]|o[1-9])\S*",
        has_batches=True,
    ),
    # It ignores response_format and strict, so the format is requested in words.
    "anthropic": Provider(
        base_url="https://api.anthropic.com/v1", key_variable="ANTHROPIC_API_KEY", first_format="text"
    ),
    "gemini": Provider(
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        key_variable="GEMINI_API_KEY",
        other_key_variables=("GOOGLE_API_KEY",),
    ),
    "azure": Provider(
        url_variables=("AZURE_OPENAI_ENDPOINT", "AZURE_API_BASE"),
        key_variable="AZURE_OPENAI_API_KEY",
        other_key_variables=("AZURE_API_KEY",),
        key_header="api-key",
        max_tokens_field="max_completion_tokens",
        fixed_temperature=REASONING,
        api_version="2024-10-21",
    ),
    "openrouter": Provider(base_url="https://openrouter.ai/api/v1", key_variable="OPENROUTER_API_KEY"),
    "groq": Provider(base_url="https://api.groq.com/openai/v1", key_variable="GROQ_API_KEY", has_batches=True),
    "mistral": Provider(base_url="https://api.mistral.ai/v1", key_variable="MISTRAL_API_KEY"),
    "deepseek": Provider(
        base_url="https://api.deepseek.com/v1", key_variable="DEEPSEEK_API_KEY", first_format="json_object"
    ),
    "together": Provider(base_url="https://api.together.xyz/v1", key_variable="TOGETHER_API_KEY"),
    "xai": Provider(
        base_url="https://api.x.ai/v1", key_variable="XAI_API_KEY", max_tokens_field="max_completion_tokens"
    ),
    "fireworks": Provider(base_url="https://api.fireworks.ai/inference/v1", key_variable="FIREWORKS_API_KEY"),
    "cerebras": Provider(
        base_url="https://api.cerebras.ai/v1", key_variable="CEREBRAS_API_KEY", max_tokens_field="max_completion_tokens"
    ),
    "nvidia": Provider(base_url="https://integrate.api.nvidia.com/v1", key_variable="NVIDIA_API_KEY"),
    "ollama": Provider(base_url="http://127.0.0.1:11434/v1"),
    "vllm": Provider(base_url="http://127.0.0.1:8000/v1"),
    "llamacpp": Provider(base_url="http://127.0.0.1:8080/v1"),
}

BUILT_IN = (*PROVIDERS, "local")

#: Headers for the organisation and project at OpenAI, by the environment variable with the value.
OPENAI_HEADERS = {"OPENAI_ORG_ID": "OpenAI-Organization", "OPENAI_PROJECT_ID": "OpenAI-Project"}


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The URL of one model, and the settings for calling it.

    Attributes:
        key_variable: the environment variable that the key is from; None if there is no key, or the program has it.
        may_be_strict: False if the program wants no strict mode; see ``Model``.
        has_cache_marks: whether parts of a prompt are marked that the provider is to cache.
        strips_metadata: whether images are sent without their metadata; see ``Model``.
        account: identifies the server and the key, whose limits all its calls share.
        limits: the limits that the program has named; see ``Model.limits``.
    """

    name: str
    model: str
    url: str
    headers: Mapping[str, str]
    max_tokens_field: str
    settings: Mapping[str, Any] = {}
    is_local: bool = False
    first_format: str = "json_schema"
    has_temperature: bool = True
    may_be_strict: bool = True
    has_cache_marks: bool = False
    strips_metadata: bool = False
    key_variable: str | None = None
    account: tuple[str, str, bytes]
    limits: tuple[int | None, int | None, int | None] = (None, None, None)

    @property
    def provider(self) -> str:
        return self.account[0]


def check_model(choice: str | Model | None) -> None:
    """Raise the ModelError that each call of a model would raise with the current setup of this process.

    It sends no request and loads no weights. If litellm is installed, any other provider is accepted, unless its name
    looks like a misspelling of a built-in one, because only litellm knows its own providers.
    """
    if not choice:
        raise no_model()
    [model] = models_of(choice, "the call")
    if not is_built_in(model):
        if not _has_litellm() or did_you_mean(model.provider, BUILT_IN, MISSPELLING_CUTOFF):
            raise unknown_provider(model.name)
    elif _is_local(model):
        localmodel.check(_own_name(model))
    else:
        _own_name(model)
        _key_of(model)
        _base_url_of(model)


#: Min similarity of a misspelled name to the correct one. No provider of litellm is this similar to a built-in one.
MISSPELLING_CUTOFF = 0.88


def _has_litellm() -> bool:
    return importlib.util.find_spec("litellm") is not None


def no_model() -> ModelError:
    return _not_configured("no model is set. Pass model= to the agent or to Flock, or set FLOCK_MODEL")


def is_built_in(model: Model) -> bool:
    """Whether *model* is called without litellm: its provider is built in, or its address is known."""
    return model.provider in BUILT_IN or _own_url(model) is not None


def check_batch(models: Sequence[Model], owner: str, *, has_tools: bool, has_files: bool) -> None:
    """Raise DefinitionError if one of *models* is to be called through a batch endpoint, and cannot be."""
    for model in models:
        if model.batch and _own_url(model) is None and not _provider_of(model).has_batches:
            names = [name for name, provider in PROVIDERS.items() if provider.has_batches]
            raise DefinitionError(
                f"{model.provider!r} of {owner} has no batch endpoint that is supported (batch=True, --batch-api). "
                f"These have one: {', '.join(names)}, and any server with OpenAI's /files and /batches (base_url=)."
            )
        if model.batch and (has_tools or has_files):
            reason = "tools, and each of their results needs another call" if has_tools else "files as inputs"
            raise DefinitionError(
                f"{owner} has {reason}, so {model.name!r} cannot be called through a batch endpoint. Omit batch=True "
                "or --batch-api."
            )


def target_of(model: Model) -> str:
    """Return what identifies a model and its server in a store. Raises ModelError."""
    return f"{model.name} {_base_url_of(model)}"


def _is_local(model: Model) -> bool:
    return model.provider == "local" and _own_url(model) is None


def _own_url(model: Model) -> str | None:
    """Return the address that the program or the environment gives for *model*."""
    if model.base_url:
        return model.base_url
    return (os.environ.get(f"{_in_variables(model)}_BASE_URL") or None) if model.provider != model.name else None


def _in_variables(model: Model) -> str:
    """Return the name of the provider as it is in the names of environment variables."""
    return re.sub(r"\W", "_", model.provider).upper()


def _provider_of(model: Model) -> Provider:
    return PROVIDERS.get(model.provider, Provider())


def enforces_schemas(model: Model) -> bool:
    """Whether *model* enforces the schema of an output; see ``Model``."""
    if model.strict is not None:
        return model.strict
    pattern = None if model.base_url else _provider_of(model).strict
    return pattern is not None and re.fullmatch(pattern, model.name.partition("/")[2]) is not None


def _own_name(model: Model) -> str:
    """Return the name after that of the provider."""
    name = model.name.partition("/")[2]
    if not name:
        raise _not_configured(f"{model.name!r} has no model name. Write provider/model, such as openai/gpt-4o")
    return name


def _key_of(model: Model) -> tuple[str, str | None]:
    """Return the API key for *model*, or "" if it needs none, and the environment variable that it is from."""
    if model.api_key:
        return model.api_key, None
    provider = _provider_of(model)
    variable = provider.key_variable or f"{_in_variables(model)}_API_KEY"
    for known in (variable, *provider.other_key_variables):
        if key := os.environ.get(known, "").strip():
            if not re.fullmatch(r"[!-~]+", key):
                raise _not_configured(
                    f"the API key of {model.name!r} in {known} has a space, a line break or a character that is not "
                    "ASCII. Set it again"
                )
            return key, known
    if provider.key_variable and not model.base_url:
        raise _not_configured(f"{model.name!r} needs an API key. Set the environment variable {variable}")
    return "", None


def _base_url_of(model: Model) -> str:
    provider = _provider_of(model)
    found = [os.environ[variable] for variable in provider.url_variables if os.environ.get(variable)]
    base_url = _own_url(model) or provider.base_url or next(iter(found), "")
    if not base_url:
        variable = provider.url_variables[0]
        raise _not_configured(
            f"{model.name!r} needs the address of your resource. Set the environment variable {variable}"
        )
    return base_url.rstrip("/")


async def endpoint_of(model: Model) -> Endpoint:
    provider, own_name = _provider_of(model), _own_name(model)
    settings, is_local = model.extra_body, _is_local(model)
    if is_local:
        # In a thread, because loading weights is slow. If cancelled, loading continues for the next caller.
        server = await anyio.to_thread.run_sync(localmodel.serve, own_name, abandon_on_cancel=True)
        base_url, key, key_variable = server.base_url, server.key, None
        settings = {**localmodel.SETTINGS, "max_tokens": localmodel.MAX_TOKENS, **settings}
    else:
        (key, key_variable), base_url = _key_of(model), _base_url_of(model)
    headers = {"Content-Type": "application/json"}
    if key:
        headers |= {provider.key_header: key} if provider.key_header else {"Authorization": f"Bearer {key}"}
    if model.provider == "openai":
        headers |= {header: os.environ[name] for name, header in OPENAI_HEADERS.items() if os.environ.get(name)}
    url = f"{base_url}/chat/completions"
    if provider.api_version is not None:
        variables = [f"{_in_variables(model)}_{end}" for end in ("OPENAI_API_VERSION", "API_VERSION")]
        version = next(filter(None, map(os.environ.get, variables)), provider.api_version)
        url = f"{base_url}/openai/deployments/{own_name}/chat/completions?api-version={version}"
    return Endpoint(
        name=model.name,
        model=own_name,
        url=url,
        headers={**headers, **model.headers},
        max_tokens_field=provider.max_tokens_field,
        settings=settings,
        is_local=is_local,
        first_format=provider.first_format,
        has_temperature=not (provider.fixed_temperature and re.fullmatch(provider.fixed_temperature, own_name)),
        may_be_strict=model.strict is not False,
        has_cache_marks=model.provider == "openrouter" and "claude" in own_name,
        strips_metadata=model.strip_metadata,
        key_variable=key_variable,
        account=(model.provider, base_url, hashlib.sha256(key.encode()).digest()),
        limits=model.limits,
    )


def _not_configured(reason: str) -> ModelError:
    return ModelError(f"The model cannot be called: {reason}.", "model_not_configured")


def unknown_provider(name: str) -> ModelError:
    provider = name.partition("/")[0]
    reason = f"the provider {provider!r} of {name!r} is not built in.{did_you_mean(provider, BUILT_IN)}"
    if provider == name:
        reason = f"{name!r} has no provider. Write provider/model, such as openai/gpt-4o."
    more = "" if _has_litellm() else f" For 100 more providers: {pip_install('litellm')}"
    known = f"The built-in providers are {', '.join(BUILT_IN)}."
    return ModelError(f"The model cannot be called: {reason} {known}{more}", "model_not_configured")
