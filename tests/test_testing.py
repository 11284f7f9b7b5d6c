"""``flock.testing``: what a fake model replies, what it records, and which calls it answers."""

import logging
from typing import Any, Literal, TypedDict

import anyio
import httpx
import pytest

from flock.core import Flock, FlockFactory, Model
from flock.errors import RunFailed
from flock.models.completions import Message
from flock.models.llm import ModelClient
from flock.models.requests import Request
from flock.runs import Event, RunStatus, Usage
from flock.testing import Failure, FakeModel, ModelRequest, Reply
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.test_model_streams import Recorder

CALM = {"mood": "calm"}


def moods(model: Any = "openai/gpt-4o", **options: Any) -> Flock:
    flock = Flock("moods", model=model)
    flock.add_agent(FlockFactory.create_default_agent("analyst", input="text: str", output="mood: str", **options))
    return flock


def mood(flock: Flock, text: str = "Hi!", **options: Any) -> Any:
    return flock.run("analyst", {"text": text}, **options)["mood"]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")


# Replies


@pytest.mark.parametrize(
    "reply",
    [
        CALM,
        '{"mood": "calm"}',
        '```json\n{"mood": "calm"}\n```',
        ('{"mood"', ': "calm"}'),
        Reply(CALM),
        lambda request: CALM,
        httpx.Response(200, json=Reply(CALM).completion()),
    ],
    ids=["mapping", "text", "fenced text", "pieces", "Reply", "function", "httpx.Response"],
)
@pytest.mark.parametrize("on_event", [None, lambda event: None], ids=["whole", "streamed"])
def test_a_reply_is_the_answer_of_a_model(reply: Any, on_event: Any) -> None:
    with FakeModel([reply, reply]) as model:
        assert [mood(moods(), on_event=on_event) for _ in range(2)] == ["calm", "calm"]
    assert [request.get("stream", False) for request in model.requests] == [on_event is not None] * 2


def test_each_agent_has_its_own_replies() -> None:
    class Kind(TypedDict):
        kind: Literal["a", "b"]

    flock = moods()
    flock.add_agent(
        FlockFactory.create_default_agent(
            "my.triage-1", input="text: str", output=Kind, next_agent={"a": "analyst", "b": None}
        )
    )
    replies = {"my.triage-1": [{"kind": "a"}, {"kind": "b"}], "analyst": lambda request: {"mood": request.text[-9:-2]}}
    with FakeModel(replies) as model:
        assert flock.run("my.triage-1", {"text": "Hi!"}).keys() == {"mood"}
        assert flock.run("my.triage-1", {"text": "Hi!"}) == {"kind": "b"}
    assert [request.agent_name for request in model.requests] == ["my.triage-1", "analyst", "my.triage-1"]


@pytest.mark.anyio
async def test_a_function_replies_to_all_rows_and_may_wait() -> None:
    all_asked, most = anyio.Event(), 4

    async def reply(request: ModelRequest) -> Any:
        if len(model.requests) == most:
            all_asked.set()
        with anyio.fail_after(PATIENCE_S):
            await all_asked.wait()
        return {"mood": "angry" if "late" in request.text else "calm"}

    with FakeModel(reply) as model:
        rows = [{"text": "late again"}, {"text": "nice"}] * 2
        results = await moods().run_batch_async("analyst", rows, max_workers=most, progress=False)
    assert results == [{"mood": "angry"}, {"mood": "calm"}] * 2


def test_a_model_calls_tools_before_it_answers() -> None:
    def weather(city: str) -> str:
        return f"sunny in {city}"

    calls = Reply(calls=[("weather", {"city": "Rome"}), ("weather", {"city": "Bern"}), ("weather", "{")])
    with FakeModel([calls, lambda request: {"mood": request["messages"][-2]["content"]}]) as model:
        assert mood(moods(tools=[weather])) == "sunny in Bern"
    assert [request.tool_names for request in model.requests] == [["weather"]] * 2
    assert "Not valid JSON" in model.requests[1].text


@pytest.mark.anyio
async def test_the_tokens_of_a_reply_have_a_price() -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=100_000, cached_tokens=500_000, reasoning_tokens=9)
    with FakeModel([Reply(CALM, usage=usage)]):
        async with moods().engine() as engine:
            run = await engine.wait((await engine.submit("analyst", {"text": "Hi!"})).run_id)
    assert run.usage is not None
    assert (run.usage.cached_tokens, run.usage.reasoning_tokens) == (500_000, 9)
    assert run.usage.cost == 2.5 / 2 + 1.25 / 2 + 1


# Streams


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("reply", "pieces"),
    [({"a": "one and two"}, ['{"a":"on', "e and tw", 'o"}']), (("{", '"a":', ' "x"}'), ["{", '"a":', ' "x"}'])],
)
async def test_an_answer_is_streamed_in_pieces(reply: Any, pieces: list[str]) -> None:
    recorder = Recorder()
    with FakeModel([reply]):
        async with ModelClient() as models:
            completion = await models.complete("openai/x", Request([Message("user", "Hi!")], {}, listener=recorder))
    assert recorder.events == [("reset", ""), *(("text", piece) for piece in pieces)]
    assert (completion.text, completion.usage) == ("".join(pieces), Usage(input_tokens=10, output_tokens=5))


