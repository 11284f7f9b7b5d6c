"""Write pages of ``docs`` from the code: the command line, the Python API, the errors and the picture of a run.

python -m tests.made_pages
"""

import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from http.client import responses
from pathlib import Path
from typing import Any

import click

from flock.agents.agent import Agent, FunctionAgent, ModelAgent
from flock.agents.history import History
from flock.agents.mcp import mcp_tools
from flock.agents.messages import Messages
from flock.agents.tools import Tool
from flock.client import APIError, AsyncFlockClient, BatchState, FlockClient, OpenQuestion, RunState, StreamedOutput
from flock.command.cli import main
from flock.core import Flock, FlockFactory
from flock.core import agent as agent_decorator
from flock.errors import AgentError
from flock.limits import Limits
from flock.options import Options
from flock.runs import ClientSettings, ClientTool, Engine, Observer, Principal, Run, RunContext, new_id
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from flock.web.options import AppOptions
from flock.web.problems import PROBLEMS
from flockapi import create_app, engine_of, principal_of
from tests import diagram
from tests.support import ROOT

WIDTH = 100

CLI = """# Command line

For everyone who uses the command `flockapi`. This page is made from `--help`; `python -m tests.made_pages` writes it.
"""

PYTHON = """# Python API

For people who write agents, or mount the API in their own app. This page is made from the docstrings;
`python -m tests.made_pages` writes it. The [HTTP API](http-api.md) is described elsewhere.
"""

ERRORS = """# Errors

For everyone who has an error in hand and looks for its cause. This page is made from the lists in the code;
`python -m tests.made_pages` writes it.

The log has the details of an error under its `request_id`, which is also in the header `X-Request-ID`. An error over
8 KiB is cut and ends in `… (cut)`.

## A request is rejected

The response is a [problem](http-api.md#errors): `detail` says what is wrong with this request, and `errors` points to
each invalid value. Its `type` is `urn:flockapi:problem:` and one of these words:
"""

#: The cause of each ``error_type``, and what helps.
FAILURES = {
    "agent_error": ("the agent raised `AgentError` with this text", "it is the agent's own message"),
    "agent_exception": (
        "the agent's code raised another exception",
        "the log has the traceback; for development, `--expose-errors` sends the text to clients",
    ),
    "call_error": (
        "a call of a step cannot be made, or its result cannot be JSON",
        "the message names the call; see [Workflows](workflows.md#work-that-is-done-once)",
    ),
    "uncertain": (
        "a call with `call_once=True` was started, and its end is not recorded",
        'find out whether it was done; `{"calls": "again"}` in the body of `POST …/retry` executes it again',
    ),
    "invalid_output": (
        "a result, or a model's answer after all repairs, does not match the output signature",
        "simplify the signature, use `Literal`, or show the model `examples=`",
    ),
    "invalid_handoff": (
        "the next agent does not exist, or its inputs are missing",
        "`flockapi check` finds most of these before the start",
    ),
    "invalid_input": (
        'a row of a batch is invalid and was skipped (`on_invalid: "skip"`)',
        "correct the row; `--dry-run` shows all errors first",
    ),
    "result_too_large": ("a result is longer than `max_result_bytes`", "return a reference to the long value"),
    "too_many_steps": (
        "agents hand off in a circle, or a chain is longer than `max_steps`",
        "check `next_agent`; raise `Flock(max_steps=…)`",
    ),
    "too_many_tokens": ("the run has used its `max_tokens`", "raise `--max-tokens`, or send less"),
    "cost_limit": (
        "the run or its batch has cost `max_cost`, or a model has no price",
        'retry it with a higher limit: `{"max_cost": 5}` in the body of `POST …/retry`; '
        "[set the price](models.md#spending)",
    ),
    "max_failures": (
        "the row did not start, since more rows of its batch had failed than `max_failures`",
        "correct the cause, and retry the batch",
    ),
    "not_chosen": (
        "the batch was started with only some of its rows (`limit`, `sample`)",
        "retry the batch to run them",
    ),
    "timeout": ("the run took longer than its `timeout_s`", "raise it, or make the agent faster"),
    "queue_timeout": (
        "the run waited for its first step longer than `--queue-timeout`",
        "more workers, or fewer requests",
    ),
    "expired": (
        "a question of the run was not answered in time",
        "ask again with `POST /run/{run_id}/retry`",
    ),
    "cancelled": (
        "it was cancelled, or the client of a synchronous run disconnected",
        "send `async_run: true`, or an `Idempotency-Key`",
    ),
    "interrupted": (
        "the server stopped, and this run must not be repeated",
        "send it again; asynchronous runs resume by themselves",
    ),
    "changed_program": (
        "a step that ran again made another call than before, or did not cancel one again; [more](upgrading.md)",
        'retry the run with the earlier program, start another one, or set `on_change="continue"`',
    ),
    "crashed": (
        "the process died repeatedly while it was executing this run, in the end only this one",
        "find what ends the process, such as its memory, and retry the run",
    ),
    "unstorable": ("a value cannot be stored, such as text that is not Unicode", "the message names the record"),
    "unreadable": (
        "the record in the store is damaged",
        "restore a [backup](durability.md#backup-and-upgrade)",
    ),
    "payload_lost": (
        "on a cluster: the file of a long value is missing from `--payload-dir`",
        "share this folder between all processes",
    ),
    "model_not_configured": (
        "no model, no key, an unknown provider or a missing package",
        "the message names the variable; `flockapi check` reports it before the start",
    ),
    "model_authentication": (
        "the provider rejected the key, or the key has no access to the model (401, 403)",
        "check the key where the server runs",
    ),
    "model_not_found": ("the provider has no such model (404)", "check the name after the slash"),
    "model_bad_request": (
        "the provider rejected the request, and a retry cannot help (400, 422)",
        "the log has the provider's message",
    ),
    "model_context_length": (
        "the prompt is longer than the context window of the model",
        "shorten the inputs or `history=`",
    ),
    "model_content_filter": (
        "the provider's filter blocked the prompt or the answer",
        "change the prompt; a retry seldom helps",
    ),
    "model_refusal": ("the model declined to answer", "change the prompt; a retry seldom helps"),
    "model_rate_limited": (
        "the provider would not accept the call before the deadline of the run (429)",
        "a longer `timeout_s`, a higher limit at the provider, or a [second model](models.md#other-models-to-ask)",
    ),
    "model_quota": (
        "the account has no credit left (429); for a minute, all calls with this key fail at once",
        "check billing at the provider",
    ),
    "model_unavailable": (
        "the provider failed, or the connection was lost, after all retries (408, 409, 5xx)",
        "retry the run; rows of a batch wait for the end of an outage",
    ),
    "model_timeout": (
        "the provider did not answer in time, after all retries",
        "retry the run; raise the agent's `timeout_s`",
    ),
    "model_truncated": (
        "the answer reached the token limit",
        "raise `max_tokens=` of the agent, or bound lists and texts in the signature",
    ),
    "model_bad_response": (
        "the provider returned something that is not a chat completion",
        "check the base URL; the log has the response",
    ),
}

