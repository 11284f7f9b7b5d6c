"""A2A as the SDK for Python sees it, against a real server."""

import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support import PATIENCE_S, ROOT
from tests.support.environments import new_environment, pip
from tests.support.pages import URL, blocks_of
from tests.support.servers import flockapi_command, free_port, running
from tests.test_front_end_clients import AGENTS as OTHERS
from tests.test_openai_clients import run

pytestmark = pytest.mark.timeout(400)

KEY = "key-of-the-clients"

AGENTS = (
    OTHERS
    + """
@flock.agent
def repeat(text: str, times: int) -> str:
    return text * times

from flock.core import Image

@flock.agent
def crop(photo: Image, side: str) -> tuple[Image, str]:
    return photo, side
"""
)

BEGIN = """
import asyncio, sys
import httpx
from a2a.client import A2ACardResolver, ClientConfig, ClientFactory
from a2a.helpers import get_artifact_text, get_data_parts, get_message_text, new_data_message, new_text_message
from a2a.types import (
    CancelTaskRequest, GetExtendedAgentCardRequest, GetTaskRequest, ListTasksRequest, Message, Part, Role,
    SendMessageRequest, SubscribeToTaskRequest, TaskPushNotificationConfig, TaskState,
)
from a2a.utils.errors import (
    ContentTypeNotSupportedError, InvalidParamsError, PushNotificationNotSupportedError, TaskNotCancelableError,
    TaskNotFoundError, UnsupportedOperationError,
)
from a2a.server.tasks.task_manager import append_artifact_to_task

url, key, *more = sys.argv[1:]

def text(*words, **ids):
    return SendMessageRequest(message=new_text_message(" ".join(words), role=Role.ROLE_USER, **ids))

def data(value, **ids):
    return SendMessageRequest(message=new_data_message(value, role=Role.ROLE_USER, **ids))

async def joined(events, task=None, note=lambda task: None):
    # What the SDK's own store makes of the events of a stream. After each event, note(task) is called
    async for event in events:
        if event.HasField("task"):
            task = event.task
        elif event.HasField("artifact_update"):
            append_artifact_to_task(task, event.artifact_update)
        else:
            task.status.CopyFrom(event.status_update.status)
        note(task)
    return task

def text_of(task):
    assert task.status.state == TaskState.TASK_STATE_COMPLETED, task
    (artifact,) = task.artifacts
    return get_artifact_text(artifact, "")

async def client_of(http, agent, **options):
    card = await A2ACardResolver(http, f"{url}/a2a/{agent}").get_agent_card()
    return card, ClientFactory(ClientConfig(httpx_client=http, **options)).create(card)

async def refused(error, awaitable):
    try:
        await awaitable
    except error as exc:
        return exc
    raise AssertionError(error)
"""

PROGRAM = (
    BEGIN
    + """
async def main():
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        # Cards
        async with httpx.AsyncClient() as stranger:
            public, _ = await client_of(stranger, "write")
        card, client = await client_of(http, "write")
        assert card == public and not card.skills and card.supported_interfaces[0].url == f"{url}/a2a/write"
        assert not card.capabilities.push_notifications and card.capabilities.streaming
        extended = await client.get_extended_agent_card(GetExtendedAgentCardRequest())
        assert "topic" in extended.skills[0].description

        # Messages, with and without streams, and a context
        task = await joined(client.send_message(text("tea")))
        assert text_of(task) == "All about tea"
        for options in ({"streaming": False}, {"streaming": True}):
            _, client = await client_of(http, "roles", **options)
            first = await joined(client.send_message(text("a")))
            second = await joined(client.send_message(text("b", context_id=first.context_id)))
            assert text_of(first) == "user=a" and text_of(second) == "user=a assistant=user=a user=b"
            same = text("c")
            assert len({(await joined(client.send_message(same))).id for _ in range(2)}) == 1
        found = await client.get_task(GetTaskRequest(id=second.id))
        assert found.history[0].parts[0].text == "b" and text_of(found) == text_of(second)
        _, client = await client_of(http, "mood")
        mood = await joined(client.send_message(data({"text": "a b"})))
        assert get_data_parts(mood.artifacts[0].parts) == [{"mood": "good", "words": ["a", "b"]}]
        # Files
        card, client = await client_of(http, "crop")
        assert "image/png" in card.default_input_modes
        photo = Part(raw=b"\\x89PNG\\r\\n\\x1a\\n...", media_type="image/png", filename="a.png")
        said = Message(message_id="a photo", role=Role.ROLE_USER, parts=[photo, Part(text="left")])
        (artifact,) = (await joined(client.send_message(SendMessageRequest(message=said)))).artifacts
        (given,) = [part for part in artifact.parts if part.url]
        assert (given.media_type, given.filename) == ("image/png", "a.png")
        assert (await http.get(given.url)).content == photo.raw
        address = Message(message_id="b", role=Role.ROLE_USER, parts=[Part(url="https://a.example/a.png")])
        refusal = await refused(InvalidParamsError, joined(client.send_message(SendMessageRequest(message=address))))
        assert "as raw" in str(refusal)
        _, client = await client_of(http, "repeat")
        assert text_of(await joined(client.send_message(data({"text": "ha", "times": 2})))) == "haha"
        _, client = await client_of(http, "replaced")
        assert text_of(await joined(client.send_message(text("tea")))) == "Another one"

        # A reader that leaves, and subscribes
        _, client = await client_of(http, "slow")
        async for event in client.send_message(text("tea")):
            if event.HasField("artifact_update"):
                break
        rest = client.subscribe(SubscribeToTaskRequest(id=event.artifact_update.task_id))
        assert text_of(await joined(rest)) == "All about tea"

        # An approval, by its id only
        _, client = await client_of(http, "payer")
        asked = await joined(client.send_message(text("pay")))
        assert asked.status.state == TaskState.TASK_STATE_INPUT_REQUIRED
        assert "pay" in get_message_text(asked.status.message)
        (question,) = get_data_parts(asked.status.message.parts)
        ids = {"task_id": asked.id, "context_id": asked.context_id}
        await refused(Exception, joined(client.send_message(text("yes", **ids))))
        answer = data({question["call_id"]: {"approved": True}}, **ids)
        assert text_of(await joined(client.send_message(answer))) == "paid 3"
        await refused(UnsupportedOperationError, joined(client.send_message(text("yes", **ids))))

        # Lists, cancellation, and errors
        _, client = await client_of(http, "nap", polling=True, streaming=False)
        tasks = [await joined(client.send_message(text(str(at)))) for at in range(3)]
        assert {task.status.state for task in tasks} <= {TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_WORKING}
        page = await client.list_tasks(ListTasksRequest(page_size=2))
        rest = await client.list_tasks(ListTasksRequest(page_size=2, page_token=page.next_page_token))
        assert [task.id for task in [*page.tasks, *rest.tasks]] == [task.id for task in tasks[::-1]]
        assert rest.next_page_token == ""
        for task in tasks:
            cancelled = await client.cancel_task(CancelTaskRequest(id=task.id))
            assert cancelled.status.state == TaskState.TASK_STATE_CANCELED
        assert not (await client.list_tasks(ListTasksRequest(status=TaskState.TASK_STATE_WORKING))).tasks
        await refused(TaskNotFoundError, client.get_task(GetTaskRequest(id="forged")))
        await refused(TaskNotFoundError, client.get_task(GetTaskRequest(id=asked.id)))
        _, client = await client_of(http, "fail")
        failed = await joined(client.send_message(text("x")))
        assert failed.status.state == TaskState.TASK_STATE_FAILED and get_message_text(failed.status.message) == "no"
        await refused(TaskNotCancelableError, client.cancel_task(CancelTaskRequest(id=failed.id)))
        push = TaskPushNotificationConfig(task_id=failed.id, url="http://127.0.0.1/")
        await refused(PushNotificationNotSupportedError, client.create_task_push_notification_config(push))
        file = text("x")
        file.message.parts[0].url = "http://127.0.0.1/"
        await refused(ContentTypeNotSupportedError, joined(client.send_message(file)))
    print("all of it")

asyncio.run(main())
"""
)

