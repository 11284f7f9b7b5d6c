"""What the machines do to a server: small programs of a client, and the promises that must hold in all of them.

A client sends each request until there is a response, so a scenario continues while its server is killed, stopped, or
out of disk. ``Client`` keeps what was acknowledged. ``check`` compares that with the server, the effects and the bill.
"""

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx

from flock.testing import Failure, FakeModel, ModelRequest, Reply

__all__ = ["KEYS", "SCENARIOS", "SHOP", "Client", "Scenario", "check", "provider"]

SHOP = Path(__file__).parent / "shop.py"
#: The file of API keys. eve must see nothing of ann's.
KEYS = "ann=key-of-ann-123456\neve=key-of-eve-123456\n"
#: A response to each request, and the end of each wait, must come in this time.
PATIENCE_S = 60.0
FINAL = ("completed", "failed", "cancelled")
#: The server cannot accept it at the moment: it is sent again.
AGAIN = (429, 503)
TOKENS, PICODOLLARS = 15, 75_000_000  # of each answer of the provider, at 2.5 and 10 dollars for a million


class Lines(NamedTuple):
    """The times at which effects have begun, ended, and were seen by their program; by run and name."""

    begin: Mapping[tuple[str, str], list[float]]
    end: Mapping[tuple[str, str], list[float]]
    seen: Mapping[tuple[str, str], list[float]]


def effects(log: Path) -> Lines:
    lines = Lines(*(defaultdict[tuple[str, str], list[float]](list) for _ in range(3)))
    for line in log.read_text().splitlines() if log.exists() else ():
        at, what, run_id, name = line.split()
        getattr(lines, what)[run_id, name].append(float(at))
    return lines