PLAIN_ERRORS = """Or its `type` is `about:blank`, and `title` repeats the HTTP status:
"""

FAILED = """## A run failed

A failed run is an answer, not a rejected request: its status is 200, with `status: "failed"`, `error` for people and
`error_type` for programs. An agent can have error types of its own. These are built in:
"""

GONE = (
    "it never existed, was deleted, has expired (`--keep-for`), or belongs to another key",
    "check the id and the key",
)

#: The cause of each problem, by its title, and what helps.
CAUSES: Mapping[str, tuple[str, str]] = {
    "Malformed JSON": (
        "the body is not JSON, or is nested too deeply (`max_json_depth=`)",
        "`detail` has the line and the column; with curl, put the body in single quotes: `-d '{…}'`",
    ),
    "Invalid input": (
        "a value is missing, unknown, or of the wrong type",
        "`errors` has the JSON pointer of each value, and its `line` if the body has lines",
    ),
    "Unknown agent": (
        "no agent has this name",
        "`detail` suggests the nearest one, and `GET /agents` lists all",
    ),
    "Unknown run": GONE,
    "Unknown call": (
        "the run does not ask this question",
        "`GET /run/{run_id}` lists the open ones in `waiting_for`",
    ),
    "Unknown batch": GONE,
    "Unknown session": GONE,
    "Unknown file": ("the file was never sent, was deleted, or belongs to another key", "send it again"),
    "Unauthorized": (
        "the key is missing or unknown, or `auth=` found no user",
        "send `-H 'Authorization: Bearer YOUR_KEY'`; see [Security](security.md)",
    ),
    "Forbidden": (
        "a page of another origin sent the request, or `/metrics` was requested without an admin's key",
        "allow the origin with [`--cors-origin`](security.md#browsers); use an admin's key",
    ),
    "Misdirected Request": (
        "`Host` is neither a name of this machine nor an `--allowed-host`",
        "behind a proxy, start the server with [`--allowed-host NAME`](security.md#behind-nginx)",
    ),
    "Conflict": (
        "the state of the run does not allow this: cancel or answer after its end, delete before it, retry after "
        "it completed, a second answer",
        "read the run first",
    ),
    "Idempotency key in use": (
        "an earlier request with the same `Idempotency-Key` is still being accepted",
        "send the same request again in a moment",
    ),
    "Idempotency key reused": (
        "the same `Idempotency-Key` was sent with another request",
        "use a new key for new work",
    ),
    "Content too large": (
        "a body, a batch or the inputs of a run are above a [limit](limits.md)",
        "send less at once, or raise the limit that `detail` names",
    ),
    "Too many runs": (
        "the queue is full",
        "wait as long as `Retry-After` says; raise `--max-queue`",
    ),
    "Too many requests": (
        "a key or a user sends too much, or has too many streams, uploads or downloads open",
        "wait as long as `Retry-After` says",
    ),
    "Not running": (
        "the server is starting or stopping",
        "wait as long as `Retry-After` says",
    ),
    "Store unavailable": (
        "the disk is full, or the file was moved or is locked",
        "the log says which; nothing that was accepted is lost. If you were waiting for a run, it continues, and "
        "`detail` says where to find its result",
    ),
    "Internal error": (
        "a bug in the server, or in an `auth=` function or a route of yours",
        "the log has the traceback under the `request_id`",
    ),
}

