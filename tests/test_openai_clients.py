"""The real clients of OpenAI, in environments of their own, against a real server."""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import ROOT
from tests.support.environments import new_environment, pip
from tests.support.pages import URL, blocks_of
from tests.support.servers import Server, flockapi_command, running

SERVED = """
import asyncio, os
from collections.abc import AsyncIterator
from typing import Literal, TypedDict
from flock.agents.messages import Messages
from flock.agents.tools import Tool
from flock.core import Audio, Document, Flock, FlockFactory, Image
from flock.errors import AgentError
from flock.runs import RunContext
from flock.testing import FakeModel, Reply

flock = Flock("served", model="openai/gpt-4o")

@flock.agent
async def write(topic: str) -> AsyncIterator[str]:
    for word in ("All ", "about ", topic):
        yield word

@flock.agent
async def slow(topic: str, context: RunContext) -> str:
    for word in ("All ", "about "):
        context.emit(word)
    await asyncio.sleep(1)
    return f"All about {topic}"

@flock.agent
def roles(talk: Messages) -> str:
    return " ".join(f"{message.role}={message.content}" for message in talk)

class Mood(TypedDict):
    mood: Literal["good", "bad"]
    words: list[str]

@flock.agent
def mood(text: str) -> Mood:
    return {"mood": "good", "words": text.split()}

@flock.agent
def look(photo: Image | None = None, sound: Audio | None = None, letter: Document | None = None, note: str = "") -> str:
    return " ".join([note, *(f"{file.name}:{len(file.read())}" for file in (photo, sound, letter) if file)])

@flock.agent
def fail(text: str) -> str:
    raise AgentError("no")

@flock.agent
async def nap(text: str) -> str:
    await asyncio.sleep(600)
    return text

def pay(amount: int) -> str:
    return f"paid {amount}"

flock.add_agent(FlockFactory.create_default_agent(
    "payer", input="order: str", output="reply: str", tools=[Tool(pay, needs_approval=True)]
))

flock.add_agent(FlockFactory.create_default_agent(
    "guide", input="talk: Messages", output="reply: str", client_tools=True, client_instructions=True
))

@flock.agent
async def hold(topic: str, context: RunContext) -> str:
    first = "Some " if topic == "coffee" and os.path.exists("may_go") else "All "
    context.emit(first)
    while not os.path.exists("may_go"):
        await asyncio.sleep(0.05)
    return f"{first}about {topic}"

flock.add_agent(FlockFactory.create_default_agent("thinker", input="text: str", output="reply: str"))

def reply(request):
    if request.agent_name == "thinker":
        return Reply({"reply": "Blue."}, reasoning="The sky?")
    if request["messages"][-1]["role"] == "tool":
        return {"reply": request["messages"][-1]["content"]}
    if request.agent_name == "payer":
        return Reply(calls=[("pay", {"amount": 3})])
    return Reply(calls=[("look", {"at": "sky"}), ("look", {"at": "sea"})])

FakeModel(reply).__enter__()
"""

