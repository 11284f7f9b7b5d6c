"""What a client brings to its run: instructions, tools that it executes itself, and options of the model."""

import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest

from flock.agents import tools
from flock.agents.agent import FunctionAgent
from flock.agents.tools import Tool, ToolSource
from flock.core import Flock, FlockFactory, agent
from flock.engine.embedded import EmbeddedEngine
from flock.errors import CallNotFound, DefinitionError, Forbidden, InvalidData, RunNotFound, StaleAnswer, TooLarge
from flock.runs import ClientSettings, ClientTool, Engine, Principal, QuestionFilter, Run, RunFilter, RunStatus, new_id
from flock.testing import FakeModel, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.cluster import patient
from tests.support.engines import OpenEngine, until_run
from tests.support.http import client_of
from tests.test_approval import PAY, Till
from tests.test_ask import asked, json_of, waiting
from tests.test_tools import add, ended, flock_of, results

pytestmark = pytest.mark.anyio

ANN, BOB, ROOT = Principal(name="ann"), Principal(name="bob"), Principal(name="root", admin=True)


def tool(name: str = "weather", schema: Any = None, **more: Any) -> ClientTool:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}} if schema is None else schema
    return ClientTool(name=name, parameters=json_of(schema), **more)


WEATHER = ClientSettings(tools=(tool(description="The weather of a city."),))
ASK_CLIENT = Reply(calls=[("weather", {"city": "Rome"})])
DONE = Reply({"a": "done"})


def client_flock(*own: Any, **options: Any) -> Flock:
    return flock_of(*own, **{"client_tools": True, **options})


async def called(engine: Engine, count: int = 1, **options: Any) -> Run:
    """Return a run of ann when it waits for *count* outputs."""
    options = {"client": WEATHER, "principal": ANN, **options}
    return await asked(engine, "ask", {"q": "?"}, count=count, **options)


async def send(engine: Engine, run: Run, output: Any, number: int = 0, by: Principal = ANN) -> Run:
    return await engine.answer_call(run.run_id, run.questions[number].call_id, json_of(output), by)


async def end_of(engine: Engine, run: Run) -> Run:
    with anyio.fail_after(PATIENCE_S):
        return await engine.wait(run.run_id)


# Calls


async def test_calls_of_the_clients_tools_wait_beside_each_other(model: FakeModel, open_engine: OpenEngine) -> None:
    """The tools of the server in the same reply run as usual. The run waits in the store only."""
    calls = [("weather", {"city": "Rome"}), ("add", {"a": 1, "b": 2}), ("weather", {"city": "Oslo"})]
    model.replies = [Reply(calls=calls), DONE]
    async with open_engine(client_flock(add), transport=model.transport) as engine:
        run = await called(engine, 2)
        if isinstance(engine, EmbeddedEngine):
            assert engine._runner.active == {}
        shown = [(each.kind, each.question, json.loads(bytes(each.arguments))) for each in run.questions]  # type: ignore[arg-type]
        assert shown == [("client_tool", "weather", {"city": "Rome"}), ("client_tool", "weather", {"city": "Oslo"})]
        first, second = run.questions
        assert first.expires_at is not None
        assert (first.expires_at - first.asked_at).days == 1
        assert first.call_id != second.call_id
        await send(engine, run, "dry", 1)
        await until_run(engine, run.run_id, lambda run: [q.call_id for q in run.waiting_for] == [first.call_id])
        await send(engine, run, "20°", 0)
        run = await end_of(engine, run)
        stored = (await engine.get_calls(run))[0]
    assert (run.status, run.value) == (RunStatus.COMPLETED, {"a": "done"}), run.error
    assert results(model.requests[1]) == ["20°", "3", "dry"]
    assert [request.tool_names for request in model.requests] == [["weather", "add"]] * 2
    assert sorted(call.kind for call in stored) == ["model", "question", "question", "tool"]
    assert {call.answered_by for call in stored if call.kind == "question"} == {"ann"}


