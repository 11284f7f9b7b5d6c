"""One refund from the model's request to the payment, with three principals, and a server that is killed between."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from flock.runs import new_id
from tests.support import PATIENCE_S
from tests.support.servers import Server, flockapi_command, free_port, running, serving, workers_of

SCRIPT = """
import pathlib, time
from flock.agents.tools import Tool
from flock.core import Flock, FlockFactory
from flock.runs import Principal, RunContext
from flock.testing import FakeModel, Reply
from flockapi import create_app

HERE = pathlib.Path({here!r})
flock = Flock({name!r}, model="openai/gpt-4o")

def reach(moment: str, note: str = "") -> None:
    with open(HERE / "log", "a") as log:
        log.write(f"{{moment}} {{note}}\\n")
    while (HERE / f"stop-{{moment}}").exists():
        time.sleep(0.01)

def refund(euros: int, context: RunContext) -> str:
    "Pay money back."
    reach("paying")
    assert context.principal is not None
    with open(HERE / "paid", "a") as paid:  # as a bank does: once for each key
        paid.write(f"{{context.idempotency_key}} {{euros}} for {{context.principal.name}}\\n")
    reach("paid")
    return "paid"

def reply(request):
    is_paid = request["messages"][-1]["role"] == "tool"
    reach("answering" if is_paid else "asking")
    return {{"reply": "It is paid."}} if is_paid else Reply(calls=[("refund", {{"euros": 80}})])

tool = Tool(refund, needs_approval=True, approver="refunds", four_eyes=True)
flock.add_agent(FlockFactory.create_default_agent("clerk", input="mail", output="reply", tools=[tool]))
FakeModel(reply).__enter__()

USERS = {{
    "ann": Principal(name="ann"),
    "bob": Principal(name="bob", roles=["refunds"]),
    "eve": Principal(name="eve", roles=["other"]),
}}

def identify(connection):
    name = connection.headers["authorization"].removeprefix("Bearer key-of-").removesuffix("-123456")
    return USERS.get(name)

