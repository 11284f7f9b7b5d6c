"""A client of the scenarios. It sends each request until there is a response, and keeps what was acknowledged.

So a scenario continues while its server is killed, stopped, or out of disk.
"""

import contextlib
import functools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import httpx

__all__ = ["FINAL", "KEYS", "PATIENCE_S", "Client"]

#: The file of API keys. eve must see nothing of ann's.
KEYS = "ann=key-of-ann-123456\neve=key-of-eve-123456\n"
#: A response to each request, and the end of each wait, must come in this time.
PATIENCE_S = 60.0
FINAL = ("completed", "failed", "cancelled")
#: The server cannot accept it at the moment: it is sent again.
AGAIN = (429, 503)
BEING_ACCEPTED = ("accepted at the same time", "still being accepted")
Event = dict[str, str]


class Client:
    """A client, by default ann, and what the server has acknowledged to her.

    Attributes:
        runs: the accepted runs that are not deleted, and their last known state.
        batches: the same of batches, with their items when they have ended.
        sessions: the conversations.
        hidden: the runs and batches that eve was found not to see.
        attempts: how often each run was started or retried by her.
        waited: the times at which each run was seen to wait, in seconds of the epoch.
        deaths: the times at which a process of the server was killed.
        acks: called with what was acknowledged, in the order of acknowledgement: ``(what, id, value)``.
        is_damaged: records could not be read for a while, and a conversation leaves them out.
        lacks_memory: the server lacked memory for a moment: what has failed because of that is tried again.
        first: the number of its first name. Two clients of the same name have different ones.
        eve: another client of the same server.
    """

    def __init__(
        self,
        url: str,
        acks: Callable[[str, str, Any], object] = lambda what, id, value: None,
        first: int = 0,
        who: str = "ann",
    ) -> None:
        self.url, self.acks = url, acks
        self.runs, self.batches, self.deleted = dict[str, Any](), dict[str, Any](), set[str]()
        self.sessions, self.hidden = list[str](), set[str]()
        self.ended_at, self.attempts = dict[str, float](), Counter[str]()
        self.waited, self.deaths, self.is_damaged = defaultdict[str, list[float]](list), list[float](), False
        self.lacks_memory, self._number, self._key = False, first, f"Bearer key-of-{who}-123456"
        self._http = httpx.Client(timeout=PATIENCE_S / 2, limits=httpx.Limits(max_keepalive_connections=0))

    @functools.cached_property
    def eve(self) -> "Client":
        return Client(self.url, who="eve")

    def close(self) -> None:
        self._http.close()
        if "eve" in self.__dict__:
            self.eve.close()

    def new_name(self, begin: str) -> str:
        self._number += 1
        return f"{begin}-{self._number}"

    def send(
        self, method: str, path: str, body: Any = None, *, key: str = "", content: bytes | None = None
    ) -> httpx.Response:
        """Send a request until there is a response. Raises AssertionError if there is none in time."""
        headers = {"Authorization": self._key, **({"Idempotency-Key": key} if key else {})}
        deadline, seen = time.monotonic() + PATIENCE_S, "nothing"
        while time.monotonic() < deadline:
            try:
                response = self._http.request(method, self.url + path, json=body, content=content, headers=headers)
            except httpx.TransportError as exc:
                seen = repr(exc)
            else:
                again = (*AGAIN, 500) if self.lacks_memory else AGAIN
                if response.status_code not in again and not any(each in response.text for each in BEING_ACCEPTED):
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
        return self._begun(self._accepted(response))

    def _begun(self, run: Any) -> str:
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
        self.batches[batch["batch_id"]] = {"status": "starting"}
        self.acks("accepted batch", batch["batch_id"], len(rows))
        return str(batch["batch_id"])

    def note(self, run: Any) -> None:
        """Keep the state of a run. A final state never changes but by a retry."""
        assert "run_id" in run, f"an accepted run is unknown: {run}"
        run_id, before = run["run_id"], self.runs.get(run["run_id"])
        if before is not None and before["status"] in FINAL and before["attempt"] == run["attempt"]:
            _check_unchanged(before, run)
        if run["status"] in FINAL and run_id not in self.ended_at:
            self.ended_at[run_id] = time.time()
            self.acks("ended", run_id, [run["status"], run["result"]])
        if run["status"] == "waiting":
            self.waited[run_id].append(time.time())
        self.runs[run_id] = run

    def note_batch(self, batch: Any) -> None:
        """Keep the state of a batch and of its items, which never change but by a retry if they are final."""
        batch_id, before = batch["batch_id"], self.batches[batch["batch_id"]]
        if batch["status"] in FINAL:
            batch["items"] = self.send("GET", f"/batch/{batch_id}/results").json()
            if before["status"] in FINAL and before["attempt"] == batch["attempt"]:
                _check_unchanged(before, batch)
            else:
                self.ended_at |= {item["run_id"]: time.time() for item in batch["items"]}
                results = [item["result"] for item in batch["items"]]
                self.acks("ended batch", batch_id, [batch["attempt"], batch["failed_items"], results])
        self.batches[batch_id] = batch

    def until(self, run_id: str, *statuses: str) -> Any:
        """Wait until a run has one of some statuses, by default a final one."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            run = self.send("GET", f"/run/{run_id}{'' if statuses else '?wait=5'}").json()
            self.note(run)
            if self.lacks_memory and "MemoryError" in (run["error"] or ""):
                self.retry(f"/run/{run_id}")
                continue
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
                self.note_batch(batch)
                if not (self.lacks_memory and "MemoryError" in str(batch["items"])):
                    return batch
                self.retry(f"/batch/{batch_id}")
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
        id_ = path.rpartition("/")[2]
        items = self.batches[id_]["items"] if id_ in self.batches else []
        for each in [id_, *(item["run_id"] for item in items if item["status"] == "failed")]:
            self.ended_at.pop(each, None)
            self.attempts[each] = self.attempts.get(each, 1) + 1
        self.acks("retrying", id_, None)
        assert (response := self.send("POST", f"{path}/retry", {})).status_code in (202, 409), response.text
        self.acks("retried", id_, None)

    def delete(self, run_id: str) -> None:
        self.acks("deleting", run_id, None)
        assert (response := self.send("DELETE", f"/run/{run_id}")).status_code in (204, 404), response.text
        self.forget(run_id)
        self.acks("deleted", run_id, None)

    def forget(self, run_id: str) -> None:
        del self.runs[run_id]
        self.deleted.add(run_id)

    def _events(self, method: str, path: str, last_id: int = 0, body: Any = None, key: str = "") -> Iterator[Event]:
        """Yield the header ``Flock-Run-Id``, and the events of a stream until it breaks off."""
        headers = {"Authorization": self._key, **({"Idempotency-Key": key} if key else {})}
        headers |= {"Last-Event-ID": str(last_id)} if last_id else {}
        with (
            contextlib.suppress(httpx.TransportError),
            self._http.stream(method, self.url + path, json=body, headers=headers) as stream,
        ):
            if stream.status_code == 200:
                yield {"run": stream.headers.get("flock-run-id", "")}
                event = Event()
                for line in stream.iter_lines():
                    if line:
                        name, _, value = line.partition(": ")
                        event[name] = value
                    elif event:
                        yield event
                        event = Event()

    def read_text(self, run_id: str) -> str:
        """Read the events of a run until its end, through all kills, and return the text that they write."""
        text, last_id, deadline = "", 0, time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            for event in self._events("GET", f"/run/{run_id}/events", last_id):
                if "id" in event:
                    assert int(event["id"]) > last_id, f"The event {event} comes after {last_id}"
                    last_id = int(event["id"])
                if "data" in event:
                    text = _written(text, event["event"], json.loads(event["data"]))
                if event.get("event") in ("run.completed", "run.failed", "run.cancelled"):
                    return text
            time.sleep(0.02)
        raise AssertionError(f"The events of {run_id} do not end")

    def read_answer(self, path: str, **body: Any) -> tuple[str, str | None]:
        """Stream an answer of OpenAI's protocol to its end, and return its run and text; None if it was replaced.

        What breaks off is asked again with its key. A response in the background resumes after its last event.
        """
        key, run_id, response_id, text, last = self.new_name("answer"), "", "", "", -1
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if response_id and "background" in body:
                events = self._events("GET", f"/v1/responses/{response_id}?stream=true&starting_after={last}")
            else:
                text, last, events = "", -1, self._events("POST", path, body={**body, "stream": True}, key=key)
            for event in events:
                if "run" in event and not run_id:
                    run_id = self._begun(self.send("GET", f"/run/{event['run']}").json())
                assert event.get("run", run_id) == run_id, f"{event} is another run than {run_id}"
                if event.get("data") == "[DONE]":
                    return run_id, text
                if "data" not in event:
                    continue
                data = json.loads(event["data"])
                if "sequence_number" in data:
                    assert data["sequence_number"] > last, f"{data} comes after {last}"
                    last, response_id = data["sequence_number"], data.get("response", {}).get("id", response_id)
                if (error := data.get("error", data if data.get("type") == "error" else None)) is not None:
                    assert run_id in error["message"], f"an error that does not name {run_id}: {error}"
                    is_clear = error["code"] in ("text_replaced", "interrupted") or "MemoryError" in error["message"]
                    assert is_clear, error
                    if error["code"] == "text_replaced":
                        return run_id, None
                if data.get("type") == "response.completed":
                    return run_id, text
                text += data.get("delta", "") if "type" in data else _chat_text(data)
            if self.lacks_memory and run_id:
                self.until(run_id)  # which tries it again, and that attempt has other numbers
                text, last = "", -1
            time.sleep(0.02)
        raise AssertionError(f"The answer of {run_id} does not end")


def _check_unchanged(before: Any, now: Any) -> None:
    names = {"status", "result", "error", "items", "failed_items", "results"} & now.keys()
    changed = {name: now[name] for name in names if now[name] != before[name]}
    assert not changed, f"A final state has changed: {before} is now {now}"


def _chat_text(chunk: Any) -> str:
    return "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))


def _written(text: str, name: str, data: Any) -> str:
    if name == "output.delta":
        return text + str(data["text"])
    if name == "output.reset":
        return ""
    if name == "step.completed":  # if it has ended before the reader came, its text is only in the result
        assert text in ("", data["result"]["result"]), f"the events have written {text!r}, and the result is {data}"
        return str(data["result"]["result"])
    return str(data["output"].get("result") or "") if name == "output.snapshot" else text