KILLED = (
    BEGIN
    + """
async def main():
    async with httpx.AsyncClient(timeout=60) as http:
        _, client = await client_of(http, "hold")
        message, ids, seen = text("tea"), set(), []

        def note(task):
            if task.artifacts and not any(seen):
                print("half", flush=True)
            ids.add(task.id)
            seen.append([get_artifact_text(artifact, "") for artifact in task.artifacts])

        try:
            await joined(client.send_message(message), note=note)
        except Exception as exc:
            pass
        (id,) = ids
        while True:  # until the server is up again
            try:
                task = await client.get_task(GetTaskRequest(id=id))
                note(task)
                if task.status.state != TaskState.TASK_STATE_COMPLETED:
                    task = await joined(client.subscribe(SubscribeToTaskRequest(id=id)), note=note)
                break
            except Exception:
                await asyncio.sleep(0.1)
        assert text_of(task) == "All about tea"
        # Whatever was seen at any time is the beginning of the whole: each character was seen once
        assert all(len(texts) < 2 and "All about tea".startswith("".join(texts)) for texts in seen), seen
        assert ["All "] in seen and seen[-1] == ["All about tea"], seen
        assert (await joined(client.send_message(message))).id == id and ids == {id}
        assert len((await client.list_tasks(ListTasksRequest())).tasks) == 1
    print("all of it")

asyncio.run(main())
"""
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with the client."""
    python = new_environment(tmp_path_factory.mktemp("a2a"))
    subprocess.run(pip(python, "install", "--quiet", "a2a-sdk==1.3.*"), check=True)
    return python


def test_the_client_of_the_sdk_does_all_that_is_offered(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(AGENTS)
    command = flockapi_command("serve", f"{tmp_path}/served.py", "--port", "0", "--store", ":memory:")
    with running(*command, FLOCK_API_KEYS=f"ann={KEY}") as server:
        assert run(environment, "-c", PROGRAM, server.url, KEY) == "all of it\n"
        (program,) = [block.text for block in blocks_of(ROOT / "docs" / "a2a.md") if block.language == "py"]
        program = program.replace(URL, server.url).replace("YOUR_KEY", KEY).replace("text_analyzer", "write")
        assert "TASK_STATE_COMPLETED" in run(environment, "-c", program)


def test_a_task_is_there_after_the_server_was_killed(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(AGENTS)
    port = free_port()
    command = f"cd {tmp_path} && exec {shlex.join(flockapi_command('serve', 'served.py', '--port', str(port)))}"
    arguments = [str(environment), "-c", KILLED, f"http://127.0.0.1:{port}", "none"]
    with running("bash", "-c", command) as server:
        reader = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert reader.stdout is not None
        assert reader.stdout.readline() == "half\n"
        server.process.kill()
        server.process.wait()
    (tmp_path / "may_go").touch()
    with running("bash", "-c", command):
        assert reader.communicate(timeout=PATIENCE_S)[0] == "all of it\n"
    assert reader.returncode == 0