PROGRAM = """
import sys
from typing import Literal
import openai
from openai import OpenAI
from pydantic import BaseModel

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")

class Mood(BaseModel):
    mood: Literal["good", "bad"]
    words: list[str]

def said(text):
    return [{"role": "user", "content": text}]

# Models and chat completions
assert [model.id for model in client.models.list()][:2] == ["write", "slow"]
assert client.models.retrieve("write").owned_by == "flock"
raw = client.chat.completions.with_raw_response.create(model="write", messages=said("tea"))
chat = raw.parse()
assert chat.choices[0].message.content == "All about tea" and chat.choices[0].finish_reason == "stop"
assert chat.id == "chatcmpl-" + raw.headers["flock-run-id"] and chat._request_id
chunks = list(client.chat.completions.create(
    model="write", messages=said("tea"), stream=True, stream_options={"include_usage": True}
))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "All about tea"
assert chunks[-1].usage.total_tokens == 0
with client.chat.completions.stream(model="write", messages=said("tea")) as stream:
    types = {event.type for event in stream}
    assert {"content.delta", "content.done"} <= types, types
    assert stream.get_final_completion().choices[0].message.content == "All about tea"
parsed = client.chat.completions.parse(model="mood", messages=said("a b"), response_format=Mood)
assert parsed.choices[0].message.parsed == Mood(mood="good", words=["a", "b"])
for call, error in (
    (lambda: client.chat.completions.create(model="wrote", messages=said("tea")), openai.NotFoundError),
    (lambda: client.chat.completions.create(model="write", messages=said("tea"), n=2), openai.BadRequestError),
    (lambda: client.chat.completions.create(model="fail", messages=said("tea")), openai.UnprocessableEntityError),
    (lambda: list(client.chat.completions.create(model="fail", messages=said("tea"), stream=True)), openai.APIError),
    (lambda: client.responses.retrieve("resp_x"), openai.NotFoundError),
):
    try:
        call()
    except error as exc:
        assert exc.message and exc.code, exc
    else:
        raise AssertionError(error)

# Responses
response = client.responses.create(model="write", input="tea")
assert response.output_text == "All about tea" and response.status == "completed"
assert client.responses.retrieve(response.id).output_text == response.output_text
(item,) = client.responses.input_items.list(response.id)
assert item.content[0].text == "tea"
client.responses.delete(response.id)
with client.responses.stream(model="write", input="tea") as stream:
    deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == stream.get_final_response().output_text == "All about tea"
assert client.responses.parse(model="mood", input="a b", text_format=Mood).output_parsed.words == ["a", "b"]
asked = {"model": "thinker", "input": "What colour?", "reasoning": {"summary": "auto"}}
with client.responses.stream(**asked) as stream:
    types = [event.type for event in stream]
    streamed = stream.get_final_response()
assert "response.reasoning_summary_text.delta" in types, types
for made in (client.responses.create(**asked), streamed):
    assert [item.type for item in made.output] == ["reasoning", "message"]
    assert (made.output[0].summary[0].text, made.output_text) == ("The sky?", "Blue.")
chunks = client.chat.completions.create(model="thinker", messages=said("What colour?"), stream=True)
assert "".join(getattr(chunk.choices[0].delta, "reasoning_content", "") for chunk in chunks) == "The sky?"
with client.responses.stream(model="mood", input="a b", text_format=Mood) as stream:
    assert stream.get_final_response().output_parsed.mood == "good"
assert client.responses.create(model="fail", input="tea").error.message.startswith("no The run is ")

# Background, resumed, and cancelled
text, number = "", None
with client.responses.create(model="slow", input="tea", background=True, stream=True) as events:
    for event in events:
        number = event.sequence_number
        if event.type == "response.created":
            id_ = event.response.id
        if event.type == "response.output_text.delta":
            text += event.delta
            break
for event in client.responses.retrieve(id_, stream=True, starting_after=number):
    assert event.sequence_number > number
    number = event.sequence_number
    if event.type == "response.output_text.delta":
        text += event.delta
assert event.type == "response.completed" and text == event.response.output_text == "All about tea"
with client.responses.stream(response_id=id_) as stream:
    assert stream.get_final_response().output_text == text
nap = client.responses.create(model="nap", input="tea", background=True)
assert nap.status in ("queued", "in_progress")
assert client.responses.cancel(nap.id).status == "cancelled"

# Conversations
first = client.responses.create(model="roles", input="a")
second = client.responses.create(model="roles", input="b", previous_response_id=first.id)
assert second.output_text == "user=a assistant=user=a user=b"
try:
    client.responses.create(model="roles", input="c", previous_response_id=first.id)
except openai.BadRequestError as exc:
    assert "A later response" in exc.message
else:
    raise AssertionError
conversation = client.conversations.create()
for text in ("a", "b"):
    last = client.responses.create(model="roles", input=text, conversation=conversation.id)
assert last.conversation.id == client.conversations.retrieve(conversation.id).id == conversation.id
items = list(client.conversations.items.list(conversation.id, order="asc", limit=3))
assert [item.content[0].text for item in items] == ["a", "user=a", "b", last.output_text]
assert client.conversations.delete(conversation.id).deleted

# Approvals
asked = client.responses.create(model="payer", input="Pay 3.")
(request,) = asked.output
assert (request.type, request.name) == ("mcp_approval_request", "pay")
answer = {"type": "mcp_approval_response", "approval_request_id": request.id, "approve": True}
with client.responses.stream(model="payer", input=[answer], previous_response_id=asked.id) as stream:
    assert stream.get_final_response().output_text == "paid 3"
assert client.responses.retrieve(asked.id).output[0].id == request.id

# Tools of the client
function = {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}}
tools = [{"type": "function", "function": function}]
messages = [{"role": "system", "content": "Look well."}, *said("What do you see?")]
with client.chat.completions.stream(model="guide", messages=messages, tools=tools) as stream:
    choice = stream.get_final_completion().choices[0]
assert choice.finish_reason == "tool_calls" and len(choice.message.tool_calls) == 2
assert [call.function.arguments for call in choice.message.tool_calls] == ['{"at":"sky"}', '{"at":"sea"}']
messages.append(choice.message.to_dict())
messages += [{"role": "tool", "tool_call_id": call.id, "content": "blue"} for call in choice.message.tool_calls]
for _ in range(2):
    answer = client.chat.completions.create(model="guide", messages=messages, tools=tools)
    assert answer.choices[0].message.content == "blue"
tools = [{"type": "function", "strict": None, **function}]
with client.responses.stream(model="guide", input="What do you see?", tools=tools) as stream:
    asked = stream.get_final_response()
assert [item.type for item in asked.output] == ["function_call"] * 2
outputs = [{"type": "function_call_output", "call_id": item.call_id, "output": "red"} for item in asked.output]
answer = client.responses.create(model="guide", input=outputs, tools=tools, previous_response_id=asked.id)
assert answer.output_text == "red"
print("all of it")
"""

