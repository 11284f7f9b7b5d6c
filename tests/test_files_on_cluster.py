"""Files on a cluster, in a folder that all processes share. The page is docs/files.md."""

import asyncio
import base64
import json
import os
import re
import stat
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from flock.command.cli import main
from flock.core import data_url
from flock.errors import Conflict, DefinitionError, StoreError, TooLarge
from flock.models.llm import ModelClient
from flock.runs import BatchOptions, new_id
from flock.store.contents import KEEP_UNUSED_S
from flock.temporal import TemporalWorker, files
from flock.temporal import engine as engine_module
from flock.temporal.cluster import Cluster
from flock.temporal.files import SharedContents
from flock.temporal.messages import RUN_WORKFLOW, RowsOrder, run_workflow_id
from flock.testing import FakeModel, Reply
from flockapi import FlockAPI, create_app
from tests.support import PATIENCE_S
from tests.support.cluster import engine_with_worker, on_temporal
from tests.support.engines import ended
from tests.support.http import post_run
from tests.support.servers import flockapi_command, running
from tests.test_files import KEYS, PNG, as_user, each, receipts
from tests.test_files_for_models import receipt_flock
from tests.test_temporal import open_pair, working

pytestmark = pytest.mark.anyio

IN_BASE64 = data_url(PNG).partition(",")[2]

READING = """
import pathlib, time
from flock.core import Document, Flock

flock = Flock({name!r})

@flock.agent
def read(letter: Document) -> str:
    with open({log!r}, "a") as log:
        log.write("read\\n")
    while pathlib.Path({log!r} + ".slow").exists():
        time.sleep(0.05)
    return letter.text()
"""


def below(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(f"*/*/{pattern}"))


def contents_in(folder: Path) -> list[Path]:
    return [path for path in below(folder, "*") if path.is_file()]


@pytest.fixture
async def api(temporal_address: str, tmp_path: Path) -> AsyncIterator[FlockAPI]:
    flock = receipts()
    async with engine_with_worker(temporal_address, flock, files_dir=tmp_path) as engine:
        app = create_app(flock, engine=engine, api_keys=KEYS, protocols=["openai", "a2a", "mcp"])
        async with app.lifespan():
            yield app


def shared(engine: Any) -> SharedContents:
    found = engine.cluster.files
    assert isinstance(found, SharedContents)
    return found


async def until_empty(folder: Path) -> None:
    with anyio.fail_after(PATIENCE_S):
        while below(folder, "*"):  # noqa: ASYNC110 - a worker deletes them
            await anyio.sleep(0.05)


async def test_all_ways_in_of_a_run_work_on_a_cluster(api: FlockAPI, temporal_address: str, tmp_path: Path) -> None:
    """A data URL, a form, an id, and parts of OpenAI, A2A and MCP. The content is stored once, and not in a history."""
    async with as_user(api) as client:
        run = (await post_run(client, "look", {"photo": data_url(PNG)})).json()
        form = {"agent_name": "look", "note": "hi"}
        sent = await client.post("/run/flock", data=form, files={"photo": ("a.png", PNG, "image/png")})
        (path,) = contents_in(tmp_path)[:1]
        uploaded = (await client.post("/files", content=PNG)).json()
        again = (await post_run(client, "look", {"photo": {"file_id": path.name, "name": "b.png"}})).json()
        part = {"type": "image_url", "image_url": {"url": data_url(PNG)}}
        body = {"model": "look", "messages": [{"role": "user", "content": [part]}]}
        said = await client.post("/v1/chat/completions", json=body)
        raw = {"messageId": "a", "role": "ROLE_USER", "parts": [{"raw": IN_BASE64}]}
        a2a = {"jsonrpc": "2.0", "id": 1, "method": "SendMessage", "params": {"message": raw}}
        task = (await client.post("/a2a/look", json=a2a, headers={"A2A-Version": "1.0"})).json()["result"]["task"]
        block = {"type": "image", "data": IN_BASE64, "mimeType": "image/png"}
        tool = {"name": "look", "arguments": {"photo": block}}
        mcp = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": tool}
        called = (await client.post("/mcp", json=mcp)).json()["result"]
        found = await client.get(f"/files/{path.name}")
    assert task["artifacts"][0]["parts"][0]["data"]["result"]["read"] == len(PNG)
    assert called["structuredContent"]["result"]["read"] == len(PNG)
    assert run["result"]["result"]["read"] == len(PNG), run
    assert [sent.json()["result"]["result"][name] for name in ("name", "note", "read")] == ["a.png", "hi", len(PNG)]
    assert again["result"]["result"]["name"] == "b.png"
    assert json.loads(said.json()["choices"][0]["message"]["content"])["result"]["read"] == len(PNG), said.text
    assert contents_in(tmp_path) == [path]
    assert found.content == path.read_bytes() == PNG
    assert uploaded["file_id"] == path.name
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert [stat.S_IMODE(os.stat(folder).st_mode) for folder in (path.parent, path.parent.parent)] == [0o700] * 2
    cluster = await Client.connect(temporal_address)
    history = (await cluster.get_workflow_handle(run_workflow_id(run["run_id"], 1)).fetch_history()).to_json()
    payloads = b"".join(map(base64.b64decode, re.findall(r'"data": "(.*?)"', history))).decode(errors="replace")
    assert path.name in payloads
    assert IN_BASE64 not in payloads