def test_a_stream_that_breaks_off_is_withdrawn_and_tried_again() -> None:
    events: list[Event] = []
    with FakeModel([('{"mood": "sa', ConnectionError()), CALM]) as model:
        assert mood(moods(), on_event=events.append) == "calm"
    assert [event.name for event in events if event.name.startswith("output.")][:2] == ["output.delta", "output.reset"]
    assert len(model.requests) == 2


@pytest.mark.anyio
async def test_thoughts_are_streamed_apart() -> None:
    recorder = Recorder()
    with FakeModel([Reply("{}", reasoning="Hm.")]):
        async with ModelClient() as models:
            await models.complete("openai/x", Request([Message("user", "Hi!")], {}, listener=recorder))
    assert recorder.events == [("reset", ""), ("reasoning", "Hm."), ("text", "{}")]


# Failures


@pytest.mark.parametrize(
    ("reply", "error_type", "attempts"),
    [
        pytest.param(Failure(500), "model_unavailable", 3, id="500"),
        pytest.param(Failure(401), "model_authentication", 1, id="401"),
        pytest.param(Failure(400, "context_length_exceeded"), "model_context_length", 1, id="too long"),
        pytest.param(Failure(429, "insufficient_quota"), "model_quota", 1, id="no quota"),
        pytest.param(Failure(429, retry_after_s=200), "model_rate_limited", 1, id="429 for too long"),
        pytest.param(TimeoutError(), "model_timeout", 3, id="timeout"),
        pytest.param(ConnectionError(), "model_unavailable", 3, id="lost"),
        pytest.param(httpx.ConnectError("refused"), "model_unavailable", 3, id="httpx"),
        pytest.param((ConnectionError(),), "model_unavailable", 3, id="lost in the answer"),
        pytest.param("not JSON", "invalid_output", 3, id="not JSON"),
        pytest.param({"moood": "calm"}, "invalid_output", 3, id="another field"),
        pytest.param(Reply("{", finish_reason="length"), "model_truncated", 1, id="cut off"),
        pytest.param(Reply(refusal="No."), "model_refusal", 1, id="refusal"),
        pytest.param(httpx.Response(502, html="<html>"), "model_unavailable", 3, id="a gateway's page"),
    ],
)
def test_a_failure_is_handled_as_that_of_a_provider(reply: Any, error_type: str, attempts: int) -> None:
    with FakeModel([reply] * attempts), pytest.raises(RunFailed) as caught:
        mood(moods())
    assert caught.value.error_type == error_type


@pytest.mark.parametrize("error", [TimeoutError, ConnectionError])
def test_a_function_may_raise_what_a_connection_does(error: type[Exception]) -> None:
    def fail(request: ModelRequest) -> Any:
        raise error

    with FakeModel([fail, CALM]) as model:
        assert mood(moods()) == "calm"
    assert len(model.requests) == 2


@pytest.mark.anyio
async def test_a_rate_limit_is_waited_for() -> None:
    with FakeModel([Failure(429, retry_after_s=0.1), CALM]):
        started = anyio.current_time()
        assert await moods().run_async("analyst", {"text": "Hi!"}) == CALM
        assert anyio.current_time() - started >= 0.1


def test_the_next_model_is_asked_in_an_outage() -> None:
    with FakeModel([*[Failure(500)] * 3, CALM]) as model:
        assert mood(moods(["openai/first", "anthropic/second"])) == "calm"
    assert [request["model"] for request in model.requests] == ["first"] * 3 + ["second"]


# Requests


@pytest.mark.parametrize("name", ["openai/gpt-4o", "anthropic/claude", "deepseek/chat"])
def test_a_request_has_its_parts_with_every_provider(name: str) -> None:
    """Some providers get the schema as words."""
    with FakeModel([CALM]) as model:
        mood(moods(Model(name, headers={"X-Team": "search"}, extra_body={"seed": 1})), "How are you?")
    [request] = model.requests
    assert request.agent_name == "analyst"
    assert "How are you?" in request.text
    assert request.schema["properties"] == {"mood": {"type": "string"}}
    assert request.tool_names == []
    assert (request["seed"], request.headers["x-team"]) == (1, "search")


def test_the_agent_of_a_conversation_is_known() -> None:
    flock = Flock("chat")
    flock.add_agent(
        FlockFactory.create_default_agent("chat", "Chats.", input="messages: Messages", output="reply: str")
    )
    with FakeModel({"chat": {"reply": "Hello."}}) as model:
        flock.run("chat", {"messages": [{"role": "user", "content": "Hi!"}]})
    assert model.requests[0].text == "Hi!"
    assert ModelRequest({"messages": [{"role": "user", "content": "You are great!"}]}, {}).agent_name == ""
    assert ModelRequest({"messages": [{"role": "user", "content": "You are great!"}]}, {}).schema is None