FILES_PROGRAM = """
import base64, json, sys, urllib.request
import openai
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1] + "/v1", api_key="none")
text = lambda content: base64.b64encode(content).decode()
image, sound = "data:image/gif;base64," + text(b"GIF89a"), {"data": text(b"ID3..."), "format": "mp3"}
letter = {"filename": "a.pdf", "file_data": "data:application/pdf;base64," + text(b"%PDF-1.4")}
content = [
    {"type": "text", "text": "hi"},
    {"type": "image_url", "image_url": {"url": image, "detail": "low"}},
    {"type": "input_audio", "input_audio": sound},
    {"type": "file", "file": letter},
]
chat = client.chat.completions.create(model="look", messages=[{"role": "user", "content": content}])
assert chat.choices[0].message.content == "hi :6 :6 a.pdf:8", chat
with client.chat.completions.stream(model="look", messages=[{"role": "user", "content": content}]) as stream:
    assert stream.get_final_completion().choices[0].message.content == "hi :6 :6 a.pdf:8"
content = [
    {"type": "input_text", "text": "hi"},
    {"type": "input_image", "image_url": image, "detail": "auto"},
    {"type": "input_audio", "input_audio": sound},
    {"type": "input_file", **letter},
]
answer = client.responses.create(model="look", input=[{"role": "user", "content": content}])
assert answer.output_text == "hi :6 :6 a.pdf:8", answer
stored = json.load(urllib.request.urlopen(sys.argv[1] + "/files", b"%PDF-1.4" + b"x" * 3_000_000))
content = [{"type": "input_file", "file_id": stored["file_id"]}]
assert client.responses.create(model="look", input=[{"role": "user", "content": content}]).output_text == " :3000008"
for refused in ({"type": "input_image", "image_url": "http://127.0.0.1/a.png"}, {"type": "input_file", "file_url": "http://t"}):
    try:
        client.responses.create(model="look", input=[{"role": "user", "content": [refused]}])
    except openai.BadRequestError as exc:
        assert "Send a data URL" in exc.message
    else:
        raise AssertionError
print("all of it")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the client."""
    python = new_environment(tmp_path_factory.mktemp("openai"))
    subprocess.run(pip(python, "install", "--quiet", "openai==3.57.0"), check=True)
    return python


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served.py").write_text(SERVED)
    with running(*flockapi_command("serve", f"{tmp_path}/served.py", "--port", "0", "--store", ":memory:")) as made:
        yield made