async def test_only_the_principal_of_the_run_sends_the_output_and_only_once(
    model: FakeModel, open_engine: OpenEngine
) -> None:
    model.replies = [ASK_CLIENT, DONE]
    async with open_engine(client_flock(), transport=model.transport) as engine:
        run = await called(engine)
        with pytest.raises(RunNotFound):
            await send(engine, run, "20°", by=BOB)
        with pytest.raises(Forbidden, match="Only the principal of the run"):
            await send(engine, run, "20°", by=ROOT)
        with pytest.raises(CallNotFound):
            await engine.answer_call(run.run_id, run.questions[0].call_id + "0", json_of("20°"), ANN)
        await send(engine, run, "20°")
        await send(engine, run, "20°")
        with pytest.raises(StaleAnswer, match="answered by 'ann' otherwise"):
            await send(engine, run, "21°")
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
        await send(engine, run, "20°")
        with pytest.raises(StaleAnswer):
            await send(engine, run, "21°")
    assert results(model.requests[1]) == ["20°"]


async def test_an_output_is_no_approval_and_an_approval_is_no_output(model: FakeModel, open_engine: OpenEngine) -> None:
    till = Till()
    model.replies = [Reply(calls=[*PAY.calls, *ASK_CLIENT.calls]), DONE]
    flock = client_flock(Tool(till.refund, needs_approval=True))
    async with open_engine(flock, transport=model.transport) as engine:
        run = await called(engine, 2)
        assert [question.is_for_client for question in run.questions] == [False, True]
        for number, output in ((0, "approved"), (1, {"approved": True}), (1, ["20°"]), (1, None)):
            with pytest.raises(InvalidData):
                await send(engine, run, output, number)
        asked_call = await engine.get_question(run.run_id, run.questions[1].call_id, ANN)
        assert (asked_call.status, asked_call.question.kind) == ("open", "client_tool")
        await send(engine, run, {"approved": True}, 0, by=ROOT)
        run_now = await until_run(engine, run.run_id, lambda run: run.status is RunStatus.WAITING and bool(till.paid))
        assert run_now.questions == run.questions[1:]
        await send(engine, run, '{"approved": true}', 1)
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert results(model.requests[1]) == ["paid 40 for A7", '{"approved": true}']


async def test_a_call_of_a_client_is_not_in_the_list_of_questions_for_people(
    model: FakeModel, open_engine: OpenEngine
) -> None:
    model.replies = [Reply(calls=[*PAY.calls, *ASK_CLIENT.calls])]
    flock = client_flock(Tool(Till().refund, needs_approval=True))
    async with open_engine(flock, transport=model.transport) as engine:
        run = await called(engine, 2)
        with anyio.fail_after(PATIENCE_S):
            while not await engine.list_questions(QuestionFilter(by=ANN)):  # noqa: ASYNC110 - searches of a cluster lag
                await anyio.sleep(0.05)
        for by in (ANN, ROOT, None):
            listed = await engine.list_questions(QuestionFilter(by=by))
            assert [asked.question.call_id for asked in listed] == [run.questions[0].call_id]
        assert [each.run_id for each in await engine.list_runs(RunFilter(status="waiting"))] == [run.run_id]
        await engine.cancel_run(run.run_id)
        await until_run(engine, run.run_id, lambda run: run.status is RunStatus.CANCELLED)
        with pytest.raises(StaleAnswer, match="is cancelled"):
            await send(engine, run, "20°", 1)