class Client:
    """A client named ann, and what the server has acknowledged to her.

    Attributes:
        runs: the accepted runs that are not deleted, and their last known state.
        attempts: how often each was started or retried by her.
        starts: the times at which a process was started in place of one that was killed, in seconds of the epoch.
        acks: called with what was acknowledged, in the order of acknowledgement: ``(what, id, value)``.
    """

    def __init__(self, url: str, acks: Callable[[str, str, Any], object] = lambda what, id, value: None) -> None:
        self.url, self.acks = url, acks
        self.runs, self.batches, self.deleted = dict[str, Any](), dict[str, Any](), set[str]()
        self.ended_at, self.attempts = dict[str, float](), Counter[str]()
        self._number, self.starts = 0, list[float]()
        self._http = httpx.Client(timeout=PATIENCE_S / 2, limits=httpx.Limits(max_keepalive_connections=0))

    def close(self) -> None:
        self._http.close()

    def new_name(self, begin: str) -> str:
        self._number += 1
        return f"{begin}-{self._number}"

    def send(self, method: str, path: str, body: Any = None, *, who: str = "ann", key: str = "") -> httpx.Response:
        """Send a request until there is a response. Raises AssertionError if there is none in time."""
        headers = {"Authorization": f"Bearer key-of-{who}-123456", **({"Idempotency-Key": key} if key else {})}
        deadline, seen = time.monotonic() + PATIENCE_S, "nothing"
        while time.monotonic() < deadline:
            try:
                response = self._http.request(method, self.url + path, json=body, headers=headers)
            except httpx.TransportError as exc:
                seen = repr(exc)
            else:
                if response.status_code not in AGAIN and "accepted at the same time" not in response.text:
                    assert response.status_code < 500, f"{method} {path}: {response.text}"
                    return response
                seen = response.text
            time.sleep(0.02)
        raise AssertionError(f"{method} {path} gets no response in {PATIENCE_S:g} s: {seen}")

    def run(self, agent_name: str, *, is_async: bool = True, **inputs: Any) -> str:
        """Start a run, and return its id. ``session_id`` is that of the run."""
        body = {"agent_name": agent_name, "async_run": is_async}
        if "session_id" in inputs:
            body["session_id"] = inputs.pop("session_id")
        response = self.send("POST", "/run/flock", {**body, "inputs": inputs}, key=self.new_name("run"))
        run = self._accepted(response)
        self.runs[run["run_id"]] = run
        self.attempts[run["run_id"]] += 1
        self.acks("accepted", run["run_id"], None)
        self.note(run)
        return str(run["run_id"])

    def _accepted(self, response: httpx.Response) -> Any:
        assert response.status_code in (200, 202), response.text
        return response.json()

    def batch(self, agent_name: str, rows: list[Any]) -> str:
        body = {"agent_name": agent_name, "batch_inputs": rows, "max_workers": 2}
        batch = self._accepted(self.send("POST", "/run/batch", body, key=self.new_name("batch")))
        self.batches[batch["batch_id"]] = batch
        self.acks("accepted batch", batch["batch_id"], len(rows))
        return str(batch["batch_id"])

    def note(self, run: Any) -> None:
        """Keep the state of a run. A final state never changes but by a retry."""
        run_id, before = run["run_id"], self.runs.get(run["run_id"])
        if before is not None and before["status"] in FINAL and before["attempt"] == run["attempt"]:
            changed = {name: run[name] for name in ("status", "result", "error") if run[name] != before[name]}
            assert not changed, f"The final state of {run_id} has changed: {before} is now {run}"
        if run["status"] in FINAL and run_id not in self.ended_at:
            self.ended_at[run_id] = time.time()
            self.acks("ended", run_id, [run["status"], run["result"]])
        self.runs[run_id] = run

    def until(self, run_id: str, *statuses: str) -> Any:
        """Wait until a run has one of some statuses, by default a final one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            run = self.send("GET", f"/run/{run_id}{'' if statuses else '?wait=5'}").json()
            self.note(run)
            if run["status"] in (statuses or FINAL):
                return run
            assert run["status"] not in FINAL, run
            assert time.monotonic() < deadline, f"The wait for {run_id} does not end: {run}"
            time.sleep(0.005)

    def completed(self, run_id: str, result: Any) -> None:
        run = self.until(run_id)
        assert (run["status"], run["result"]) == ("completed", result), run

    def batch_until_end(self, batch_id: str) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            batch = self.send("GET", f"/batch/{batch_id}?wait=5").json()
            if batch["status"] in FINAL:
                self.acks("ended batch", batch_id, [batch["attempt"], batch["failed_items"]])
                return batch
            assert time.monotonic() < deadline, f"The wait for {batch_id} does not end: {batch}"

    def answer(self, run_id: str, output: Any) -> None:
        (question,) = self.until(run_id, "waiting")["waiting_for"]
        path = f"/run/{run_id}/calls/{quote(question['call_id'])}"
        response = self.send("POST", path, {"output": output})
        assert response.status_code == 200, response.text
        self.acks("answered", run_id, question["call_id"])

    def message(self, run_id: str, name: str, message: Any) -> None:
        response = self.send("POST", f"/run/{run_id}/messages/{name}", {"message": message}, key=f"{run_id}-{name}")
        assert response.status_code in (200, 202), response.text
        self.acks("sent", run_id, name)

    def cancel(self, run_id: str) -> None:
        assert self.send("POST", f"/run/{run_id}/cancel?wait=10").status_code in (200, 202)
        assert self.until(run_id)["status"] == "cancelled"

    def retry(self, path: str) -> None:
        """Retry a run or a batch. 409 means that a request whose response was lost did that."""
        self.acks("retrying", path.rpartition("/")[2], None)
        assert (response := self.send("POST", f"{path}/retry", {})).status_code in (202, 409), response.text
        self.acks("retried", path.rpartition("/")[2], None)

    def delete(self, run_id: str) -> None:
        self.acks("deleting", run_id, None)
        assert (response := self.send("DELETE", f"/run/{run_id}")).status_code in (204, 404), response.text
        self.forget(run_id)
        self.acks("deleted", run_id, None)

    def forget(self, run_id: str) -> None:
        del self.runs[run_id]
        self.deleted.add(run_id)

    def read_text(self, run_id: str) -> str:
        """Read the events of a run until its end, through all kills, and return the text that they write."""
        headers, text, last_id = {"Authorization": "Bearer key-of-ann-123456"}, "", 0
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            after, event = {"Last-Event-ID": str(last_id)} if last_id else {}, dict[str, str]()
            with (
                contextlib.suppress(httpx.TransportError),
                self._http.stream("GET", f"{self.url}/run/{run_id}/events", headers={**headers, **after}) as stream,
            ):
                for line in stream.iter_lines():
                    name, _, value = line.partition(": ")
                    event[name] = value
                    if line:
                        continue
                    if "id" in event:
                        assert int(event["id"]) > last_id, f"The event {event} comes after {last_id}"
                        last_id = int(event["id"])
                    if "data" in event:
                        text = _written(text, event["event"], json.loads(event["data"]))
                    if event.get("event") in ("run.completed", "run.failed", "run.cancelled"):
                        return text
                    event = {}
            time.sleep(0.02)
        raise AssertionError(f"The events of {run_id} do not end")


def _written(text: str, name: str, data: Any) -> str:
    if name == "output.delta":
        return text + str(data["text"])
    if name == "output.reset":
        return ""
    if name == "step.completed":  # if it has ended before the reader came, its text is only in the result
        assert text in ("", data["result"]["result"]), f"the events have written {text!r}, and the result is {data}"
        return str(data["result"]["result"])
    return str(data["output"].get("result") or "") if name == "output.snapshot" else text


# The provider


def _reply(request: ModelRequest) -> Any:
    """Reply as the model of the shop, by nothing but the request."""
    if request["model"] == "gone":
        return Failure(404, "model_not_found")
    last, agent = request["messages"][-1], request.agent_name
    if agent == "clerk":
        return {"reply": "It is paid."} if last["role"] == "tool" else Reply(calls=[("refund", {"euros": 80})])
    if agent == "chat":
        return {"reply": f"turn {sum(each['role'] == 'user' for each in request['messages'])}"}
    is_first = len(request["messages"]) == 2
    return "no JSON" if is_first and "odd" in request.text else {"stars": 5}


class Provider(FakeModel):
    """The provider of the shop. It counts what it has answered, also what nobody has received."""

    @property
    def answered(self) -> int:
        return sum(request["model"] != "gone" for request in self.requests)


@contextlib.contextmanager
def provider() -> Iterator[tuple[Provider, Mapping[str, str]]]:
    """Serve the provider, and yield it with the environment in which a server finds it."""
    model = Provider(_reply)
    with model.serve() as url:
        yield model, {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": "any"}


# The scenarios


class Scenario(NamedTuple):
    """What a client does, and the options that its server needs."""

    play: Callable[[Client], object]
    options: tuple[str, ...] = ()
    is_long: bool = False


def _function(client: Client) -> None:
    client.completed(client.run("plain", word="a"), {"word": "a"})
    client.completed(client.run("plain", is_async=False, word="b"), {"word": "b"})


def _chain(client: Client) -> None:
    client.completed(client.run("first", word="a"), {"result": "a1second"})


def _approval(client: Client) -> None:
    run_id = client.run("clerk", mail="It is broken.")
    client.answer(run_id, {"approved": True})
    client.completed(run_id, {"reply": "It is paid."})


def _workflow(client: Client) -> None:
    client.completed(client.run("workflow"), {"result": "part0 part1 part2 asecond last"})


def _caught(client: Client) -> None:
    run_id = client.run("payment")
    client.answer(run_id, True)
    client.completed(run_id, {"result": "charged: True"})


def _sleep(client: Client) -> None:
    run_id = client.run("reminder")
    client.message(run_id, "payment", 7)
    client.completed(run_id, {"result": "paid 7"})


def _session(client: Client) -> None:
    talk = client.new_name("talk")
    runs = [client.run("chat", message=f"message {n}", session_id=talk) for n in range(3)]
    for number, run_id in enumerate(runs, 1):
        client.completed(run_id, {"reply": f"turn {number}"})
    session = client.send("GET", f"/session/{talk}").json()
    assert session["usage"]["input_tokens"] + session["usage"]["output_tokens"] == 3 * TOKENS, session


def _stream(client: Client) -> None:
    run_id = client.run("write", topic="tea")
    text = client.read_text(run_id)
    client.completed(run_id, {"result": "All about tea."})
    assert text == "All about tea.", f"the events have written {text!r}"


def _batch(client: Client) -> None:
    batch_id = client.batch("rate", [{"text": "good"}, {"text": "odd"}, {"text": "fine"}])
    batch = client.batch_until_end(batch_id)
    assert batch["results"] == [{"stars": 5}] * 3, batch
    mended = client.batch("mended", [{"word": "a"}, {"word": "b"}])
    batch = client.batch_until_end(mended)
    if batch["failed_items"]:
        client.retry(f"/batch/{mended}")
        batch = client.batch_until_end(mended)
    assert [str(each["result"]) for each in batch["results"]] == ["a", "b"], batch


def _fallback(client: Client) -> None:
    for text in ("good", "odd"):
        client.completed(client.run("rate", text=text), {"stars": 5})


def _cancel(client: Client) -> None:
    run_id, waiting = client.run("endless"), client.run("payment")
    client.until(run_id, "running")
    client.cancel(run_id)
    client.until(waiting, "waiting")
    client.cancel(waiting)


def _delete(client: Client) -> None:
    first, second = client.run("plain", word="a"), client.run("rate", text="good")
    client.completed(first, {"word": "a"})
    client.delete(first)
    client.completed(second, {"stars": 5})
    client.delete(second)


def _retry(client: Client) -> None:
    run_id = client.run("mended", word="a")
    if client.until(run_id)["status"] == "failed":
        client.ended_at.pop(run_id)
        client.attempts[run_id] += 1
        client.retry(f"/run/{run_id}")
    client.completed(run_id, {"result": "a"})


def _retention(client: Client) -> None:
    runs = [client.run("plain", word=f"{n}") for n in range(4)]
    for run_id in runs:
        deadline = time.monotonic() + PATIENCE_S
        while (found := client.send("GET", f"/run/{run_id}?wait=5")).status_code == 200:
            if found.json()["status"] in FINAL and run_id in runs[-2:]:
                break
            assert time.monotonic() < deadline, f"{run_id} is kept"
            time.sleep(0.1)
        if run_id not in runs[-2:]:
            client.forget(run_id)


SCENARIOS: Mapping[str, Scenario] = {
    "function": Scenario(_function),
    "chain": Scenario(_chain),
    "approval": Scenario(_approval),
    "workflow": Scenario(_workflow),
    "caught": Scenario(_caught),
    "sleep": Scenario(_sleep, is_long=True),
    "session": Scenario(_session),
    "stream": Scenario(_stream),
    "batch": Scenario(_batch),
    "fallback": Scenario(_fallback),
    "cancel": Scenario(_cancel),
    "delete": Scenario(_delete),
    "retry": Scenario(_retry),
    "retention": Scenario(_retention, ("--keep-runs", "2"), is_long=True),
}


# The promises


def check(client: Client, model: Provider, log: Path, *, capacity: int = 0) -> None:
    """Check all promises after a scenario. Raises AssertionError.

    Args:
        log: of the effects.
        capacity: the ``--max-concurrency`` of a single process, if all its slots must be free.
    """
    listed = [run["run_id"] for run in client.send("GET", "/runs?limit=1000").json()["runs"]]
    assert sorted(listed) == sorted(client.runs), f"accepted {sorted(client.runs)}, and there are {sorted(listed)}"
    for run_id in client.runs:
        run = client.send("GET", f"/run/{run_id}").json()
        client.note(run)
        assert run["status"] in FINAL, run
        assert client.send("GET", f"/run/{run_id}", who="eve").status_code == 404, "it is ann's"
    for run_id in client.deleted:
        assert client.send("GET", f"/run/{run_id}").status_code == 404, "it is deleted"
    for batch_id in client.batches:
        assert client.send("GET", f"/batch/{batch_id}", who="eve").status_code == 404, "it is ann's"
    for path, name in (("/runs", "runs"), ("/batches", "batches"), ("/questions", "questions")):
        assert client.send("GET", path, who="eve").json()[name] == []
    _check_effects(client, effects(log))
    _check_bill(client, model)
    if capacity:
        place = client.new_name("place")
        runs = [client.run("meet", place=place, number=capacity) for _ in range(capacity)]
        for run_id in runs:
            client.completed(run_id, {"result": capacity})


def _check_effects(client: Client, lines: Lines) -> None:
    for (run_id, name), begun in lines.begin.items():
        if name == "turn":  # again and again, without a call
            continue
        seen = lines.seen.get((run_id, name), [])
        assert not seen or begun[-1] < seen[0], f"{name} of {run_id} has begun again after the program saw its end"
        lives = client.attempts.get(run_id, 1) + sum(begun[0] < start < begun[-1] for start in client.starts)
        assert len(begun) <= lives, f"{name} of {run_id} has begun {len(begun)} times in {lives} lives"
    for run_id, ended_at in client.ended_at.items():
        for (other, name), at in [*lines.begin.items(), *lines.end.items()]:
            assert other != run_id or at[-1] < ended_at, f"{name} of {run_id} goes on after its end"


def _check_bill(client: Client, model: Provider) -> None:
    """What the server counts is what the provider does, but for calls in flight at a kill: three at most at once."""
    spent = client.send("GET", "/usage").json()
    usage = spent["usage"] or {"input_tokens": 0, "output_tokens": 0}
    answers = (usage["input_tokens"] + usage["output_tokens"]) // TOKENS
    assert usage["input_tokens"] + usage["output_tokens"] == answers * TOKENS
    assert round(spent.get("cost", 0) * 1e12) == answers * PICODOLLARS
    lost = model.answered - answers
    assert 0 <= lost <= 3 * len(client.starts), f"the provider has answered {model.answered}, and {answers} are paid"