def run(python: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(300)
def test_the_client_for_python_does_all_that_is_offered(environment: Path, server: Server) -> None:
    assert run(environment, "-c", PROGRAM, server.url) == "all of it\n"


@pytest.mark.timeout(300)
def test_the_client_for_python_sends_images_audio_and_documents(environment: Path, server: Server) -> None:
    assert run(environment, "-c", FILES_PROGRAM, server.url) == "all of it\n"


@pytest.mark.timeout(300)
def test_the_program_of_the_page_runs(environment: Path, tmp_path: Path) -> None:
    (code,) = [block.text for block in blocks_of(ROOT / "docs" / "openai.md") if block.language == "py"]
    serve = flockapi_command("serve", str(ROOT / "examples" / "writer.py"), "--port", "0", "--store", ":memory:")
    with running(*serve) as server:
        assert run(environment, "-c", code.replace(URL, server.url)) == "All about tea\nAll about tea"


LITELLM = """
import sys
import litellm

said = {"messages": [{"role": "user", "content": "tea"}], "api_base": sys.argv[1] + "/v1", "api_key": "none"}
chat = litellm.completion(model="openai/write", **said)
assert chat.choices[0].message.content == "All about tea", chat
chunks = litellm.completion(model="openai/write", stream=True, **said)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "All about tea"
response = litellm.responses(model="openai/write", input="tea", api_base=said["api_base"], api_key="none")
assert response.output[0].content[0].text == "All about tea", response
try:
    litellm.completion(model="openai/wrote", **said)
except litellm.NotFoundError as exc:
    assert "wrote" in str(exc)
else:
    raise AssertionError
print("all of it")
"""

#: Programs of clients for Node. They end with "all of it".
CLIENTS = ROOT / "tests" / "clients"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with clients for Node, and a version of Node that is new enough for them."""
    folder = tmp_path_factory.mktemp("node")
    packages = ("node@22", "openai@7", "ai@7", "@ai-sdk/openai-compatible@2")
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", *packages], check=True, cwd=folder)
    for program in CLIENTS.glob("*.mjs"):
        shutil.copy(program, folder)  # it imports the packages beside it
    return folder


@pytest.mark.skipif(shutil.which("npm") is None and "CI" not in os.environ, reason="npm is not installed; it is in CI")
@pytest.mark.parametrize("program", ["openai.mjs", "ai.mjs"])
@pytest.mark.timeout(400)
def test_clients_for_node(program: str, node: Path, server: Server) -> None:
    """``ai.mjs`` is the AI SDK of Vercel, whose loop executes the client's tools."""
    assert run(node / "node_modules" / ".bin" / "node", str(node / program), server.url) == "all of it\n"


@pytest.mark.timeout(300)
def test_litellm_as_a_client(server: Server, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "litellm")
    subprocess.run(pip(python, "install", "--quiet", "litellm==1.110.2"), check=True)
    assert "all of it\n" in run(python, "-c", LITELLM, server.url)


@pytest.mark.timeout(300)
def test_the_command_llm_knows_agents_from_one_file(server: Server, tmp_path: Path) -> None:
    python = new_environment(tmp_path / "llm")
    subprocess.run(pip(python, "install", "--quiet", "llm==0.36"), check=True)
    model = {"model_id": "flock-write", "model_name": "write", "api_base": f"{server.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for options in ([], ["--no-stream"]):
        command = [str(python.with_name("llm")), "-m", "flock-write", "--key", "none", *options, "tea"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert (done.stdout, done.returncode) == ("All about tea\n", 0), done.stderr


def test_streams_of_a_server_that_is_killed_are_resumed(tmp_path: Path) -> None:
    """A response by the number of its last event, a chat by the same request with its key.

    If the agent writes another text after the crash, the client gets an error, and can read the text that counts.
    """
    (tmp_path / "served.py").write_text(SERVED)
    command = f"cd {tmp_path} && exec {shlex.join(flockapi_command('serve', 'served.py', '--port', '0'))}"
    chat = {"model": "hold", "messages": [{"role": "user", "content": "tea"}], "stream": True}
    response: dict[str, Any] = {"model": "hold", "stream": True, "background": True}
    key, seen, other = {"Idempotency-Key": "once"}, list[Any](), list[Any]()
    with running("bash", "-c", command) as server:
        for events, topic in ((seen, "tea"), (other, "coffee")):
            with httpx.stream("POST", f"{server.url}/v1/responses", json={**response, "input": topic}) as stream:
                for event in events_in(stream):
                    events.append(event)
                    if event["type"] == "response.output_text.delta":
                        break
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=chat, headers=key) as stream:
            run_id = stream.headers["Flock-Run-Id"]
            assert next(event for event in events_in(stream) if event["choices"][0]["delta"].get("content"))
        server.process.kill()
        server.process.wait()
    (tmp_path / "may_go").touch()
    with running("bash", "-c", command) as server:
        texts = list[str]()
        for events in (seen, other):
            path = f"{server.url}/v1/responses/{events[0]['response']['id']}"
            query = f"?stream=true&starting_after={events[-1]['sequence_number']}"
            with httpx.stream("GET", f"{path}{query}") as stream:
                events += events_in(stream)
            texts.append(httpx.get(path).json()["output"][0]["content"][0]["text"])
        assert "".join(event.get("delta", "") for event in seen) == texts[0] == "All about tea"
        assert (other[-1]["type"], other[-1]["code"], texts[1]) == ("error", "text_replaced", "Some about coffee")
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=chat, headers=key) as stream:
            assert stream.headers["Flock-Run-Id"] == run_id
            chunks = list(events_in(stream))
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "All about tea"
        assert httpx.get(f"{server.url}/run/{run_id}").json()["result"] == {"result": "All about tea"}


def events_in(stream: httpx.Response) -> Iterator[Any]:
    for line in stream.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line[6:])