# Which calls are answered


@pytest.mark.parametrize(
    "name",
    ["openai/gpt-4o", "azure/mine", "local/smollm2-135m", "bedrock/nova", "gpt-4o", None, Model("x/y", api_key="k")],
)
def test_any_model_is_replaced_without_a_key_or_a_warning(name: Any, caplog: pytest.LogCaptureFixture) -> None:
    flock = moods(name)
    with caplog.at_level(logging.WARNING), FakeModel([CALM]):
        assert mood(flock) == "calm"
        create_app(flock, auth="host").build_middleware_stack()
    assert caplog.messages == []


@pytest.mark.anyio
async def test_the_limits_of_a_model_are_not_applied() -> None:
    with FakeModel(lambda request: CALM), anyio.fail_after(50):  # the second call would wait for a minute
        rows = [{"text": "Hi!"}] * 3
        flock = moods(Model("openai/x", requests_per_minute=1))
        assert await flock.run_batch_async("analyst", rows, progress=False) == [CALM] * 3


@pytest.mark.anyio
async def test_an_engine_that_is_already_open_is_answered_too() -> None:
    app = create_app(moods(), auth="host", store=":memory:")
    async with (
        app.lifespan(),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client,
    ):
        for word in ("calm", "angry"):
            with FakeModel([{"mood": word}]):
                body = {"agent_name": "analyst", "inputs": {"text": "Hi!"}}
                assert (await client.post("/run/flock", json=body)).json()["result"] == {"mood": word}


def test_the_inner_of_two_models_answers() -> None:
    with FakeModel([CALM]):
        with FakeModel([{"mood": "inner"}]):
            assert mood(moods()) == "inner"
        assert mood(moods()) == "calm"
    assert ModelClient.stand_in is None


@pytest.mark.anyio
async def test_a_transport_is_for_one_engine_and_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    own = FakeModel([{"mood": "own"}])
    with FakeModel([CALM]):
        async with moods().engine(transport=own.transport) as engine:
            run = await engine.wait((await engine.submit("analyst", {"text": "Hi!"})).run_id)
            assert run.error_type == "model_not_configured"
            monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-test")
            run = await engine.wait((await engine.submit("analyst", {"text": "Hi!"})).run_id)
            assert (run.status, bytes(run.result or b"")) == (RunStatus.COMPLETED, b'{"mood":"own"}')
        assert await moods().run_async("analyst", {"text": "Hi!"}) == CALM
    assert own.requests[0].headers["authorization"] == "Bearer sk-of-a-test"


# A test that would not notice a mistake fails


def broken(request: ModelRequest) -> Any:
    raise KeyError("mistake")


@pytest.mark.parametrize(
    ("replies", "words"),
    [
        (None, 'It has no reply left to a request: \'{"text": "Hi!"}'),
        ({"analyst": []}, "It has no reply left to the agent 'analyst'"),
        (
            {"mood": "calm"},
            "It has no replies to the agent 'analyst', only to 'mood'. Replies to all agents are a list.",
        ),
        (broken, "could not reply. 'mistake'"),
    ],
)
def test_a_request_without_a_reply_fails_the_run_and_the_test(replies: Any, words: str) -> None:
    with pytest.raises(AssertionError) as caught, FakeModel(replies), pytest.raises(RunFailed) as failed:
        mood(moods())
    assert failed.value.error_type == "agent_exception"
    assert words in str(caught.value)


@pytest.mark.parametrize("replies", [[CALM, CALM], {"analyst": [CALM, CALM], "other": CALM}])
def test_a_reply_that_is_not_used_fails_the_test(replies: Any) -> None:
    with pytest.raises(AssertionError, match="asked 1 times, and 1 of its replies"), FakeModel(replies):
        mood(moods())


def test_an_exception_in_the_block_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), FakeModel([CALM]):
        1 / 0  # noqa: B018
    assert ModelClient.stand_in is None


# Other processes


def test_a_served_model_replies_over_a_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [Failure(429, retry_after_s=0.01), ConnectionError(), ('{"mood":', ConnectionError()), CALM, CALM]
    with FakeModel(replies).serve() as url:
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        monkeypatch.setenv("OPENAI_API_KEY", "any")
        assert mood(moods(), on_event=lambda event: None) == "calm"
        answer = httpx.post(f"{url}/chat/completions", json={"messages": [{"role": "user", "content": "Hi!"}]})
        assert answer.json()["choices"][0]["message"]["content"] == '{"mood":"calm"}'
        with pytest.raises(httpx.RemoteProtocolError):  # there is no reply left
            httpx.post(f"{url}/chat/completions", json={"messages": [{"role": "user", "content": "Hi!"}]})
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{url}/chat/completions")
