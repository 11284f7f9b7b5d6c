"""The promises that must hold in all scenarios.

``check`` compares what the client was acknowledged with the server, the effects and the bill.
"""

import re
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from tests.proof.client import FINAL, PATIENCE_S, Client
from tests.proof.scenarios import TOKENS, Provider, counted

__all__ = ["check"]

PICODOLLARS = 75_000_000  # of each answer of the provider, at 2.5 and 10 dollars for a million tokens
#: How many calls of models are in flight at most in one process, and how late the provider may notice them, in seconds.
IN_FLIGHT, LATE_S = 3, 0.2
#: The key of a request to a model begins with its run and number of tries, the step, and the turn of the conversation.
KEY = re.compile(r"run:([^/:]+)(?::(\d+))?/(\d+)(?:/(\d+))?(?:/|$)")


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


Requests = tuple[tuple[str, str, Any], ...]

#: What only the principal of a run, or of a batch, may ask for: the method, the path and the body.
OF_A_RUN: Requests = (
    ("GET", "/run/{}", None),
    ("GET", "/run/{}/events", None),
    ("POST", "/run/{}/cancel", None),
    ("POST", "/run/{}/retry", {}),
    ("POST", "/run/{}/calls/ask:0", {"output": True}),
    ("POST", "/run/{}/messages/payment", {"message": 7}),
    ("DELETE", "/run/{}", None),
    ("GET", "/v1/responses/resp_{}_0", None),
    ("GET", "/v1/responses/resp_{}_0?stream=true", None),
    ("POST", "/v1/responses/resp_{}_0/cancel", None),
    ("DELETE", "/v1/responses/resp_{}_0", None),
)
OF_A_BATCH: Requests = (
    ("GET", "/batch/{}", None),
    ("GET", "/batch/{}/results", None),
    ("GET", "/batch/{}/events", None),
    ("POST", "/batch/{}/cancel", None),
    ("POST", "/batch/{}/retry", {}),
    ("DELETE", "/batch/{}", None),
)


def check(client: Client, model: Provider, log: Path, *, capacity: int = 0, workers: int = 1) -> None:
    """Check all promises after a scenario. Raises AssertionError.

    Args:
        log: of the effects.
        capacity: the ``--max-concurrency`` of each of *workers* processes, if all their slots must be free.
    """
    for each in (client, client.eve):
        for name, key, known in (("runs", "run_id", each.runs), ("batches", "batch_id", each.batches)):
            listed = [found[key] for found in each.send("GET", f"/{name}?limit=1000").json()[name]]
            assert sorted(listed) == sorted(known), f"accepted {sorted(known)}, and there are {sorted(listed)}"
        for run_id in each.runs:
            each.note(run := each.send("GET", f"/run/{run_id}").json())
            assert run["status"] in FINAL, run
    for batch_id in client.batches:
        client.note_batch(batch := client.send("GET", f"/batch/{batch_id}").json())
        assert batch["status"] in FINAL, batch
    for id_ in client.deleted:
        assert client.send("GET", f"/run/{id_}").status_code == 404, "it is deleted"
    _check_secrets(client)
    _check_effects(client, effects(log))
    answered = list(model.answered)  # the provider may still answer a request whose sender has gone
    repeated = _check_requests(client, answered)
    _check_bill(client, len(answered) - repeated)
    if capacity:
        _check_slots(client, capacity, workers)


def _check_secrets(client: Client) -> None:
    """A principal sees, changes and deletes nothing of another's. What was checked once is not checked again."""
    for ids, requests in ((client.runs, OF_A_RUN), (client.batches, OF_A_BATCH)):
        for id_ in ids.keys() - client.hidden:
            for method, path, body in requests:
                response = client.eve.send(method, path.format(id_), body)
                assert response.status_code == 404, f"{method} {path} of ann: {response.text}"
            client.hidden.add(id_)
    assert client.eve.send("GET", "/questions").json()["questions"] == [], "it is ann's"
    for name in client.sessions:
        session = client.eve.send("GET", f"/session/{name}").json()
        assert session["total_runs"] == 1, f"eve has one run in {name}: {session}"