@pytest.mark.timeout(300)
def test_the_compliance_checks_pass_but_for_images_and_compaction(tmp_path: Path) -> None:
    python = new_environment(tmp_path / "llm-comply")
    subprocess.run(pip(python, "install", "--quiet", "llm-comply==0.5.0"), check=True)
    (tmp_path / "served.py").write_text(CHECKED)
    serve = flockapi_command("serve", f"{tmp_path}/served.py", "--port", "0", "--store", ":memory:")
    with running(*serve) as server:
        for format_, failing in FAILING.items():
            command = [str(python.parent / "llm-comply"), "run", "--base-url", f"{server.url}/v1", "--format", format_]
            command += ["--model", "guide", "--api-key", "none"]
            report = subprocess.run(command, capture_output=True, text=True, check=False).stdout
            assert re.findall(r"❌ (.+) \(", report) == failing, report
            assert report.count("✅") >= 7


#: The checks of what is not offered.
FAILING = {
    "openai-chat": ["Image Input"],
    "open-responses": ["Image Input", "Compaction Endpoint", "Compaction Missing Required Model"],
}

CHECKED = """
from flock.core import Flock, FlockFactory
from flock.testing import FakeModel, Reply

flock = Flock("checked", model="openai/gpt-4o")
flock.add_agent(FlockFactory.create_default_agent(
    "guide", input="talk: Messages", output="reply: str", client_tools=True, client_instructions=True
))

def reply(request):
    if request.get("tools") and request["messages"][-1]["role"] != "tool":
        return Reply(calls=[(request["tools"][0]["function"]["name"], {"location": "San Francisco"})])
    return {"reply": "Hello, Alice: 1 2 3 4 5."}

FakeModel(reply).__enter__()
"""