async def test_a_model_gets_a_file_from_a_worker(temporal_address: str, tmp_path: Path, model: FakeModel) -> None:
    model.replies = [Reply({"total": "40 €"})]
    async with on_temporal(temporal_address, receipt_flock(), files_dir=tmp_path, transport=model.transport) as engine:
        run = await engine.submit("receipt", {"photo": data_url(PNG), "note": "lunch"})
        assert (await engine.wait(run.run_id)).value == {"total": "40 €"}
    _, sent = model.requests[-1]["messages"][-1]["content"]
    assert sent == {"type": "image_url", "image_url": {"url": data_url(PNG)}}


async def test_another_principal_has_no_file_of_a_cluster(api: FlockAPI, tmp_path: Path) -> None:
    async with as_user(api) as ann, as_user(api, "bob") as bob, as_user(api, "ops:admin") as ops:
        await post_run(ann, "look", {"photo": data_url(PNG)})
        (path,) = contents_in(tmp_path)
        for other in (bob, ops):
            assert (await other.get(f"/files/{path.name}")).status_code == 404
            assert (await post_run(other, "look", {"photo": {"file_id": path.name}})).status_code == 404
        assert (await post_run(bob, "look", {"photo": data_url(PNG)})).json()["status"] == "completed"
    assert len(contents_in(tmp_path)) == 2, "each has its own"


async def test_a_content_is_deleted_with_its_last_run_on_a_cluster(api: FlockAPI, tmp_path: Path) -> None:
    async with as_user(api) as client:
        runs = [(await post_run(client, "look", {"photo": data_url(PNG)})).json()["run_id"] for _ in range(2)]
        assert (await client.delete(f"/run/{runs[0]}")).status_code == 204
        assert len(contents_in(tmp_path)) == 1
        assert (await client.delete(f"/run/{runs[1]}")).status_code == 204
    assert below(tmp_path, "*") == []


async def test_a_batch_on_a_cluster_keeps_its_files_until_it_is_deleted(api: FlockAPI, tmp_path: Path) -> None:
    rows = [{"photo": data_url(PNG), "note": str(n)} for n in range(45)]
    rows.append({"photo": data_url(b"\x89PNG\r\n\x1a\n another"), "note": "last"})
    async with as_user(api) as client:
        sent = await client.post("/run/batch", json={"agent_name": "look", "batch_inputs": rows})
        assert sent.status_code == 202, sent.text
        url = f"/batch/{sent.json()['batch_id']}"
        done = (await client.get(url, params={"wait": 60})).json()
        assert (done["status"], done["failed_items"]) == ("completed", 0), done
        assert {item["result"]["read"] for item in done["results"]} == {len(PNG), 16}
        await shared(api.engine).delete_unused(api.engine.cluster.has, 0)  # type: ignore[attr-defined]
        assert len(contents_in(tmp_path)) == len(below(tmp_path, "*.runs/*")) == 2
        assert (await client.delete(url)).status_code == 204
        await until_empty(tmp_path)