def _check_effects(client: Client, lines: Lines) -> None:
    for (run_id, name), begun in lines.begin.items():
        if name == "turn":  # again and again, without a call
            continue
        if name == "charge" and client.lacks_memory:  # a retry repeats what has failed before the error
            continue
        seen = lines.seen.get((run_id, name), [])
        assert not seen or begun[-1] < seen[0], f"{name} of {run_id} has begun again after the program saw its end"
        lives = client.attempts.get(run_id, 1) + sum(begun[0] < death < begun[-1] for death in client.deaths)
        assert len(begun) <= lives, f"{name} of {run_id} has begun {len(begun)} times in {lives} lives"
    for run_id, ended_at in client.ended_at.items():
        for (other, name), at in [*lines.begin.items(), *lines.end.items()]:
            assert other != run_id or at[-1] < ended_at, f"{name} of {run_id} goes on after its end"


def _check_requests(client: Client, answered: Sequence[Any]) -> int:
    """Check that a call of a model that has finished was not repeated, and return how many others were.

    It has finished if a later one of its run has begun, or the run was seen to wait or to end.
    """
    begun, last = defaultdict[tuple[Any, ...], list[float]](list), dict[str, tuple[int, ...]]()
    for request in answered:
        match = KEY.match(request.headers["idempotency-key"])
        assert match, request.headers
        run_id, at, place = match[1], request["at"], tuple(int(each or 1) for each in match.groups()[1:])
        call, what = (run_id, *place), f"the finished call {place} of a model by {run_id}"
        assert place >= last.get(run_id, ()), f"{what} is repeated after {last[run_id]}"
        last[run_id] = place
        begun[call].append(at)
        ends = [end for end in (*client.waited[run_id], client.ended_at.get(run_id, at)) if begun[call][0] < end < at]
        assert not ends, f"{what} is repeated after its run was seen to wait or to end"
    for call, times in begun.items():
        lives = 1 + sum(times[0] - LATE_S < death < times[-1] for death in client.deaths)
        assert len(times) <= lives, f"the call {call} of a model has begun {len(times)} times in {lives} lives"
    for death in client.deaths:
        cut = [call for call, times in begun.items() if len(times) > 1 and times[0] - LATE_S < death < times[-1]]
        assert len(cut) <= IN_FLIGHT, f"more calls of models were repeated than were in flight at a kill: {cut}"
    return sum(len(times) - 1 for times in begun.values())


def _check_bill(client: Client, answers: int) -> None:
    """Everybody's usage together is *answers*, and nobody sees another's."""
    days = f"?to={datetime.now(UTC) + timedelta(days=2):%Y-%m-%d}"  # if a clock was ahead
    paid = 0
    for each in (client, client.eve):
        spent = each.send("GET", f"/usage{days}").json()
        usage = spent["usage"] or {"input_tokens": 0, "output_tokens": 0}
        tokens = counted(usage)
        assert "estimated_tokens" in usage or round(spent.get("cost", 0) * 1e12) * TOKENS == tokens * PICODOLLARS, spent
        assert each is client or tokens == TOKENS * len(each.runs), f"eve has had {len(each.runs)} answers: {spent}"
        paid += tokens
    assert paid == answers * TOKENS, f"the provider has given {answers} answers, and {paid / TOKENS:g} are paid"


def _check_slots(client: Client, capacity: int, workers: int) -> None:
    """In each process, as many runs as there are slots are executed at the same time."""
    place, met, deadline = client.new_name("place"), set[int](), time.monotonic() + PATIENCE_S
    waiting = [client.run("meet", place=place, number=capacity) for _ in range(capacity * workers)]
    while len(met) < workers:
        assert time.monotonic() < deadline, f"not all of {workers} times {capacity} slots are free"
        time.sleep(0.01)
        for run_id in list(waiting):
            run = client.send("GET", f"/run/{run_id}").json()
            if run["status"] in FINAL:
                met.add(run["result"]["result"])
                waiting.remove(run_id)
        if workers > 1:  # most may come to one process, for as long as the other one is busy
            waiting.append(client.run("meet", place=place, number=capacity))
    for run_id in waiting:
        client.until(run_id, "completed")