app = create_app(flock, store=HERE / "flock.db", auth=identify)  # for a host
"""
KEYS = "ann=key-of-ann-123456\nbob:role:refunds=key-of-bob-123456\neve:role:other=key-of-eve-123456\n"


class Till:
    """A server of the script that is killed and started again. Each request says who sends it.

    Args:
        access: "keys" for our own server with keys, "auth" for the server of a host that identifies its users, or the
            address of a cluster, of which a worker is killed too.
    """

    def __init__(self, folder: Path, access: str) -> None:
        self.folder, self.access = folder, access
        (folder / "till.py").write_text(SCRIPT.format(here=str(folder), name=new_id()))
        (folder / "keys").write_text(KEYS)

    @contextmanager
    def started(self) -> Iterator[tuple[Server, list[int]]]:
        """Start the server with two processes, and yield it and the ids of all processes."""
        script, keys = self.folder / "till.py", ("--api-keys-file", str(self.folder / "keys"))
        pids: list[int] = []
        with ExitStack() as stack:
            if self.access == "keys":
                server = stack.enter_context(serving(script, self.folder, *keys, workers=2))
            elif self.access == "auth":
                app = ("uvicorn", "till:app", "--app-dir", str(self.folder), "--port", str(free_port()))
                server = stack.enter_context(running(sys.executable, "-m", *app, "--workers", "2"))
            else:
                from tests.test_temporal import working

                pids = [stack.enter_context(working(script, self.access)).pid]
                options = ("--port", "0", "--workers", "2", "--temporal", self.access, *keys)
                server = stack.enter_context(running(*flockapi_command("serve", str(script), *options)))
            server.wait_for_line("Application startup complete", times=2)
            server.wait_until_listening()
            yield server, [server.process.pid, *workers_of(server), *pids]

    @contextmanager
    def served(self, stop: str = "") -> Iterator[None]:
        """Serve in two workers, which stop at a moment. Kill them all at the end of the block."""
        if stop:
            (self.folder / f"stop-{stop}").touch()
        with self.started() as (server, pids):
            self.url = server.url
            yield
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            server.process.wait()
        if stop:
            (self.folder / f"stop-{stop}").unlink()

    def send(self, who: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer key-of-{who}-123456"}
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return httpx.request(method, f"{self.url}{path}", headers=headers, timeout=2, **options)
            except httpx.TransportError:  # the worker that got it is stopped
                assert time.monotonic() < deadline

    def until(self, moment: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while moment not in self.log():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def log(self) -> list[str]:
        path = self.folder / "log"
        return path.read_text().split() if path.exists() else []

    def run(self, path: str, status: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while (run := self.send("ann", "GET", path).json())["status"] != status:
            assert time.monotonic() < deadline, run
            time.sleep(0.05)
        return run

    def listed(self, who: str) -> list[str]:
        """Return the ids of the open questions that *who* may answer, when there are any: the search may lag."""
        deadline = time.monotonic() + PATIENCE_S
        while not (questions := self.send(who, "GET", "/questions").json()["questions"]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return [each["call_id"] for each in questions]


MOMENTS = ("asking", "waiting", "answered", "paying", "paid", "answering")
#: In the gate: each moment with keys, and the two in which money is in flight with the others.
IN_GATE = {(moment, "keys") for moment in MOMENTS} | {
    (at, by) for at in ("paying", "paid") for by in ("auth", "temporal")
}


@pytest.mark.parametrize(
    ("moment", "access"),
    [
        pytest.param(
            moment,
            access,
            marks=[
                *([] if access == "temporal" else [pytest.mark.slow]),
                *([] if (moment, access) in IN_GATE else [pytest.mark.nightly]),
            ],
        )
        for moment in MOMENTS
        for access in ("keys", "auth", "temporal")
    ],
)
def test_a_refund_that_is_approved_is_paid_once_whenever_its_server_is_killed(
    moment: str, access: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    till = Till(tmp_path, request.getfixturevalue("temporal_address") if access == "temporal" else access)
    body = {"agent_name": "clerk", "inputs": {"mail": "It is broken."}, "async_run": True}

    def approve(run: Any) -> str:
        """Try it as each principal, and return the path of the question."""
        (question,) = run["waiting_for"]
        path = f"/run/{run['run_id']}/calls/{quote(question['call_id'])}"
        yes = {"json": {"output": {"approved": True}}}
        assert till.send("ann", "POST", path, **yes).status_code == 403
        assert till.send("eve", "POST", path, **yes).status_code == 404
        assert till.listed("bob") == [question["call_id"]]
        assert till.send("bob", "POST", path, **yes).status_code == 200
        return path

    stop = {"waiting": "", "answered": "paying"}.get(moment, moment)
    with till.served(stop):
        path = till.send("ann", "POST", "/run/flock", json=body).headers["Location"]
        if moment != "asking":
            run = till.run(path, "waiting")
        if moment not in ("asking", "waiting"):
            question = approve(run)
        if moment not in ("waiting", "answered"):
            till.until(moment)
    with till.served():
        if moment in ("asking", "waiting"):
            again = till.run(path, "waiting")
            assert moment == "asking" or again["waiting_for"] == run["waiting_for"]
            question = approve(again)
        done = till.run(path, "completed")
        assert till.send("eve", "GET", question).status_code == 404
        seen = till.send("bob", "GET", question).json()
        assert (seen["status"], seen["answered_by"], seen["requested_by"]) == ("answered", "bob", "ann")
        assert till.send("bob", "GET", path).status_code == 404
    (call,) = [call for call in done["steps"][0]["calls"] if call["kind"] == "question"]
    assert (call["answered_by"], done["result"]) == ("bob", {"reply": "It is paid."})
    paid = set((tmp_path / "paid").read_text().splitlines())
    assert len(paid) == 1
    assert paid.pop().endswith(" 80 for ann")
