"""What the machines do to a server: small programs of a client. ``promises`` has what must hold in all of them."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flock.testing import Failure, FakeModel, ModelRequest, Reply
from tests.proof.client import FINAL, PATIENCE_S, Client

__all__ = ["SCENARIOS", "SHOP", "TOKENS", "Client", "Provider", "Scenario", "counted", "provider"]

SHOP = Path(__file__).parent / "shop.py"
TOKENS = 15  # of each answer of the provider


# The provider


def _reply(request: ModelRequest) -> Any:
    """Reply as the model of the shop, by nothing but the request, and note when it has come."""
    request["at"] = time.time()
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
    def answered(self) -> list[ModelRequest]:
        return [request for request in self.requests if request["model"] != "gone"]


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


def counted(usage: Any) -> int:
    """Return the tokens that the provider has counted. Those of an answer that was lost on its way are estimated."""
    return int(usage["input_tokens"] + usage["output_tokens"] - usage.get("estimated_tokens", 0))


def _session(client: Client) -> None:
    talk = client.new_name("talk")
    client.sessions.append(talk)
    runs = [client.run("chat", message=f"message {n}", session_id=talk) for n in range(3)]
    for number, run_id in enumerate(runs, 1):
        least = 1 if client.is_damaged or client.lacks_memory else number
        most = 3 if client.lacks_memory else number  # one that was retried may be the last one
        run = client.until(run_id)
        assert run["result"] in [{"reply": f"turn {each}"} for each in range(least, most + 1)], run
    session = client.send("GET", f"/session/{talk}").json()
    assert counted(session["usage"]) == 3 * TOKENS or client.lacks_memory, session
    client.eve.completed(client.eve.run("chat", message="mine", session_id=talk), {"reply": "turn 1"})


def _stream(client: Client) -> None:
    run_id = client.run("write", topic="tea")
    text = client.read_text(run_id)
    client.completed(run_id, {"result": "All about tea."})
    is_whole = text == "All about tea." or client.lacks_memory  # an attempt that has failed ends before
    assert is_whole, f"the events have written {text!r}"


def _openai(client: Client) -> None:
    tea = [{"role": "user", "content": "tea"}]
    for path, body in (
        ("/v1/responses", {"input": "tea", "background": True}),
        ("/v1/responses", {"input": tea}),
        ("/v1/chat/completions", {"messages": tea}),
    ):
        run_id, text = client.read_answer(path, model="write", **body)
        client.completed(run_id, {"result": "All about tea."})
        assert text in ("All about tea.", None), f"the stream has written {text!r}"


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
        client.retry(f"/run/{run_id}")
    client.completed(run_id, {"result": "a"})


def _file(client: Client) -> None:
    letter = client.new_name("letter").encode() * 1000
    file_id = client.send("POST", "/files", content=letter).json()["file_id"]
    client.acks("sent file", file_id, None)
    assert client.send("GET", f"/files/{file_id}").content == letter  # later it would keep it for a day
    run_id = client.run("weigh", letter={"file_id": file_id})
    while (run := client.until(run_id))["status"] == "failed":  # the agent has read it at a bad moment
        assert "cannot be read now" in run["error"], run
        client.retry(f"/run/{run_id}")
        time.sleep(0.5)
    client.completed(run_id, {"result": len(letter)})
    assert client.eve.send("GET", f"/files/{file_id}").status_code == 404, "it is ann's"
    client.delete(run_id)


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
    "openai": Scenario(_openai),
    "batch": Scenario(_batch),
    "fallback": Scenario(_fallback),
    "cancel": Scenario(_cancel),
    "delete": Scenario(_delete),
    "retry": Scenario(_retry),
    "file": Scenario(_file),
    "retention": Scenario(_retention, ("--keep-runs", "2"), is_long=True),
}
