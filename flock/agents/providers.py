"""Model providers: the URL of each, the environment variable of its key, and what it supports.

A model is named ``provider/model``. All built-in providers support OpenAI's ``/chat/completions``, and so does the
small model in this process. Other providers are called through litellm, if it is installed.
"""

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

import anyio.to_thread
import msgspec

from flock.agents import localmodel
from flock.errors import ModelError
from flock.extras import pip_install
from flock.nearest import did_you_mean

__all__ = [
    "BUILT_IN",
    "PROVIDERS",
    "Endpoint",
    "Provider",
    "check_model",
    "endpoint_of",
    "required_name",
    "unknown_provider",
]


class Provider(msgspec.Struct, frozen=True, kw_only=True):
    """A server that supports chat completions.

    Attributes:
        base_url: the URL without ``/chat/completions``. The environment variable ``{NAME}_BASE_URL`` overrides it.
        key_variable: the environment variable with the key; None if no key is needed.
        max_tokens_field: the name of the request field that limits the answer's length.
    """

    base_url: str
    key_variable: str | None = None
    max_tokens_field: str = "max_tokens"


PROVIDERS: Mapping[str, Provider] = {
    "openai": Provider(
        base_url="https://api.openai.com/v1",
        key_variable="OPENAI_API_KEY",
        max_tokens_field="max_completion_tokens",
    ),
    "openrouter": Provider(base_url="https://openrouter.ai/api/v1", key_variable="OPENROUTER_API_KEY"),
    "groq": Provider(base_url="https://api.groq.com/openai/v1", key_variable="GROQ_API_KEY"),
    "mistral": Provider(base_url="https://api.mistral.ai/v1", key_variable="MISTRAL_API_KEY"),
    "deepseek": Provider(base_url="https://api.deepseek.com/v1", key_variable="DEEPSEEK_API_KEY"),
    "together": Provider(base_url="https://api.together.xyz/v1", key_variable="TOGETHER_API_KEY"),
    "ollama": Provider(base_url="http://127.0.0.1:11434/v1"),
    "vllm": Provider(base_url="http://127.0.0.1:8000/v1"),
    "llamacpp": Provider(base_url="http://127.0.0.1:8080/v1"),
}

BUILT_IN = (*PROVIDERS, "local")

#: Headers for the organisation and project at OpenAI, by the environment variable with the value.
OPENAI_HEADERS = {"OPENAI_ORG_ID": "OpenAI-Organization", "OPENAI_PROJECT_ID": "OpenAI-Project"}


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """The URL of one model, and the settings for calling it."""

    name: str
    model: str
    url: str
    headers: Mapping[str, str]
    max_tokens_field: str
    settings: Mapping[str, Any] = {}
    is_local: bool = False


def check_model(name: str | None) -> None:
    """Raise the ModelError that each call of the model *name* would raise with the current setup of this process.

    It sends no request and loads no weights. If litellm is installed, any other provider is accepted, unless its name
    looks like a misspelling of a built-in one, because only litellm knows its own providers.
    """
    name = required_name(name)
    provider = name.partition("/")[0]
    if provider not in BUILT_IN:
        if not _has_litellm() or did_you_mean(provider, BUILT_IN, MISSPELLING_CUTOFF):
            raise unknown_provider(name)
    elif provider == "local":
        localmodel.check(_model_of(name))
    else:
        _model_of(name)
        _key_of(name)


#: Min similarity of a misspelled name to the correct one. No provider of litellm is this similar to a built-in one.
MISSPELLING_CUTOFF = 0.88


def _has_litellm() -> bool:
    return importlib.util.find_spec("litellm") is not None


def required_name(name: str | None) -> str:
    if not name:
        raise _not_configured("no model is set. Pass model= to the agent or to Flock, or set FLOCK_MODEL")
    return name


def _model_of(name: str) -> str:
    """Return the part after the provider."""
    model = name.partition("/")[2]
    if not model:
        raise _not_configured(f"{name!r} has no model name. Write provider/model, such as openai/gpt-4o")
    return model


def _key_of(name: str) -> str:
    """Return the API key for the model *name* of a built-in provider, or "" if it needs none."""
    variable = PROVIDERS[name.partition("/")[0]].key_variable
    key = os.environ.get(variable, "").strip() if variable else ""
    if variable and not key:
        raise _not_configured(
            f"{name!r} needs an API key. Set the environment variable {variable} where the server starts"
        )
    return key


async def endpoint_of(name: str) -> Endpoint:
    provider_name, model = name.partition("/")[0], _model_of(name)
    if provider_name == "local":
        # In a thread, because loading weights is slow. If cancelled, loading continues for the next caller.
        server = await anyio.to_thread.run_sync(localmodel.serve, model, abandon_on_cancel=True)
        return Endpoint(
            name=name,
            model=model,
            url=f"{server.base_url}/chat/completions",
            headers=_headers(server.key),
            max_tokens_field="max_tokens",
            settings={**localmodel.SETTINGS, "max_tokens": localmodel.MAX_TOKENS},
            is_local=True,
        )
    provider, headers = PROVIDERS[provider_name], _headers(_key_of(name))
    if provider_name == "openai":
        headers |= {header: os.environ[name] for name, header in OPENAI_HEADERS.items() if os.environ.get(name)}
    base_url = os.environ.get(f"{provider_name.upper()}_BASE_URL") or provider.base_url
    return Endpoint(
        name=name,
        model=model,
        url=f"{base_url.rstrip('/')}/chat/completions",
        headers=headers,
        max_tokens_field=provider.max_tokens_field,
    )


def _headers(key: str) -> dict[str, str]:
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


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