async def test_kill_9_of_a_worker_in_the_middle_of_a_run_and_of_a_batch(temporal_address: str, tmp_path: Path) -> None:
    """The next worker reads the same files. A server that was started later serves them."""
    target, log, folder = tmp_path / "reading.py", tmp_path / "log", tmp_path / "files"
    folder.mkdir()
    target.write_text(READING.format(name=new_id(), log=str(log)))
    slow = tmp_path / "log.slow"
    slow.touch()
    options = ["--files-dir", str(folder)]
    serve = flockapi_command("serve", str(target), "--temporal", temporal_address, "--port", "0", *options)
    letters = [{"letter": data_url(b"letter %d" % n)} for n in range(8)]
    with working(target, temporal_address, options=options) as doomed:
        with running(*serve) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
                body = {"agent_name": "read", "inputs": letters[0], "async_run": True}
                run = (await client.post("/run/flock", json=body)).json()
                batch = {"agent_name": "read", "batch_inputs": letters}
                sent = (await client.post("/run/batch", json=batch)).json()
                with anyio.fail_after(PATIENCE_S):
                    while not log.exists() or len(log.read_text().splitlines()) < 3:  # noqa: ASYNC110 - another process
                        await anyio.sleep(0.02)
            server.process.kill()
        doomed.kill()
    slow.unlink()
    with working(target, temporal_address, options=options), running(*serve) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            run = (await client.get(f"/run/{run['run_id']}", params={"wait": 30})).json()
            done = (await client.get(f"/batch/{sent['batch_id']}", params={"wait": 30})).json()
            found = [(await client.get(f"/files/{path.name}")).text for path in contents_in(folder)]
    assert run["result"] == {"result": "letter 0"}, run
    assert [item["result"] for item in done["results"]] == [f"letter {n}" for n in range(8)], done
    assert sorted(found) == [f"letter {n}" for n in range(8)]