async def test_a_call_that_expires_fails_its_run_and_a_retry_asks_again(
    model: FakeModel, open_engine: OpenEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is not asked again for the call, and what the client sends for the earlier one does not count."""
    monkeypatch.setattr(tools, "CLIENT_EXPIRES_S", 0.5)
    model.replies = [ASK_CLIENT, DONE]
    async with open_engine(client_flock(), transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"}, client=WEATHER, principal=ANN)
        late = await until_run(engine, run.run_id, lambda run: bool(run.questions) or run.status.is_final)
        run = await until_run(engine, run.run_id, lambda run: run.status.is_final)
        expected = "The client has not sent the output of its tool 'weather' in time."
        assert (run.status, run.error_type, run.error) == (RunStatus.FAILED, "expired", expected)
        monkeypatch.setattr(tools, "CLIENT_EXPIRES_S", 600)
        await engine.retry_run(run.run_id, by=ROOT)
        run = await waiting(engine, run.run_id)
        for question in late.questions:
            with pytest.raises(StaleAnswer):
                await engine.answer_call(run.run_id, question.call_id, json_of("20°"), ANN)
        await send(engine, run, "20°")
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert [request.tool_names for request in model.requests] == [["weather"]] * 2


async def test_a_retry_keeps_the_output_that_the_client_has_sent(model: FakeModel, open_engine: OpenEngine) -> None:
    model.replies = [ASK_CLIENT, httpx.Response(401, json={"error": {"message": "no"}}), DONE]
    async with open_engine(client_flock(), transport=model.transport) as engine:
        run = await called(engine)
        await send(engine, run, "20°")
        assert (await end_of(engine, run)).status is RunStatus.FAILED
        await engine.retry_run(run.run_id, by=ANN)
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert results(model.requests[2]) == ["20°"]
    assert model.requests[2].tool_names == ["weather"]


async def test_arguments_that_are_no_object_go_back_to_the_model(model: FakeModel, open_engine: OpenEngine) -> None:
    model.replies = [Reply(calls=[("weather", '"Rome"'), ("weather", "{"), ("weather", '{},"a":{}')]), DONE]
    async with open_engine(client_flock(), transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"}, client=WEATHER)
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert all(text.startswith("Error: The arguments are invalid.") for text in results(model.requests[1]))


PROGRAM = """
import os, signal, sys
import anyio, msgspec
from flock.core import Flock, FlockFactory
from flock.runs import ClientSettings, ClientTool, Principal
from flock.testing import FakeModel, Reply

store, run_id = sys.argv[1], sys.argv[2]
flock = Flock("tools", model="openai/gpt-4o")
flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a: str", client_tools=True))

def die(request):
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    model = FakeModel([die] if run_id else [Reply(calls=[("weather", {"city": "Rome"})] * 2)])
    async with flock.engine(store=store, transport=model.transport) as engine:
        if not run_id:
            client = ClientSettings(tools=(ClientTool(name="weather"),))
            run = await engine.submit("ask", {"q": "?"}, client=client, principal=Principal(name="ann"))
            run = await engine.wait(run.run_id)
            print(run.run_id, flush=True)
            die(None)
        for question in (await engine.get_run(run_id)).questions:
            await engine.answer_call(run_id, question.call_id, msgspec.Raw(b'"20"'), Principal(name="ann"))
        await engine.wait(run_id)

anyio.run(main)
"""


async def test_kill_9_loses_neither_a_call_nor_its_output(model: FakeModel, tmp_path: Path) -> None:
    """The process is killed while the run waits, and again after the outputs, while the model reads them."""
    store, run_id = tmp_path / "flock.db", ""
    for _ in range(2):
        command = [sys.executable, "-c", PROGRAM, str(store), run_id]
        ended = await anyio.run_process(command, check=False, stderr=subprocess.STDOUT)
        assert ended.returncode == -signal.SIGKILL, ended.stdout.decode()
        run_id = run_id or ended.stdout.decode().strip()
    model.replies = [DONE]
    async with client_flock().engine(store=store, transport=model.transport) as engine:
        with anyio.fail_after(PATIENCE_S):
            run = await engine.wait(run_id)
    assert run.status is RunStatus.COMPLETED, run.error
    assert results(model.requests[0]) == ["20", "20"]
    assert model.requests[0].tool_names == ["weather"]


WORKER = """
from flock.core import Flock, FlockFactory
flock = Flock({name!r}, model="openai/gpt-4o")
flock.add_agent(FlockFactory.create_default_agent("ask", input="q", output="a: str", client_tools=True))
"""


@pytest.mark.cluster
async def test_a_killed_worker_loses_neither_a_call_nor_its_output(
    model: FakeModel, temporal_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flock.temporal import TemporalEngine
    from tests.test_temporal import working

    target = tmp_path / "program.py"
    target.write_text(WORKER.format(name=new_id()))
    flock: Flock = runpy.run_path(str(target))["flock"]
    model.replies = [ASK_CLIENT, DONE]
    with model.serve() as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "k")
        async with patient(TemporalEngine(flock.agents, temporal_address, flock=flock.name)) as engine:
            with working(target, temporal_address) as doomed:
                run = await called(engine)
                doomed.kill()
                doomed.wait()
            await send(engine, run, "20°")
            with working(target, temporal_address):
                assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert results(model.requests[1]) == ["20°"]


async def test_a_client_reads_the_call_and_sends_the_output_over_http(model: FakeModel) -> None:
    """Without keys everybody is one principal, so a run of somebody is not its own."""
    model.replies = [ASK_CLIENT, DONE, ASK_CLIENT]
    flock = client_flock()
    app = create_app(flock, engine=(engine := flock.engine(transport=model.transport)), auth="host")
    async with app.lifespan(), client_of(app) as client:
        run = await called(engine, principal=None)
        path = f"/run/{run.run_id}"
        (question,) = (await client.get(path)).json()["waiting_for"]
        assert (question["kind"], question["question"]) == ("client_tool", "weather")
        assert question["arguments"] == {"city": "Rome"}
        assert question["schema"] == {"type": "string"}
        assert (await client.get("/questions")).json()["questions"] == []
        answered = await client.post(f"{path}/calls/{question['call_id']}", json={"output": "20°"})
        assert answered.status_code == 200, answered.text
        assert (await client.get(path, params={"wait": 60})).json()["result"] == {"a": "done"}
        of_ann = await called(engine)
        path = f"/run/{of_ann.run_id}/calls/{of_ann.questions[0].call_id}"
        assert (await client.post(path, json={"output": "20°"})).status_code == 403


# Tools


@pytest.mark.parametrize(
    ("client", "pointer", "error"),
    [
        (ClientSettings(tools=(tool("add"),)), "/tools/0/name", "'ask' has a tool 'add' of its own"),
        (ClientSettings(tools=(tool("look_up"),)), "/tools/0/name", "'ask' has a tool 'look_up' of its own"),
        (ClientSettings(tools=(tool("listed"),)), "/tools/0/name", "'ask' has a tool 'listed' of its own"),
        (ClientSettings(tools=(tool(), tool())), "/tools/1/name", "There are two tools 'weather'."),
        (ClientSettings(tools=(tool("finish"),)), "/tools/0/name", "Models end their calls with"),
        (ClientSettings(tools=(tool("a b"),)), "/tools/0/name", "matching regex"),
        (ClientSettings(tools=(tool("x" * 65),)), "/tools/0/name", "matching regex"),
        (ClientSettings(tools=tuple(tool(f"t{n}") for n in range(129))), "/tools", "length <= 128"),
        (ClientSettings(tools=(tool(description="x" * 262_144),)), "/tools", "longer than 262144 bytes"),
        (ClientSettings(tools=(tool(schema=[]),)), "/tools/0/parameters", "Expected 'object', got 'array'"),
        (
            ClientSettings(tools=(tool(schema={"type": "string"}),)),
            "/tools/0/parameters/type",
            "not one of the allowed",
        ),
        (
            ClientSettings(tools=(tool(schema={"properties": {"a": {"$ref": "https://evil.example/x"}}}),)),
            "/tools/0/parameters/properties/a/$ref",
            "matching regex '^#'",
        ),
        (
            ClientSettings(tools=(tool(schema={"properties": {"a": {"items": {"type": {}}}}}),)),
            "/tools/0/parameters/properties/a/items/type",
            "Expected 'str | array'",
        ),
        (ClientSettings(temperature=0.5), "/temperature", "does not let clients set it (client_options=)"),
        (ClientSettings(top_p=2), "/top_p", "Expected 'float' <= 1"),
        (ClientSettings(max_output_tokens=0), "/max_output_tokens", "Expected 'int' >= 1"),
    ],
)
async def test_what_an_agent_does_not_take_is_refused_before_the_run(
    client: ClientSettings, pointer: str, error: str, model: FakeModel
) -> None:
    @agent
    async def up(text: str) -> str:
        return text

    up.name = "look.up"
    flock = client_flock(add, "look.up", _Listed())
    flock.add_agent(up)
    async with flock.engine(transport=model.transport) as engine:
        with pytest.raises(InvalidData) as caught:
            await engine.submit("ask", {"q": "?"}, client=client)
        assert [each.pointer for each in caught.value.errors] == [pointer]
        assert error in caught.value.errors[0].detail
        assert not await engine.list_runs(RunFilter())


class _Listed(ToolSource):
    """A source whose tools are known before a run, or only while it runs."""

    def __init__(self, *, is_known: bool = True) -> None:
        self._is_known = is_known

    @property
    def known_names(self) -> Sequence[str]:
        return ["listed"] if self._is_known else []

    async def tools(self) -> Sequence[Tool]:
        return [Tool(add, name="listed")]


async def test_a_tool_that_is_listed_after_the_run_was_accepted_is_never_replaced(model: FakeModel) -> None:
    flock = client_flock(_Listed(is_known=False))
    async with flock.engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"}, client=ClientSettings(tools=(tool("listed"),)))
        run = await end_of(engine, run)
    assert (run.status, run.error_type) == (RunStatus.FAILED, "call_error")
    assert run.error == "'ask' has a tool 'listed' of its own. Give the tool of the client another name."
    assert model.requests == []


async def test_a_deep_schema_is_refused_and_all_that_is_together_too_long(model: FakeModel) -> None:
    deep = ClientTool(name="deep", parameters=msgspec.Raw(b'{"items":' * 33 + b"{}" + b"}" * 33))
    async with client_flock().engine(transport=model.transport, max_input_bytes=1000) as engine:
        with pytest.raises(InvalidData, match="nested deeper than 32 levels"):
            await engine.submit("ask", {"q": "?"}, client=ClientSettings(tools=(deep,)))
        with pytest.raises(TooLarge, match="with the inputs"):
            await engine.submit("ask", {"q": "?" * 500}, client=ClientSettings(instructions="x" * 500))


async def test_an_agent_that_takes_no_tools_says_so(model: FakeModel, open_engine: OpenEngine) -> None:
    async with open_engine(flock_of(add), transport=model.transport) as engine:
        with pytest.raises(InvalidData, match=r"'ask' takes no tools of clients \(client_tools=\). Omit them."):
            await engine.submit("ask", {"q": "?"}, client=WEATHER)


async def test_tools_and_instructions_are_for_the_agents_of_the_steps_and_not_for_those_that_they_call(
    model: FakeModel, open_engine: OpenEngine
) -> None:
    """One agent of the run that takes tools is enough. An agent that is a tool of another one does not get them."""
    options: Any = {"client_tools": True, "client_instructions": True}
    flock = Flock("chain", model="openai/gpt-4o")
    make = FlockFactory.create_default_agent
    flock.add_agent(make("first", input="q", output="a: str", next_agent="ask"))
    flock.add_agent(make("ask", input="q", output="a: str", tools=["helper"], **options))
    flock.add_agent(make("helper", input="q", output="a: str", **options))
    model.replies = {
        "first": DONE,
        "helper": DONE,
        "ask": [Reply(calls=[("helper", {"q": "?"}), *ASK_CLIENT.calls]), DONE],
    }
    client = ClientSettings(tools=WEATHER.tools, instructions="Be brief.")
    async with open_engine(flock, transport=model.transport) as engine:
        run = await asked(engine, "first", {"q": "?"}, client=client, principal=ANN)
        await send(engine, run, "20°")
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    seen = {request.agent_name: request for request in model.requests}
    assert [name for name in seen if "Be brief." in seen[name]["messages"][0]["content"]] == ["ask"]
    assert {name: seen[name].tool_names for name in seen} == {"first": [], "ask": ["weather", "helper"], "helper": []}


async def test_a_server_without_tools_is_asked_for_the_next_step(model: FakeModel) -> None:
    """A schema that no provider enforces is sent as far as it can be."""
    schema = {
        "properties": {"at": {"type": ["string", "null"]}, "to": {"$ref": "#/$defs/To"}},
        "$defs": {"To": {"type": "array", "items": {"enum": [1, "a"]}}},
    }
    step = {"next_thought": "", "next_tool_name": "weather", "next_tool_args": {"at": None}}
    rejected = httpx.Response(400, json={"error": {"message": "tools are not supported"}})
    model.replies = [rejected, Reply(step), rejected, Reply({**step, "next_tool_name": "finish"}), DONE]
    async with client_flock().engine(transport=model.transport) as engine:
        run = await called(engine, client=ClientSettings(tools=(tool(schema=schema),)))
        await send(engine, run, "20°")
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert "weather returned: 20°" in json.dumps(model.requests[3]["messages"], ensure_ascii=False)


async def test_what_a_server_rejects_of_a_client_says_nothing_about_other_runs(model: FakeModel) -> None:
    rejected = httpx.Response(400, json={"error": {"message": "tools[0]: a stream of nonsense"}})
    model.replies = lambda request: rejected if "weather" in json.dumps(request) else DONE
    async with client_flock(add).engine(transport=model.transport) as engine:
        assert (await end_of(engine, await engine.submit("ask", {"q": "?"}, client=WEATHER))).status == "failed"
        assert (await ended(engine)).status is RunStatus.COMPLETED
    assert model.requests[-1].tool_names == ["add"]
    assert model.requests[-1]["stream"] is True


# Instructions and options


@pytest.mark.parametrize("takes", [True, False])
async def test_instructions_are_dropped_unless_the_agent_takes_them(
    takes: bool, model: FakeModel, open_engine: OpenEngine
) -> None:
    model.replies = [DONE]
    flock = flock_of(instructions="Be polite.", client_instructions=takes)
    async with open_engine(flock, transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"}, client=ClientSettings(instructions="Be brief."))
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
        assert (await engine.get_run(run.run_id)).client == (
            ClientSettings(instructions="Be brief.") if takes else None
        )
    prompt = model.requests[0]["messages"][0]["content"]
    assert ("Be polite.\nBe brief." in prompt) is takes
    assert ("Be brief." in json.dumps(model.requests[0])) is takes


OPTIONS: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.5,
    "presence_penalty": 1.5,
    "frequency_penalty": -1.0,
    "seed": 7,
}


async def test_options_replace_those_of_an_agent_that_takes_them(model: FakeModel, open_engine: OpenEngine) -> None:
    model.replies = [DONE]
    flock = flock_of(temperature=0.9, max_tokens=50, client_options=True)
    async with open_engine(flock, transport=model.transport) as engine:
        client = ClientSettings(max_output_tokens=100, **OPTIONS)
        assert (await end_of(engine, await engine.submit("ask", {"q": "?"}, client=client))).status == "completed"
    assert {name: model.requests[0][name] for name in OPTIONS} == OPTIONS
    assert model.requests[0]["max_completion_tokens"] == 50


async def test_the_usual_values_of_options_are_ignored_and_the_limit_of_tokens_is_not(model: FakeModel) -> None:
    model.replies = [DONE]
    client = ClientSettings(max_output_tokens=100, temperature=1, top_p=1, presence_penalty=0, seed=7)
    async with flock_of().engine(transport=model.transport) as engine:
        run = await engine.submit("ask", {"q": "?"}, client=client)
        assert run.client == ClientSettings(max_output_tokens=100)
        assert (await end_of(engine, run)).status is RunStatus.COMPLETED
    assert not model.requests[0].keys() & OPTIONS.keys()
    assert model.requests[0]["max_completion_tokens"] == 100


@pytest.mark.parametrize("option", ["client_tools", "client_instructions", "client_options"])
def test_a_function_has_nothing_for_a_client(option: str) -> None:
    options: Any = {option: True}
    with pytest.raises(DefinitionError, match=f"'work' is a function, so it has no {option}="):
        FunctionAgent(add, name="work", **options)