#: The plain HTTP errors of the server, with their cause and what helps. Their ``type`` is about:blank.
PLAIN: Mapping[int, tuple[str, str]] = {
    400: (
        "a header is invalid, or the body broke off",
        "`detail` names the header",
    ),
    404: (
        "there is no such path, or it ends in a slash",
        "`detail` names the path that may be meant",
    ),
    405: (
        "the path does not support the method",
        "`Allow` has the methods",
    ),
    406: (
        "results were requested in another format",
        "accept one of those listed",
    ),
    408: (
        "the body took too long to arrive (`body_timeout_s=`)",
        "send less at once",
    ),
    415: (
        "the `Content-Type` is not JSON (for a batch: in no [format](formats.md)), or the body is compressed (a batch "
        "may use gzip)",
        "add `-H 'Content-Type: application/json'`",
    ),
    431: (
        "the headers are too long (`max_header_bytes=`)",
        "send fewer or shorter ones",
    ),
    503: (
        "the server has too many connections (`--max-connections`)",
        "wait as long as `Retry-After` says",
    ),
}

#: The sections of the page: where the names are imported from, the names, and the methods that are shown.
SECTIONS: list[tuple[str, list[tuple[str, Any, list[str]]]]] = [
    (
        "flock.core",
        [
            (
                "Flock",
                Flock,
                [
                    "add_agent",
                    "agent",
                    "evaluate",
                    "evaluate_async",
                    "on_model_call",
                    "on_tool_call",
                    "run",
                    "run_async",
                    "run_batch",
                    "run_batch_async",
                    "start_api",
                ],
            ),
            ("Flock.engine", Flock.engine, []),
            ("FlockFactory.create_default_agent", FlockFactory.create_default_agent, []),
            ("agent", agent_decorator, []),
            ("Messages", Messages, []),
            ("History", History, []),
        ],
    ),
    (
        "flock.agents.agent",
        [("Agent", Agent, []), ("ModelAgent", ModelAgent, []), ("FunctionAgent", FunctionAgent, [])],
    ),
    ("flock.agents.tools", [("Tool", Tool, [])]),
    ("flock.agents.mcp", [("mcp_tools", mcp_tools, [])]),
    (
        "flock.runs",
        [
            ("RunContext", RunContext, ["call", "run_agent", "ask", "idempotency_key", "progress"]),
            ("Principal", Principal, []),
            ("ClientSettings", ClientSettings, []),
            ("ClientTool", ClientTool, []),
            ("Run", Run, ["value", "value_as"]),
            ("Engine", Engine, [name for name in vars(Engine) if not name.startswith("_")]),
            ("Observer", Observer, [name for name in vars(Observer) if not name.startswith("_")]),
            ("new_id", new_id, []),
        ],
    ),
    ("flock.errors", [("AgentError", AgentError, [])]),
    ("flockapi", [("create_app", create_app, []), ("engine_of", engine_of, []), ("principal_of", principal_of, [])]),
    (
        "flock.client",
        [
            ("FlockClient", FlockClient, []),
            (
                "AsyncFlockClient",
                AsyncFlockClient,
                [name for name in vars(AsyncFlockClient) if not name.startswith("_")],
            ),
            ("StreamedOutput", StreamedOutput, ["add"]),
            ("RunState", RunState, ["value_as"]),
            ("BatchState", BatchState, []),
            ("OpenQuestion", OpenQuestion, []),
            ("APIError", APIError, []),
        ],
    ),
    ("flock.web.options", [("AppOptions", AppOptions, [])]),
    ("flock.limits", [("Limits", Limits, [])]),
    (
        "flock.testing",
        [
            ("FakeModel", FakeModel, ["check", "serve"]),
            ("Reply", Reply, []),
            ("Failure", Failure, []),
            ("ModelRequest", ModelRequest, ["agent_name", "text", "schema", "tool_names"]),
        ],
    ),
]