async def test_a_worker_without_the_folder_leaves_runs_and_items_to_one_that_has_it(
    temporal_address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flock = receipts()
    flock.name = new_id()
    lacking = TemporalWorker(flock.agents, ModelClient(None), temporal_address, flock=flock.name, drain_timeout_s=0)
    async with open_pair(flock, temporal_address, with_worker=False, files_dir=tmp_path) as engine:
        async with lacking:
            run = await engine.submit("look", {"photo": data_url(PNG)})
            batch = await engine.submit_batch("look", [{"photo": data_url(PNG)}], BatchOptions())
            with anyio.fail_after(PATIENCE_S):
                while caplog.text.count("waits for a worker that has the folder for files (--files-dir)") < 2:  # noqa: ASYNC110
                    await anyio.sleep(0.02)
            assert not (await engine.get_run(run.run_id)).status.is_final
            plain = await engine.submit("read", {})
            assert (await engine.wait(plain.run_id)).error is None, "runs without files go on"
        async with open_pair(flock, temporal_address, files_dir=tmp_path):
            assert (await engine.wait(run.run_id)).error is None
            assert (await ended(engine, batch)).failed_items == 0


async def test_without_a_folder_a_cluster_takes_no_files_and_says_how_to_enable_them(temporal_address: str) -> None:
    async with on_temporal(temporal_address, receipts()) as engine:
        with pytest.raises(Conflict, match="--files-dir"):
            engine.files("ann")
        for inputs in ({"photo": data_url(PNG)}, {"photo": "a" * 64}):
            with pytest.raises(Conflict, match="--files-dir"):
                await engine.submit("look", inputs)


def test_the_folder_must_exist_and_needs_a_cluster(temporal_address: str, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    serve = CliRunner().invoke(main, ["serve", "x.py", "--files-dir", gone])
    assert "--files-dir needs --temporal" in serve.output
    with pytest.raises(DefinitionError, match=r"folder for files .* is missing or not writable.*--files-dir"):
        asyncio.run(Cluster(temporal_address, files_dir=gone).connect())


# What is kept


async def test_a_cluster_keeps_what_runs_have_and_deletes_the_rest_after_a_day(
    temporal_address: str, tmp_path: Path
) -> None:
    """Also what a killed process leaves: a temporary file, a mark of a run that never started, a mark of nothing."""
    async with on_temporal(temporal_address, receipts(), files_dir=tmp_path) as engine:
        folder, exists, box = shared(engine), engine.cluster.has, engine.files("ann")  # type: ignore[attr-defined]
        run = await engine.submit("look", {"photo": data_url(PNG)}, principal="ann")
        await engine.wait(run.run_id)
        kept = await box.keep(each(b"uploaded"))
        crashed = await box.keep(each(b"its run never started"))
        names = [f"{box.path(file.file_id).parent.name}/{file.file_id}" for file in (kept, crashed)]
        await folder.mark("run:0", [names[1]])
        box.path("x.tmp").write_text("half")
        box.path("0" * 64 + ".runs").mkdir()
        assert len(contents_in(tmp_path)) == 4
        await folder.delete_unused(exists)
        assert len(contents_in(tmp_path)) == 4, "for a day"
        for path in below(tmp_path, "**/*"):
            os.utime(path, (time.time() - 86_500,) * 2)
        assert box.find(kept.file_id) == kept
        await folder.delete_unused(exists)
        left = {path.name for path in contents_in(tmp_path)}
        assert left == {kept.file_id, *(name.rpartition("/")[2] for name in run.files)}
        assert len(below(tmp_path, "*.runs")) == 1


async def test_a_content_is_kept_for_a_retry_whose_first_attempt_is_gone(temporal_address: str, tmp_path: Path) -> None:
    async with on_temporal(temporal_address, receipts(), files_dir=tmp_path) as engine:
        cluster, box = engine.cluster, engine.files("ann")  # type: ignore[attr-defined]
        file = await box.keep(each(b"a text"))
        first = await engine.submit("read", {"letter": file.file_id}, principal="ann")
        await engine.wait(first.run_id)
        retry = replace(first, run_id=new_id(), attempt=2)
        await shared(engine).mark(run_workflow_id(retry.run_id, 1), retry.files)
        await cluster.start(RUN_WORKFLOW, engine._order(retry), retry)  # type: ignore[attr-defined]
        await engine.delete_run(first.run_id)
        with anyio.fail_after(PATIENCE_S):
            while not await cluster.has(run_workflow_id(retry.run_id, 1)):  # noqa: ASYNC110 - the search lags
                await anyio.sleep(0.05)
        await shared(engine).delete_unused(cluster.has, 0)
        assert [path.name for path in contents_in(tmp_path)] == [file.file_id]
        assert not await cluster.has(run_workflow_id(new_id(), 1))


async def test_a_run_is_not_accepted_on_a_cluster_if_its_file_is_deleted_meanwhile(tmp_path: Path) -> None:
    """Another process deletes the content before it is marked, or while: then the mark wins."""
    folder = SharedContents(tmp_path / "default")
    box = folder.of("ann", 100, 1000)
    file = await box.keep(each(b"a"))
    name = f"{box.path(file.file_id).parent.name}/{file.file_id}"
    folder.delete(name, time.time())
    with pytest.raises(Conflict, match="Send it again"):
        await folder.mark("run:1", [name])
    assert below(tmp_path, "*.runs/*") == []
    await box.keep(each(b"a"))
    rename = Path.rename

    def rename_after_a_mark(path: Path, to: Path) -> Path:
        if path.name == file.file_id:
            folder._mark("run:2", name)
        return rename(path, to)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename_after_a_mark)
        folder.delete(name, time.time())
    assert box.path(file.file_id).read_bytes() == b"a"
    assert [path.name for path in contents_in(tmp_path)] == [file.file_id]


async def test_the_files_of_a_principal_have_their_limit_over_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = (SharedContents(tmp_path / "default") for _ in range(2))
    await here.of("ann", 100, 10).keep(each(b"12345"))
    await there.of("ann", 100, 10).keep(each(b"67890"))
    monkeypatch.setattr(files, "COUNT_INTERVAL_S", 0.0)
    here._count_at = 0.0
    with pytest.raises(TooLarge, match="max_files_bytes"):
        await here.of("ann", 100, 10).keep(each(b"x"))


async def test_a_folder_that_cannot_be_written_is_an_error_of_the_store(tmp_path: Path) -> None:
    folder = SharedContents(tmp_path / "default")
    file = await folder.of("ann", 100, 1000).keep(each(b"a"))
    name = f"{folder.folder('ann').name}/{file.file_id}"
    (folder.root / f"{name}.runs").write_text("not a folder")
    with pytest.raises(StoreError, match="folder for files cannot be used"):
        await folder.mark("run:1", [name])


# Deletions


def stored(root: Path) -> tuple[SharedContents, str, Path]:
    """Return a folder with one content, and its name."""
    folder = SharedContents(root / "default")
    path = folder.folder("ann") / ("a" * 64)
    path.parent.mkdir(parents=True)
    path.write_text("a")
    return folder, f"{path.parent.name}/{path.name}", path


def age(root: Path) -> None:
    for path in root.rglob("*"):
        os.utime(path, (time.time() - KEEP_UNUSED_S - 100,) * 2)


async def never(workflow_id: str) -> bool:
    return False


async def test_a_content_that_is_sent_again_during_a_deletion_is_kept(
    api: FlockAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, has_released = SharedContents.release, asyncio.Event()

    async def late(folder: SharedContents, workflow_id: str, names: Any, *at: float) -> None:
        os.utime(contents_in(tmp_path)[0], (sent_at := time.time(), sent_at))
        while time.time() == sent_at:  # a clock has steps
            pass
        await release(folder, workflow_id, names, *at)
        has_released.set()

    monkeypatch.setattr(SharedContents, "release", late)
    async with as_user(api) as client:
        run = (await post_run(client, "look", {"photo": data_url(PNG)})).json()["run_id"]
        assert (await client.delete(f"/run/{run}")).status_code == 204
        assert len(contents_in(tmp_path)) == 1
        rows = {"agent_name": "look", "batch_inputs": [{"photo": data_url(PNG)}]}
        url = f"/batch/{(await client.post('/run/batch', json=rows)).json()['batch_id']}"
        assert (await client.get(url, params={"wait": 60})).json()["status"] == "completed"
        has_released.clear()
        assert (await client.delete(url)).status_code == 204
        with anyio.fail_after(PATIENCE_S):
            await has_released.wait()
    assert len(contents_in(tmp_path)) == 1
    assert below(tmp_path, "*.runs/*") == [], "no run has it"


async def test_the_files_of_a_batch_are_released_when_the_cluster_answers_again(
    api: FlockAPI, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    input_of, errors = Cluster.input_of, [RPCError("away", RPCStatusCode.UNAVAILABLE, b"")]

    async def away_once(cluster: Cluster, workflow_id: str, type_: Any) -> Any:
        if errors and type_ is RowsOrder:
            raise errors.pop()
        return await input_of(cluster, workflow_id, type_)

    async with as_user(api) as client:
        rows = {"agent_name": "look", "batch_inputs": [{"photo": data_url(PNG)}]}
        url = f"/batch/{(await client.post('/run/batch', json=rows)).json()['batch_id']}"
        assert (await client.get(url, params={"wait": 60})).json()["status"] == "completed"
        monkeypatch.setattr(Cluster, "input_of", away_once)
        assert (await client.delete(url)).status_code == 204
        await until_empty(tmp_path)
    assert errors == []


async def test_a_content_that_a_killed_process_was_deleting_while_it_was_marked_is_restored(tmp_path: Path) -> None:
    folder, name, path = stored(tmp_path)
    folder._mark("run:1", name)
    path.rename(gone := path.with_name(f"{path.name}-{new_id()}.tmp"))
    age(tmp_path)
    folder._mark("run:2", name)
    await folder.delete_unused(never)
    assert path.read_text() == "a"
    assert not gone.exists()


async def test_the_sweep_keeps_the_mark_of_a_content_that_is_sent_again_meanwhile(tmp_path: Path) -> None:
    folder, name, path = stored(tmp_path)
    folder._mark("run:1", name)
    path.unlink()
    age(tmp_path)
    folder._mark("run:2", name)
    os.utime(path.with_suffix(".runs"), (0, 0))
    await folder.delete_unused(never)
    assert [mark.name for mark in below(tmp_path, "*.runs/*")] == ["run%3A2"]
    age(tmp_path)
    await folder.delete_unused(never, 1)
    assert below(tmp_path, "*") == []


async def test_the_sweep_leaves_the_event_loop_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared folder may be slow."""
    folder, name, _ = stored(tmp_path)
    folder._mark("run:1", name)
    folder._mark("run:2", name)
    age(tmp_path)
    loop, on_loop = threading.get_ident(), list[str]()

    def noted(call: str) -> Any:
        real = getattr(Path, call)

        def noting(path: Path, *args: Any, **named: Any) -> Any:
            if threading.get_ident() == loop:
                on_loop.append(f"{call} {path}")
            return real(path, *args, **named)

        return noting

    for call in ("exists", "glob", "stat", "unlink"):
        monkeypatch.setattr(Path, call, noted(call))
    await folder.delete_unused(never)
    assert on_loop == []
    monkeypatch.undo()
    assert below(tmp_path, "*") == []


async def test_a_sweep_that_fails_is_followed_by_the_next(
    temporal_address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_swept, errors = asyncio.Event(), [RPCError("no such namespace", RPCStatusCode.NOT_FOUND, b"")]

    async def sweep(folder: SharedContents, exists: Any) -> None:
        if errors:
            raise errors.pop()
        has_swept.set()

    monkeypatch.setattr(engine_module, "SWEEP_INTERVAL_S", 0.01)
    monkeypatch.setattr(SharedContents, "delete_unused", sweep)
    async with on_temporal(temporal_address, receipts(), files_dir=tmp_path):
        with anyio.fail_after(PATIENCE_S):
            await has_swept.wait()
    assert "cannot be deleted now" in caplog.text


async def test_the_marks_of_a_run_are_on_disk_with_one_sync_of_their_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name, path = stored(tmp_path)
    names = [name, name[:-1] + "b"]
    path.with_name("a" * 63 + "b").write_text("b")
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    await folder.mark("run:1", names)
    assert {each.name for each in synced[:2]} == {f"{each.rpartition('/')[2]}.runs" for each in names}
    assert synced[2:] == [path.parent]