def cli_page() -> str:
    """Return ``docs/cli.md``: the help of each command."""
    parts = [CLI]
    group = click.Context(main, info_name="flockapi", **main.context_settings)
    for name in main.list_commands(group):
        command = main.get_command(group, name)
        assert command is not None
        context = click.Context(command, group, name, max_content_width=WIDTH, terminal_width=WIDTH)
        parts.append(f"## flockapi {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def python_page() -> str:
    """Return ``docs/python-api.md``: the signatures and docstrings of the public names."""
    parts = [PYTHON]
    for module, names in SECTIONS:
        parts.append(f"## `from {module} import …`\n")
        for name, shown, methods in names:
            parts += _entry(name, shown)
            for method in methods:
                parts += _entry(f"{name}.{method}", inspect.getattr_static(shown, method))
    return "\n".join(parts)


def errors_page() -> str:
    """Return ``docs/errors.md``: the cause of each problem and of each ``error_type``, and what helps."""
    problems = [(kind.status, f"`{kind.type.rpartition(':')[2]}`", *CAUSES[kind.title]) for kind in PROBLEMS.values()]
    plain = [(status, responses[status], *texts) for status, texts in PLAIN.items()]
    failures = [(f"`{name}`", *texts) for name, texts in FAILURES.items()]
    return "\n".join(
        [
            *(ERRORS, _table("status", "type", "cause", "what helps", rows=sorted(problems))),
            *(PLAIN_ERRORS, _table("status", "title", "cause", "what helps", rows=plain)),
            *(FAILED, _table("`error_type`", "cause", "what helps", rows=failures)),
        ]
    )


def _table(*columns: str, rows: Iterable[Iterable[Any]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{'-|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(map(str, row))} |" for row in rows)]) + "\n"


def _entry(name: str, shown: Any) -> Iterator[str]:
    """Yield the heading, the docstring and, if it is a struct of options, its fields."""
    is_property = isinstance(shown, property)
    shown = inspect.unwrap(shown.fget if is_property else getattr(shown, "__func__", shown))
    text = inspect.getdoc(shown)
    if not text:
        raise ValueError(f"{name} has no docstring")
    is_struct = inspect.isclass(shown) and issubclass(shown, Options)
    is_called = inspect.isfunction(getattr(shown, "__init__", None) if inspect.isclass(shown) else shown)
    is_called = is_called or shown in (Reply, Failure)
    is_made_by_others = shown in (RunContext, Run, ModelRequest, Engine, Observer)
    call = f"{_call_of(name, shown)}\n\n" if is_called and not is_property and not is_made_by_others else ""
    yield f"### {name}\n\n```text\n{call}{text}\n```\n"
    if is_struct:
        yield "\n".join(["| option | default | |", "|-|-|-|", *_options_of(shown)]) + "\n"


def _call_of(name: str, shown: Any) -> str:
    """Return a call with all parameters and their defaults, in lines of at most ``WIDTH`` characters."""
    given = [
        parameter.replace(annotation=parameter.empty)
        for parameter in inspect.signature(shown).parameters.values()
        if parameter.name not in ("self", "cls")
    ]
    text = str(inspect.Signature(given)).replace(", /", "").replace("/, ", "")
    text = re.sub(r"<function (\S+) at \w+>", r"\1", text).replace("<factory>", "{}")
    return textwrap.fill(f"{name.rpartition('.')[2]}{text}", WIDTH, subsequent_indent="    ", break_long_words=False)


def _options_of(options: type[Options]) -> Iterator[str]:
    """Yield a row of a table for each field, with the comment above it."""
    lines = inspect.getsource(options).splitlines()
    comment: list[str] = []
    for line in lines:
        if line.startswith("    #: "):
            comment.append(line.removeprefix("    #: "))
        elif (field := re.match(r"    (\w+): Annotated", line)) and field[1] in options.__struct_fields__:
            default = getattr(options(), field[1])
            text = " ".join(comment).replace("``", "`").replace("|", "\\|")
            yield f"| `{field[1]}` | `{default!r}` | {text} |"
            comment = []
        elif not line.strip():
            comment = []


PAGES: Mapping[Path, Callable[[], str]] = {
    ROOT / "docs" / "cli.md": cli_page,
    ROOT / "docs" / "errors.md": errors_page,
    ROOT / "docs" / "python-api.md": python_page,
    ROOT / "docs" / "run.svg": diagram.picture,
}


if __name__ == "__main__":
    for path, make in PAGES.items():
        path.write_text(make(), "utf-8")
