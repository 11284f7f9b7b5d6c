"""Random workflow programs, whose processes die. ``interpreter`` says what must come out of them."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from flock.steps.journal import Journal
from flock.store import queries
from tests.proof.generator import CLASSES, End, Fate
from tests.proof.interpreter import interpret
from tests.proof.lives import processes
from tests.proof.many import execute_seeds, execute_some
from tests.proof.memory import memories
from tests.proof.workflows import Statement

Attempt = Callable[[Statement, Fate], None]


@pytest.fixture(scope="module")
def attempt() -> Iterator[Attempt]:
    with processes() as attempt:
        yield attempt


@pytest.fixture(scope="module")
def attempt_in_memory() -> Iterator[Attempt]:
    with memories() as attempt:
        yield attempt


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_done_stays_done(name: str, attempt: Attempt) -> None:
    execute_some(name, 4, 0, attempt)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_done_stays_done_in_memory(name: str, attempt_in_memory: Attempt) -> None:
    execute_seeds(name, range(20), attempt_in_memory)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", CLASSES)
def test_what_is_done_stays_done_in_more_programs(name: str, attempt: Attempt) -> None:
    for seed in (1, 2):
        execute_some(name, 100, seed, attempt)


# What such programs have found


def call(n: int, seconds: float = 0.1, kind: Any = "work") -> Statement:
    return Statement(kind, n=n, seconds=seconds + n / 1000)


def program(kind: Any, *parts: Statement, limit_s: float | None = None, times: int = 0) -> Statement:
    return Statement(kind, parts, limit_s=limit_s, times=times)


#: In each of them the process dies in call 9, unless it is asked a question there.
FOUND = {
    "the loser of a race": program("seq", program("first", call(1), call(2, 0.2)), call(9)),
    "a call that was timed out": program(
        "seq", program("try", program("timeout", call(1, 0.3), limit_s=0.2), call(2)), call(9)
    ),
    "a call that was timed out, and a question": program(
        "seq", program("try", program("timeout", call(1, 0.3), limit_s=0.2), call(2)), Statement("ask", n=9)
    ),
    "a call that was timed out between two that were not": program(
        "seq", program("loop", program("wait", call(1), call(2, 0.3), limit_s=0.2), times=2), call(9)
    ),
    # A time-out passes again, and meanwhile the other one must not: its call ended after the first time-out.
    "a call in time beside one that was timed out": program(
        "seq",
        program(
            "gather",
            program("seq", program("try", program("timeout", call(1, 3), limit_s=1), call(2)), call(3)),
            program("seq", call(4, 0.9), program("timeout", call(5, 0.3), limit_s=0.5)),
        ),
        call(9),
    ),
    "the sibling of a task that fails": program(
        "seq", program("try", program("group", call(1, kind="fail"), call(2, 0.2)), call(3)), call(9)
    ),
    "the order of as_completed": program("seq", program("completed", call(1, 0.2), call(2)), call(9)),
    "the order of two races": program(
        "seq", program("first", program("seq", call(1), call(2, 0.4)), program("seq", call(3, 0.2), call(4))), call(9)
    ),
    "the first that fails in a gather": program(
        "seq", program("try", program("gather", call(1, 0.2, "fail"), call(2, kind="fail")), call(3, 0.3)), call(9)
    ),
    "a thread that lost a race": program("seq", program("first", call(1), call(2, 0.2, "block")), call(9)),
    "a group that fails in a tool": program(
        "seq", program("try", program("tool", program("group", call(1, kind="fail"))), call(2)), call(9)
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(name: str, attempt: Attempt) -> None:
    expected = interpret(FOUND[name])
    events = 100 if "question" in name else 2 * expected.begun.total() + len(expected.decisions) - 1
    for event in (events, 0):
        attempt(FOUND[name], Fate(is_stored=True, ends=(End(event, 5),)))


#: Those that have failed in memory, each with its fate. ``python -m tests.proof --in-memory --program`` shows them.
FOUND_IN_MEMORY = {
    "a call that ends while the cancellation of another one is stored": (
        '[{"kind":"loop","parts":[{"kind":"first","parts":[{"kind":"first","parts":[{"kind":"first",'
        '"parts":[{"kind":"block_and_fail","n":11,"seconds":0.401414},{"kind":"block_and_fail","n":12,'
        '"seconds":0.401732}],"n":9},{"kind":"work","n":15,"seconds":0.402646}],"n":8}],"n":7}],"n":6,'
        '"times":3},{"seed":384,"is_stored":true,"ends":[[6,0,true]]}]'
    ),
    "a call that ends while the thread of a cancelled one runs": (
        '[{"kind":"try","parts":[{"kind":"completed","parts":[{"kind":"first","parts":[{"kind":"block","n":8,'
        '"seconds":0.402236},{"kind":"work","n":9,"seconds":0.102646}]},{"kind":"tool",'
        '"parts":[{"kind":"work","n":15,"seconds":0.404123}],"limit_s":0.304359}]},{"kind":"work","n":19,'
        '"seconds":0.106083}]},{"is_stored":true,"ends":[[5,10,true]]}]'
    ),
    "a race in which a call ends while another one is stored": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"first","parts":[{"kind":"work",'
        '"seconds":0.101414,"is_equal":true},{"kind":"seq","parts":[{"kind":"plain","times":3},'
        '{"kind":"work","n":9,"seconds":0.101732}]}]},{"kind":"loop","parts":[{"kind":"work","n":11,'
        '"seconds":0.402236}],"times":3},{"kind":"first","parts":[{"kind":"seq","parts":[{"kind":"plain",'
        '"times":3},{"kind":"work","n":17,"seconds":0.103606}]}]}]},{"kind":"work","n":21,'
        '"seconds":0.106083}]},{"seed":606,"is_stored":true,"ends":[[3,10,true],[9,0,false]]}]'
    ),
    "a time-out after a loop": (
        '[{"kind":"seq","parts":[{"kind":"loop","parts":[{"kind":"work","n":5,"seconds":0.201414}],'
        '"times":2},{"kind":"agent","parts":[{"kind":"wait","parts":[{"kind":"fail","seconds":0.201732,'
        '"is_equal":true},{"kind":"fail","n":11,"seconds":0.402646}],"limit_s":0.303317}]}]},'
        '{"is_stored":true,"ends":[[8,10,true]]}]'
    ),
    "the time-out of a call in which a group has failed": (
        '[{"kind":"tool","parts":[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"fail","n":10,'
        '"seconds":0.201732}]},{"kind":"work","n":16,"seconds":0.403606}]}],"limit_s":0.305385},{}]'
    ),
    "a message that came while its call was cancelled": (
        '[{"kind":"loop","parts":[{"kind":"first","parts":[{"kind":"receive","n":6,"seconds":40.001414},'
        '{"kind":"receive","n":7}]}],"times":2},{"is_stored":true,"ends":[[1,4,true]]}]'
    ),
    "an answer that came while its question was cancelled": (
        '[{"kind":"loop","parts":[{"kind":"first","parts":[{"kind":"sleep","n":16,"seconds":0.204123},'
        '{"kind":"ask","n":17}]}],"times":3},{"seed":919,"is_stored":true,"ends":[[4,3,false]]}]'
    ),
    "an answer that came when its question was cancelled, and a retry": (
        '[{"kind":"first","parts":[{"kind":"fail","n":8,"seconds":0.102236},{"kind":"completed",'
        '"parts":[{"kind":"work","n":13,"seconds":0.802646}]},{"kind":"ask","n":14}]},{"seed":377,'
        '"is_stored":true,"ends":[[4,13,true]],"retries":1}]'
    ),
    "a sleep after one that was over when it was cancelled": (
        '[{"kind":"loop","parts":[{"kind":"first","parts":[{"kind":"work","n":7,"seconds":0.101414},'
        '{"kind":"sleep","n":8,"seconds":0.201732}]}],"times":2},{"seed":285,"is_stored":true}]'
    ),
    "a call that has ended, and waits for its turn while another one is cancelled": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"work","n":4,"seconds":0.101414},'
        '{"kind":"first","parts":[{"kind":"work","n":6,"seconds":0.101732},{"kind":"work","n":9,'
        '"seconds":0.102236}]}]},{"kind":"work","n":12,"seconds":0.103606}]},{"seed":791,"is_stored":true,'
        '"ends":[[5,4,true]]}]'
    ),
    "a call that starts while Uncertain, which cancels it, is stored": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"seq","parts":[{"kind":"plain","n":10,"times":3},'
        '{"kind":"work","n":11,"seconds":0.402236}],"n":9},{"kind":"block","n":15,"seconds":0.803606,'
        '"limit_s":0.154123,"is_once":true}],"n":3},{"kind":"work","n":16,"seconds":0.104359}],"n":2},'
        '{"is_stored":true,"ends":[[0,1,false],[3,3,true]]}]'
    ),
    "a call that ends after a cancellation": (
        '[{"kind":"seq","parts":[{"kind":"completed","parts":[{"kind":"flaky","n":4,"seconds":0.101414,"retries":2},'
        '{"kind":"wait","parts":[{"kind":"ask","n":6},{"kind":"ask","n":7}],"n":5,"limit_s":0.301732}],"n":3},'
        '{"kind":"work","n":10,"seconds":0.103317}],"n":1},{"is_stored":true,"ends":[[5,2,true]]}]'
    ),
    "a call in one that was in flight when the process died": (
        '[{"kind":"group","parts":[{"kind":"group","parts":[{"kind":"fail","n":6,"seconds":0.101414},{"kind":"tool",'
        '"parts":[{"kind":"seq","parts":[{"kind":"plain","n":9,"times":3},{"kind":"work","n":10,"seconds":0.101732}],'
        '"n":8}],"n":7,"limit_s":0.602236}],"n":4},{"kind":"group","parts":[{"kind":"fail","n":13,"seconds":0.202646,'
        '"limit_s":1.203317,"retries":1},{"kind":"work","n":14,"seconds":0.203606}],"n":12},{"kind":"work","n":15,'
        '"seconds":0.104123,"limit_s":0.154359},{"kind":"group","parts":[{"kind":"fail","n":19,"seconds":0.104796},'
        '{"kind":"work","n":20,"seconds":0.205385}],"n":17}],"n":3},{"seed":183,"is_stored":true,"ends":[[2,6,true],'
        "[12,13,true]]}]"
    ),
    "a race whose loser is a thread, and one that fails then": (
        '[{"kind":"try","parts":[{"kind":"first","parts":[{"kind":"first","parts":[{"kind":"fail","n":6,'
        '"seconds":0.802236}],"n":5},{"kind":"first","parts":[{"kind":"work","n":11,"seconds":0.203317},'
        '{"kind":"block_and_fail","n":12,"seconds":0.803606}],"n":8}],"n":3},{"kind":"work","n":13,'
        '"seconds":0.104123}],"n":2},{"is_stored":true,"ends":[[8,0,true]]}]'
    ),
    "two cancellations, of which the later one is of a thread": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"block","n":5,"seconds":0.801732},'
        '{"kind":"fail","n":6,"seconds":0.202236,"is_once":true}],"n":4},{"kind":"group","parts":[{"kind":"group",'
        '"parts":[{"kind":"work","n":11,"seconds":0.203317},{"kind":"work","n":13,"seconds":0.403606,'
        '"limit_s":0.304123,"is_once":true}],"n":9},{"kind":"work","n":14,"seconds":0.804359}],"n":7}],"n":2},'
        '{"is_stored":true,"ends":[[9,14,false]]}]'
    ),
    "the time of a call after a thread that was cancelled": (
        '[{"kind":"loop","parts":[{"kind":"wait","parts":[{"kind":"block","n":6,"seconds":0.801414},{"kind":"work",'
        '"n":7,"seconds":0.101732}],"n":5,"limit_s":0.152236}],"n":4,"times":3},{"is_stored":true,"ends":[[9,0,'
        "true]]}]"
    ),
    "two limits that pass at the same time": (
        '[{"kind":"gather","parts":[{"kind":"tool","parts":[{"kind":"tool","parts":[{"kind":"gather",'
        '"parts":[{"kind":"work","n":10,"seconds":0.101414},{"kind":"work","n":11,"seconds":0.101732}],"n":9}],"n":7,'
        '"limit_s":0.152236}],"n":6,"limit_s":0.602646},{"kind":"gather","parts":[{"kind":"seq",'
        '"parts":[{"kind":"plain","n":15,"times":20},{"kind":"work","n":16,"seconds":0.203317}],"n":14},'
        '{"kind":"ask","n":17}],"n":13},{"kind":"seq","parts":[{"kind":"plain","n":22,"times":3},{"kind":"work",'
        '"n":23,"seconds":0.104123}],"n":21}],"n":4},{"seed":170,"is_stored":true}]'
    ),
    "a limit that passes while a cancellation is stored": (
        '[{"kind":"group","parts":[{"kind":"fail","n":8,"seconds":0.401414},{"kind":"group","parts":[{"kind":"tool",'
        '"parts":[{"kind":"fail","n":12,"seconds":0.102236,"retries":2}],"n":11,"limit_s":0.152646},{"kind":"fail",'
        '"n":13,"seconds":0.103317},{"kind":"work","n":14,"seconds":0.103606},{"kind":"fail","n":15,'
        '"seconds":0.804123}],"n":10}],"n":2},{"seed":726,"is_stored":true,"ends":[[7,2,true]]}]'
    ),
    "sleeps that start in another order": (
        '[{"kind":"gather","parts":[{"kind":"block","n":4,"seconds":0.801414},{"kind":"first",'
        '"parts":[{"kind":"sleep","n":8,"seconds":20.002236},{"kind":"work","n":9,"seconds":0.202646}],"n":6},'
        '{"kind":"gather","parts":[{"kind":"sleep","n":11,"seconds":0.703317}],"n":10}],"n":3},{"seed":229,'
        '"is_stored":true,"ends":[[3,3,true]]}]'
    ),
    "a sleep after one whose time had come when it was cancelled": (
        '[{"kind":"case","parts":[{"kind":"first","parts":[{"kind":"sleep","n":5,"seconds":20.001414},'
        '{"kind":"receive","n":6,"seconds":40.001732}],"n":4},{"kind":"sleep","n":17,"seconds":6.004359},'
        '{"kind":"sleep","n":18,"seconds":0.704796}],"n":3},{"is_stored":true}]'
    ),
    "deadlines that start in another order": (
        '[{"kind":"gather","parts":[{"kind":"deadline","parts":[{"kind":"deadline","parts":[{"kind":"deadline",'
        '"parts":[{"kind":"work","n":19,"seconds":0.202646}],"n":16,"limit_s":30.003317}],"n":14,'
        '"limit_s":10.004359}],"n":12,"limit_s":10.004796},{"kind":"first","parts":[{"kind":"receive","n":24},'
        '{"kind":"deadline","parts":[{"kind":"deadline","parts":[{"kind":"sleep","n":27,"seconds":0.705568}],"n":26,'
        '"limit_s":0.606083}],"n":25,"limit_s":10.006403}],"n":22}],"n":3},{"is_stored":true,"ends":[[1,4,true]]}]'
    ),
    "deadlines that have passed when their blocks end in time again": (
        '[{"kind":"gather","parts":[{"kind":"deadline","parts":[{"kind":"deadline","parts":[{"kind":"work","n":7,'
        '"seconds":0.101414}],"n":5,"limit_s":10.003606}],"n":4,"limit_s":30.004123},{"kind":"receive","n":15,'
        '"seconds":40.004359,"comes":"never"}],"n":3},{"is_stored":true}]'
    ),
    "a sleep beside a call that has just ended": (
        '[{"kind":"first","parts":[{"kind":"deadline","parts":[{"kind":"seq","parts":[{"kind":"plain","n":27,'
        '"times":1},{"kind":"work","n":28,"seconds":0.105385}],"n":26}],"n":25,"limit_s":30.005568},{"kind":"sleep",'
        '"n":29,"seconds":20.006083}],"n":24},{"is_stored":true}]'
    ),
    "a retry of a cancelled call that is not cancelled again": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"flaky","n":7,"seconds":0.801732,'
        '"limit_s":0.302236,"retries":2},{"kind":"block","n":8,"seconds":0.402646}],"n":3},{"kind":"tool",'
        '"parts":[{"kind":"flaky","n":13,"seconds":0.103606,"retries":2}],"n":11,"limit_s":0.304359},{"kind":"agent",'
        '"parts":[{"kind":"block","n":22,"seconds":0.804796}],"n":21}],"n":2},{"is_stored":true,"ends":[[9,16,true]],'
        '"retries":1}]'
    ),
    "a limit that passes together with one in it, before a sibling fails": (
        '[{"kind":"group","parts":[{"kind":"fail","n":4,"seconds":0.401414},{"kind":"tool","parts":[{"kind":"tool",'
        '"parts":[{"kind":"fail","n":7,"seconds":0.401732,"limit_s":0.152236}],"n":6}],"n":5,"limit_s":0.153317}],'
        '"n":3},{"seed":611,"is_stored":true,"ends":[[4,2,true]]}]'
    ),
    "a limit whose clock is stopped after it has passed": (
        '[{"kind":"group","parts":[{"kind":"fail","n":4,"seconds":0.401414},{"kind":"tool","parts":[{"kind":"tool",'
        '"parts":[{"kind":"fail","n":7,"seconds":0.401732,"limit_s":0.152236,"retries":2}],"n":6,"limit_s":0.152646}],'
        '"n":5,"limit_s":0.153317}],"n":3},{"seed":611,"is_stored":true,"ends":[[4,2,true]]}]'
    ),
    "an answer that is given while a call that ends after it is stored": (
        '[{"kind":"seq","parts":[{"kind":"completed","parts":[{"kind":"ask","n":4},{"kind":"agent","parts":[{"kind":'
        '"seq","parts":[{"kind":"plain","n":10,"times":1},{"kind":"work","n":11,"seconds":0.101732}],"n":9}],"n":8}],'
        '"n":3},{"kind":"work","n":14,"seconds":0.103317}],"n":1},{"seed":366,"is_stored":true,"ends":[[0,15,true],'
        "[5,2,true]]}]"
    ),
    "a call that is cancelled before it is executed": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"group","parts":[{"kind":'
        '"loop","parts":[{"kind":"seq","parts":[{"kind":"plain","n":12,"times":20},{"kind":"work","n":13,"seconds":'
        '0.101732}],"n":11}],"n":10,"times":2},{"kind":"fail","n":999,"seconds":0.802236},{"kind":"fail","n":21,'
        '"seconds":0.203317}],"n":6}],"n":3},{"kind":"work","n":22,"seconds":0.103606}],"n":2},{"kind":"work","n":24,'
        '"seconds":0.104359}],"n":1},{"seed":38,"is_stored":true,"ends":[[11,3,true],[6,10,true]]}]'
    ),
    "a result that came after its time-out and that a retry keeps": (
        '[{"kind":"gather","parts":[{"kind":"timeout","parts":[{"kind":"block","n":4,"seconds":0.801414}],"n":3,"'
        'limit_s":0.151732},{"kind":"tool","parts":[{"kind":"work","n":6,"seconds":0.802236,"limit_s":0.152646,"r'
        'etries":1}],"n":5,"limit_s":0.603317}],"n":2},{"is_stored":true,"ends":[[7,6,false]],"retries":1}]'
    ),
    "a time-out around another one, of which time was skipped": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"loop","parts":[{"kind'
        '":"wait","parts":[{"kind":"work","seconds":0.401414,"is_equal":true},{"kind":"work","seconds":0.201732,"'
        'is_equal":true}],"n":5,"limit_s":0.602236}],"n":4,"times":2}],"n":3,"limit_s":0.602646},{"kind":"work","'
        'n":8,"seconds":0.103317}],"n":2},{"kind":"work","n":10,"seconds":0.104123}],"n":1},{"is_stored":true,"en'
        'ds":[[12,0,true]]}]'
    ),
    "equal calls that are cancelled one after the other, and that start in another order": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"group","parts":[{"kind":"work","seconds":0.801'
        '732,"is_equal":true},{"kind":"work","n":13,"seconds":0.402236}],"n":4},{"kind":"group","parts":[{"kind":'
        '"work","seconds":0.802646,"is_equal":true},{"kind":"loop","parts":[{"kind":"work","n":18,"seconds":0.203'
        '606}],"n":17,"times":2},{"kind":"fail","n":20,"seconds":0.204123}],"n":14}],"n":3},{"kind":"work","n":21'
        ',"seconds":0.104359}],"n":2},{"seed":908,"is_stored":true,"ends":[[8,18,true]]}]'
    ),
    "a race of two sleeps that start in another order": (
        '[{"kind":"seq","parts":[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"sleep","n":16,"secon'
        'ds":0.704123},{"kind":"seq","parts":[{"kind":"sleep","n":18,"seconds":6.004359},{"kind":"work","n":19,"s'
        'econds":0.204796}],"n":17}],"n":15}],"n":6},{"kind":"work","n":21,"seconds":0.105568},{"kind":"work","n"'
        ':22,"seconds":0.106083}],"n":1},{"seed":253,"is_stored":true,"ends":[[7,0,true]]}]'
    ),
    "equal sleeps that end alike, of which one wins a race": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"work","n":8,"seconds":0.401414},{"kind":"sl'
        'eep","n":10,"seconds":0.201732}],"n":5},{"kind":"first","parts":[{"kind":"sleep","n":12,"seconds":0.7022'
        '36}],"n":11},{"kind":"sleep","n":24,"seconds":20.005385}],"n":4},{"seed":375,"is_stored":true,"ends":[[8'
        ",0,true],[0,0,true]]}]"
    ),
    "a cancelled call that does not start again since a time-out passes before": (
        '[{"kind":"seq","parts":[{"kind":"wait","parts":[{"kind":"seq","parts":[{"kind":"plain","n":8,"seconds":0'
        '.502646,"is_random":true,"times":1},{"kind":"work","n":9,"seconds":0.403317}],"n":7}],"n":3,"limit_s":0.'
        '304796},{"kind":"work","n":16,"seconds":0.106083}],"n":1},{"seed":559,"is_stored":true,"ends":[[0,9,true'
        "]]}]"
    ),
    "a call that had failed and was not delivered before the run was cancelled": (
        '[{"kind":"group","parts":[{"kind":"mended","n":5,"seconds":0.101414},{"kind":"seq",'
        '"parts":[{"kind":"plain","n":10,"times":3},{"kind":"work","n":11,"seconds":0.102646}],'
        '"n":9}],"n":4},{"is_stored":true,"ends":[[0,19,false]],"cancel":[1,1,true],"retries":1}]'
    ),
    "a failed call in a call that has failed with a group of it, whose process died": (
        '[{"kind":"tool","parts":[{"kind":"group","parts":[{"kind":"mended","n":4,'
        '"seconds":0.201414},{"kind":"ask","n":9},{"kind":"completed","parts":[{"kind":"fail","n":13,'
        '"seconds":0.802236,"limit_s":1.202646,"is_once":true},{"kind":"loop","parts":[{"kind":"ask",'
        '"n":16}],"n":15,"times":3}],"n":10},{"kind":"agent","parts":[{"kind":"fail","n":18,'
        '"seconds":0.203606,"limit_s":0.154123,"retries":2}],"n":17}],"n":3}],"n":2,'
        '"limit_s":0.604359},{"seed":559,"is_stored":true,"ends":[[6,9,true]],"retries":1}]'
    ),
    "a call that fails at the same time at which the next one starts": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"mended","n":6,"seconds":0.201414},'
        '{"kind":"agent","parts":[{"kind":"loop","parts":[{"kind":"work","n":13,"seconds":0.101732}],'
        '"n":9,"times":3}],"n":8}],"n":4},{"kind":"work","n":16,"seconds":0.802236,'
        '"limit_s":0.602646,"retries":1}],"n":3},{"is_stored":true,"retries":1}]'
    ),
    "a default that is delivered before a cancellation that was stored before it": (
        '[{"kind":"gather","parts":[{"kind":"loop","parts":[{"kind":"receive","n":7,'
        '"seconds":2.001414,"comes":"never"}],"n":6,"times":3},{"kind":"first",'
        '"parts":[{"kind":"first","parts":[{"kind":"receive","n":14,"seconds":40.002236},'
        '{"kind":"work","n":15,"seconds":0.202646,"limit_s":1.203317,"retries":2}],"n":13},'
        '{"kind":"work","n":16,"seconds":0.103606}],"n":12},{"kind":"work","seconds":0.804123,'
        '"is_equal":true}],"n":3},{"is_stored":true,"ends":[[10,0,true],[0,0,false]],"cancel":[14,9,'
        'true],"retries":1}]'
    ),
    "a plain time-out that passes while the thread of a cancelled call runs on": (
        '[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"first","parts":[{"kind":"work",'
        '"n":14,"seconds":0.102236},{"kind":"block","n":16,"seconds":0.803317}],"n":4}],"n":3,'
        '"limit_s":0.305568},{"kind":"work","n":22,"seconds":0.106083}],"n":2},{"is_stored":true,'
        '"ends":[[4,0,true]]}]'
    ),
    "a time limit of a call in which an answer waits for its turn": (
        '[{"kind":"gather","parts":[{"kind":"gather","parts":[{"kind":"tool","parts":[{"kind":"loop",'
        '"parts":[{"kind":"sleep","n":12,"seconds":6.001732}],"n":11,"times":2}],"n":9,'
        '"limit_s":0.152236},{"kind":"first","parts":[{"kind":"receive","n":15,"comes":"during"},'
        '{"kind":"sleep","n":16,"seconds":6.003317}],"n":14}],"n":7},{"kind":"work","n":26,'
        '"seconds":0.404359}],"n":3},{"is_stored":true,"ends":[[3,0,false]]}]'
    ),
    "two cancellations that are stored at the same time": (
        '[{"kind":"try","parts":[{"kind":"first","parts":[{"kind":"first","parts":[{"kind":"work",'
        '"n":5,"seconds":0.201414},{"kind":"ask","n":7}],"n":4},{"kind":"case",'
        '"parts":[{"kind":"ask","n":9},{"kind":"work","n":12,"seconds":0.101732},{"kind":"first",'
        '"parts":[{"kind":"fail","n":14,"seconds":0.102236,"limit_s":0.302646},{"kind":"tool",'
        '"parts":[{"kind":"seq","parts":[{"kind":"plain","n":17,"times":20},{"kind":"work","n":18,'
        '"seconds":0.403317}],"n":16}],"n":15}],"n":13}],"n":8}],"n":3},{"kind":"work","n":19,'
        '"seconds":0.103606}],"n":2},{"seed":200,"is_stored":true,"ends":[[9,4,true]]}]'
    ),
    "a call that starts and ends before a cancellation that was stored earlier is seen": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"loop","parts":[{"kind":"seq",'
        '"parts":[{"kind":"plain","n":7,"times":20},{"kind":"work","n":8,"seconds":0.201414}],'
        '"n":6}],"n":5,"times":3},{"kind":"group","parts":[{"kind":"flaky","n":13,"seconds":0.101732,'
        '"limit_s":1.202236},{"kind":"work","n":14,"seconds":0.202646}],"n":9}],"n":4},'
        '{"kind":"work","n":25,"seconds":0.105385}],"n":2},{"seed":796,"is_stored":true,"ends":[[0,0,'
        "true],[11,0,true]]}]"
    ),
    "time limits of calls and cancellations in slow plain code": (
        '[{"kind":"first","parts":[{"kind":"gather","parts":[{"kind":"flaky","n":6,'
        '"seconds":0.101414,"limit_s":1.201732,"retries":1},{"kind":"flaky","n":7,"seconds":0.802646,'
        '"limit_s":1.203317,"retries":1}],"n":4},{"kind":"tool","parts":[{"kind":"loop",'
        '"parts":[{"kind":"tool","parts":[{"kind":"agent","parts":[{"kind":"ask","n":15}],"n":14}],'
        '"n":13,"limit_s":0.603606}],"n":12,"times":2}],"n":11,"limit_s":0.154123},{"kind":"work",'
        '"n":17,"seconds":0.104359,"limit_s":0.154796,"retries":1}],"n":3},{"seed":352,'
        '"is_stored":true,"ends":[[8,8,true]]}]'
    ),
    "a plain time-out after one that passed in an execution that skipped time": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"timeout",'
        '"parts":[{"kind":"wait","parts":[{"kind":"ask","n":10},{"kind":"work","n":12,'
        '"seconds":0.401414}],"n":9,"limit_s":1.201732}],"n":5,"limit_s":0.153317},{"kind":"work",'
        '"n":18,"seconds":0.104359,"limit_s":0.604796,"retries":1}],"n":3,"limit_s":0.155385},'
        '{"kind":"work","n":19,"seconds":0.105568}],"n":2},{"kind":"work","n":21,'
        '"seconds":0.106403}],"n":1},{"seed":71,"is_stored":true,"ends":[[3,0,true],[10,0,true]]}]'
    ),
    "a time limit of a call that was late, with a thread": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"first",'
        '"parts":[{"kind":"block_and_fail","n":8,"seconds":0.401414},{"kind":"block_and_fail","n":9,'
        '"seconds":0.801732}],"n":7},{"kind":"block","n":12,"seconds":0.802236}],"n":5},'
        '{"kind":"gather","parts":[{"kind":"work","seconds":0.802646,"is_equal":true},{"kind":"work",'
        '"n":15,"seconds":0.103317}],"n":13},{"kind":"block","n":16,"seconds":0.203606},'
        '{"kind":"tool","parts":[{"kind":"loop","parts":[{"kind":"work","n":21,"seconds":0.204123}],'
        '"n":18,"times":3}],"n":17,"limit_s":0.304359}],"n":3},{"seed":305,"is_stored":true,'
        '"ends":[[4,6,true],[0,0,true],[7,3,false]]}]'
    ),
    "a time limit of a call whose own calls wait for their turn": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"receive","n":5,'
        '"seconds":2.001414},{"kind":"tool","parts":[{"kind":"loop","parts":[{"kind":"work","n":9,'
        '"seconds":0.101732,"limit_s":0.602236,"retries":1}],"n":8,"times":2}],"n":6,'
        '"limit_s":0.152646},{"kind":"receive","n":10,"seconds":40.003317,"comes":"never"}],"n":4},'
        '{"kind":"gather","parts":[{"kind":"loop","parts":[{"kind":"receive","n":14,'
        '"seconds":40.003606}],"n":13,"times":2},{"kind":"gather","parts":[{"kind":"work","n":16,'
        '"seconds":0.204123,"limit_s":1.204359,"retries":2},{"kind":"seq","parts":[{"kind":"plain",'
        '"n":18,"times":20},{"kind":"work","n":19,"seconds":0.404796}],"n":17}],"n":15}],"n":12}],'
        '"n":3},{"seed":994,"is_stored":true,"ends":[[10,11,true]]}]'
    ),
    "a group that fails in a call that is made while a time-out is handled": (
        '[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"work","n":9,"seconds":0.801732}],"n":8,'
        '"limit_s":0.152236},{"kind":"tool","parts":[{"kind":"group","parts":[{"kind":"work","n":16,'
        '"seconds":0.404123},{"kind":"timeout","parts":[{"kind":"work","n":19,"seconds":0.204796,"retries":2}],'
        '"n":17,"limit_s":0.155385}],"n":14}],"n":13}],"n":3},{"is_stored":true}]'
    ),
    "a time limit of a call that has to cancel one of its own calls again": (
        '[{"kind":"tool","parts":[{"kind":"group","parts":[{"kind":"work","n":5,"seconds":0.401414},'
        '{"kind":"group","parts":[{"kind":"work","n":8,"seconds":0.201732,"limit_s":0.602236,'
        '"retries":2},{"kind":"fail","n":9,"seconds":0.202646,"limit_s":0.303317,"retries":2},'
        '{"kind":"work","n":10,"seconds":0.403606},{"kind":"work","n":14,"seconds":0.204123}],'
        '"n":7}],"n":4}],"n":2,"limit_s":0.305568},{"seed":539,"is_stored":true,"ends":[[0,7,true],'
        "[0,10,true]]}]"
    ),
    "a thread that runs on is cancelled again by an execution that skips no time": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"first",'
        '"parts":[{"kind":"timeout","parts":[{"kind":"work","n":6,"seconds":0.101414}],"n":5,'
        '"limit_s":0.151732},{"kind":"block_and_fail","n":11,"seconds":0.103606}],"n":4}],"n":3,'
        '"limit_s":0.155385},{"kind":"work","n":18,"seconds":0.105568}],"n":2},{"kind":"work","n":19,'
        '"seconds":0.106083},{"kind":"work","n":20,"seconds":0.106403}],"n":1},{"is_stored":true,'
        '"ends":[[3,0,true],[11,0,true]]}]'
    ),
    "two calls that are cancelled at the same moment, of which only one is stored as cancelled": (
        '[{"kind":"first","parts":[{"kind":"gather","parts":[{"kind":"block","n":5,'
        '"seconds":0.801414}],"n":4},{"kind":"tool","parts":[{"kind":"gather",'
        '"parts":[{"kind":"work","n":11,"seconds":0.202236},{"kind":"fail","n":12,'
        '"seconds":0.102646}],"n":10}],"n":9,"limit_s":0.153317},{"kind":"block","n":13,'
        '"seconds":0.803606}],"n":3},{"seed":186,"is_stored":true,"ends":[[0,14,true]]}]'
    ),
    "a race that a thread loses by less than a millisecond": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"block","n":3,"seconds":0.401414},'
        '{"kind":"timeout","parts":[{"kind":"block_and_fail","n":5,"seconds":0.401732}],"n":4,'
        '"limit_s":0.302236}],"n":2},{"kind":"work","n":7,"seconds":0.103317}],"n":1},'
        '{"is_stored":true,"ends":[[4,0,false]]}]'
    ),
    "a time-out that passes after that of a call in it, whose process dies meanwhile": (
        '[{"kind":"tool","parts":[{"kind":"gather","parts":[{"kind":"seq","parts":[{"kind":"tool",'
        '"parts":[{"kind":"work","n":10,"seconds":0.101414}],"n":9},{"kind":"work","n":11,'
        '"seconds":0.401732}],"n":8},{"kind":"tool","parts":[{"kind":"seq","parts":[{"kind":"plain",'
        '"n":14,"times":20},{"kind":"work","n":15,"seconds":0.802236}],"n":13}],"n":12,'
        '"limit_s":0.302646}],"n":7}],"n":3,"limit_s":0.605568},{"seed":370,"is_stored":true,'
        '"ends":[[5,3,true]]}]'
    ),
    "a call of a cancelled tool, beside two sleeps": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"tool","parts":[{"kind":"fail",'
        '"n":11,"seconds":0.202646}],"n":9,"limit_s":0.603317},{"kind":"sleep","n":12,'
        '"seconds":0.203606}],"n":8},{"kind":"gather","parts":[{"kind":"work","n":19,'
        '"seconds":0.204123},{"kind":"sleep","n":24,"seconds":20.004796}],"n":13}],"n":3},'
        '{"seed":412,"is_stored":true,"ends":[[0,17,true]]}]'
    ),
    "a message whose sender dies": (
        '[{"kind":"gather","parts":[{"kind":"loop","parts":[{"kind":"work","n":4,'
        '"seconds":0.101414}],"n":3,"times":3},{"kind":"receive","n":5,"comes":"during"}],"n":2},'
        '{"is_stored":true,"ends":[[6,14,true]]}]'
    ),
    "the same, whose process dies again": (
        '[{"kind":"tool","parts":[{"kind":"try","parts":[{"kind":"gather","parts":[{"kind":"seq",'
        '"parts":[{"kind":"tool","parts":[{"kind":"work","n":10,"seconds":0.101414}],"n":9},'
        '{"kind":"work","n":11,"seconds":0.401732}],"n":8},{"kind":"tool","parts":[{"kind":"seq",'
        '"parts":[{"kind":"plain","n":14,"times":20},{"kind":"work","n":15,"seconds":0.802236}],'
        '"n":13}],"n":12,"limit_s":0.302646}],"n":7},{"kind":"fail","n":17,"seconds":0.803317,'
        '"limit_s":1.203606,"retries":1}],"n":6}],"n":3,"limit_s":0.605568},{"seed":370,'
        '"is_stored":true,"ends":[[5,3,true],[1,14,true]]}]'
    ),
    "two calls that end at the same moment, in nested races": (
        '[{"kind":"tool","parts":[{"kind":"first","parts":[{"kind":"gather","parts":[{"kind":"seq",'
        '"parts":[{"kind":"plain","n":7,"times":1},{"kind":"work","n":8,"seconds":0.201414}],"n":6},'
        '{"kind":"first","parts":[{"kind":"receive","n":10,"seconds":40.001732,"comes":"never"},'
        '{"kind":"work","n":11,"seconds":0.202236}],"n":9}],"n":5},{"kind":"first",'
        '"parts":[{"kind":"work","n":13,"seconds":0.402646},{"kind":"block","n":14,'
        '"seconds":0.203317}],"n":12}],"n":4}],"n":3},{"seed":533,"is_stored":true,"ends":[[12,20,'
        "true]]}]"
    ),
    "a group that fails while its call handles a time-out of its own": (
        '[{"kind":"try","parts":[{"kind":"agent","parts":[{"kind":"try","parts":[{"kind":"timeout",'
        '"parts":[{"kind":"work","n":9,"seconds":0.801732}],"n":8,"limit_s":0.152236},'
        '{"kind":"group","parts":[{"kind":"block","n":19,"seconds":0.104359},'
        '{"kind":"block_and_fail","n":20,"seconds":0.404796}],"n":18}],"n":6}],"n":3},{"kind":"work",'
        '"n":21,"seconds":0.105385}],"n":2},{"is_stored":true}]'
    ),
    "an answer that is awaited after a call has ended whose end was not delivered": (
        '[{"kind":"gather","parts":[{"kind":"completed","parts":[{"kind":"fail","n":8,'
        '"seconds":0.102646,"limit_s":0.153317,"is_once":true},{"kind":"ask","n":9}],"n":7},'
        '{"kind":"work","n":10,"seconds":0.103606}],"n":6},{"seed":315,"is_stored":true,"ends":[[0,'
        "14,false],[2,15,true]]}]"
    ),
    "a time-out that passes while a cancellation waits for what it would cause": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"timeout",'
        '"parts":[{"kind":"seq","parts":[{"kind":"plain","n":15,"seconds":0.502646,"is_random":true,'
        '"times":3},{"kind":"work","n":16,"seconds":0.103317}],"n":14}],"n":13,"limit_s":0.303606}],'
        '"n":4,"limit_s":0.304796},{"kind":"work","n":17,"seconds":0.105568}],"n":2},{"kind":"work",'
        '"n":19,"seconds":0.106403}],"n":1},{"seed":673,"is_stored":true,"ends":[[0,4,false],[3,4,'
        "true]]}]"
    ),
    "a message that times out just before a tool ends": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"tool","parts":[{"kind":"receive",'
        '"n":5,"seconds":2.001414,"comes":"never"}],"n":4,"limit_s":1.201732},{"kind":"receive",'
        '"n":6,"seconds":2.002236,"comes":"never"},{"kind":"receive","n":9,"seconds":2.003317,'
        '"comes":"never"}],"n":3},{"kind":"work","n":12,"seconds":0.104359}],"n":1},{"seed":718,'
        '"is_stored":true,"ends":[[1,1,true],[5,0,true]]}]'
    ),
    "calls in time that an execution had skipped": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"wait",'
        '"parts":[{"kind":"loop","parts":[{"kind":"loop","parts":[{"kind":"work","n":9,'
        '"seconds":0.101414}],"n":8,"times":3}],"n":7,"times":3},{"kind":"fail","n":10,'
        '"seconds":0.801732,"limit_s":0.602236}],"n":6,"limit_s":0.302646}],"n":5,'
        '"limit_s":1.203317},{"kind":"work","n":20,"seconds":0.105568}],"n":2},{"kind":"work","n":21,'
        '"seconds":0.106083}],"n":1},{"is_stored":true,"ends":[[3,3,true],[10,4,true]]}]'
    ),
    "answers between calls that are in time": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"ask","n":6},{"kind":"timeout",'
        '"parts":[{"kind":"loop","parts":[{"kind":"work","n":14,"seconds":0.102646}],"n":13,'
        '"times":3}],"n":12,"limit_s":0.303317}],"n":4},{"kind":"ask","n":21},{"kind":"ask","n":23}],'
        '"n":3},{"is_stored":true,"ends":[[2,0,false]]}]'
    ),
    "two time-outs that plain code delays": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"group",'
        '"parts":[{"kind":"timeout","parts":[{"kind":"seq","parts":[{"kind":"plain","n":8,'
        '"seconds":0.501414,"times":3},{"kind":"work","n":9,"seconds":0.201732}],"n":7}],"n":6,'
        '"limit_s":0.302236},{"kind":"seq","parts":[{"kind":"plain","n":11,"seconds":0.502646,'
        '"is_random":true,"times":1},{"kind":"work","n":12,"seconds":0.203317}],"n":10}],"n":5}],'
        '"n":4,"limit_s":0.604359},{"kind":"work","n":17,"seconds":0.104796}],"n":2},{"kind":"work",'
        '"n":19,"seconds":0.105568}],"n":1},{"seed":712,"is_stored":true,"ends":[[0,4,true],[0,17,'
        "false]]}]"
    ),
    "a tool that is cancelled just before its own time-out": (
        '[{"kind":"group","parts":[{"kind":"fail","n":6,"seconds":0.201414,"limit_s":0.601732,'
        '"retries":2},{"kind":"work","n":9,"seconds":0.403317},{"kind":"group",'
        '"parts":[{"kind":"tool","parts":[{"kind":"seq","parts":[{"kind":"plain","n":13,"times":20},'
        '{"kind":"work","n":14,"seconds":0.403606}],"n":12}],"n":11,"limit_s":0.604123},'
        '{"kind":"fail","n":15,"seconds":0.104359}],"n":10}],"n":3},{"seed":555,"is_stored":true,'
        '"ends":[[6,4,true],[5,2,true]]}]'
    ),
    "two answers at once, one of them in a tool": (
        '[{"kind":"seq","parts":[{"kind":"completed","parts":[{"kind":"tool","parts":[{"kind":"ask",'
        '"n":6}],"n":5,"limit_s":0.601414},{"kind":"wait","parts":[{"kind":"ask","n":9}],"n":7,'
        '"limit_s":0.602236}],"n":3},{"kind":"work","n":12,"seconds":0.103606}],"n":1},'
        '{"is_stored":true,"ends":[[1,20,true],[1,19,true]]}]'
    ),
    "a task that has not seen the cancellation of its run starts a call": (
        '[{"kind":"group","parts":[{"kind":"group","parts":[{"kind":"fail","n":6,"seconds":0.201414,'
        '"limit_s":0.151732,"retries":2}],"n":5},{"kind":"group","parts":[{"kind":"group",'
        '"parts":[{"kind":"group","parts":[{"kind":"work","seconds":0.103606,"is_equal":true}],'
        '"n":14}],"n":9},{"kind":"work","seconds":0.204796,"is_equal":true}],"n":8}],"n":4},'
        '{"is_stored":true,"ends":[[4,0,true]],"cancel":[0,2,true]}]'
    ),
    "an answer to a question that comes after another answer": (
        '[{"kind":"gather","parts":[{"kind":"loop","parts":[{"kind":"ask","n":6}],"n":5,"times":3},'
        '{"kind":"tool","parts":[{"kind":"work","n":13,"seconds":0.101732}],"n":8,'
        '"limit_s":0.302236},{"kind":"loop","parts":[{"kind":"ask","n":15}],"n":14,"times":3}],'
        '"n":4},{"is_stored":true,"ends":[[1,10,false],[12,0,true]]}]'
    ),
    "two cancellations of threads that are seen one after the other": (
        '[{"kind":"try","parts":[{"kind":"first","parts":[{"kind":"first",'
        '"parts":[{"kind":"block_and_fail","n":5,"seconds":0.101414},{"kind":"block_and_fail","n":6,'
        '"seconds":0.401732},{"kind":"work","n":7,"seconds":0.202236,"retries":2}],"n":4},'
        '{"kind":"first","parts":[{"kind":"flaky","n":9,"seconds":0.102646,"limit_s":1.203317},'
        '{"kind":"agent","parts":[{"kind":"block_and_fail","n":11,"seconds":0.203606}],"n":10},'
        '{"kind":"work","n":13,"seconds":0.204123}],"n":8}],"n":3},{"kind":"work","n":14,'
        '"seconds":0.104359}],"n":2},{"seed":900,"is_stored":true,"ends":[[9,4,true]]}]'
    ),
    "a plain time-out that passes first after time was skipped": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"seq",'
        '"parts":[{"kind":"sleep","n":17,"seconds":0.203606},{"kind":"timeout",'
        '"parts":[{"kind":"flaky","n":20,"seconds":0.805385,"limit_s":0.605568,"retries":2}],"n":18,'
        '"limit_s":0.156083}],"n":12},{"kind":"fail","n":22,"seconds":0.806403}],"n":3,'
        '"limit_s":0.306856},{"kind":"work","n":24,"seconds":0.10728}],"n":2},{"kind":"work","n":26,'
        '"seconds":0.10781}],"n":1},{"is_stored":true,"ends":[[1,1,false],[10,0,true]]}]'
    ),
    "time-outs that passed in another order in the execution before": (
        '[{"kind":"group","parts":[{"kind":"block_and_fail","n":5,"seconds":0.801732},{"kind":"wait",'
        '"parts":[{"kind":"loop","parts":[{"kind":"timeout","parts":[{"kind":"work","n":10,'
        '"seconds":0.102236}],"n":9,"limit_s":0.152646}],"n":8,"times":2}],"n":6,'
        '"limit_s":0.155385}],"n":3},{"is_stored":true,"ends":[[3,4,true],[2,12,true]]}]'
    ),
    "a cancellation that is stored before the answer that is its cause": (
        '[{"kind":"first","parts":[{"kind":"receive","n":4,"seconds":0.0},{"kind":"gather","parts'
        '":[{"kind":"receive","n":7,"seconds":40.001414,"comes":"never"},{"kind":"sleep","n":8,"s'
        'econds":6.001732}],"n":5,"seconds":0.0}],"n":3,"seconds":0.0},{"seed":301,"is_stored":tr'
        'ue,"ends":[[1,4,true]]}]'
    ),
    "a time-out that passes while a cancellation waits for a call that starts later than before": (
        '[{"kind":"seq","parts":[{"kind":"gather","parts":[{"kind":"seq","parts":[{"kind":"plain","parts"'
        ':[],"n":8,"seconds":0.501732,"is_random":true,"times":3},{"kind":"work","parts":[],"n":9,"second'
        's":0.802236}],"n":7},{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"try","parts":[{"'
        'kind":"timeout","parts":[{"kind":"fail","parts":[],"n":17,"seconds":0.803606}],"n":16,"limit_s":'
        '0.304123},{"kind":"work","parts":[],"n":23,"seconds":0.100468}],"n":15}],"n":14,"limit_s":0.4053'
        '85},{"kind":"work","parts":[],"n":24,"seconds":0.105568}],"n":13}],"n":3},{"kind":"work","parts"'
        ':[],"n":25,"seconds":0.106403}],"n":1},{"seed":1,"is_stored":true,"ends":[[7,0,true]]}]'
    ),
    "a time-out that passes while a cancellation waits for a call that does not start again": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"seq","parts":[{"'
        'kind":"plain","n":8,"seconds":0.501732,"is_random":true,"times":3},{"kind":"work","n":9,"seconds'
        '":0.802236}],"n":7,"seconds":0.0},{"kind":"timeout","parts":[{"kind":"fail","n":17,"seconds":0.8'
        '03606}],"n":16,"seconds":0.0,"limit_s":0.304123}],"n":3,"seconds":0.0,"limit_s":0.305385},{"kind'
        '":"work","n":23,"seconds":0.105568}],"n":2,"seconds":0.0},{"kind":"work","n":25,"seconds":0.1064'
        '03}],"n":1,"seconds":0.0},{"seed":344,"is_stored":true,"ends":[[7,0,true],[2,4,false]]}]'
    ),
    "a time-out that passes just after another one, while a thread runs on": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"first","parts'
        '":[{"kind":"seq","parts":[{"kind":"plain","n":6,"seconds":0.051414,"times":20},{"kind":"work","n'
        '":7,"seconds":0.101732}],"n":5,"seconds":0.0},{"kind":"work","n":8,"seconds":0.802236},{"kind":"'
        'block","n":9,"seconds":0.202646}],"n":4,"seconds":0.0}],"n":3,"seconds":0.0,"limit_s":0.153317},'
        '{"kind":"work","n":10,"seconds":0.103606}],"n":2,"seconds":0.0},{"kind":"work","n":11,"seconds":'
        '0.104123},{"kind":"work","n":12,"seconds":0.104359}],"n":1,"seconds":0.0},{"is_stored":true,"end'
        's":[[8,14,true],[10,9,true]]}]'
    ),
    "a deadline that passes while plain code takes longer than calls are waited for": (
        '[{"kind":"try","parts":[{"kind":"deadline","parts":[{"kind":"seq","parts":[{"kind":"plain","n":1'
        '9,"seconds":9.005385,"times":3},{"kind":"work","n":20,"seconds":0.405568}],"n":18,"seconds":0.0}'
        '],"n":11,"seconds":0.0,"limit_s":10.00728},{"kind":"work","n":27,"seconds":0.107681}],"n":2,"sec'
        'onds":0.0},{"is_stored":true,"ends":[[1,3,true]]}]'
    ),
    "a deadline that had passed while plain code took longer than calls are waited for": (
        '[{"kind":"try","parts":[{"kind":"deadline","parts":[{"kind":"seq","parts":[{"kind":"plain","n":2'
        '3,"seconds":9.006083,"is_random":true,"times":20},{"kind":"work","n":24,"seconds":0.806403}],"n"'
        ':22,"seconds":0.0}],"n":21,"seconds":0.0,"limit_s":10.006557},{"kind":"work","n":29,"seconds":0.'
        '108185}],"n":2,"seconds":0.0},{"is_stored":true,"ends":[[1,3,true],[1,0,true]]}]'
    ),
    "a cancellation that waits for another one once its turn has come": (
        '[{"kind":"first","parts":[{"kind":"seq","parts":[{"kind":"plain","n":5,"seconds":0.501414,"is_ra'
        'ndom":true,"times":1},{"kind":"work","n":6,"seconds":0.101732}],"n":4,"seconds":0.0},{"kind":"fi'
        'rst","parts":[{"kind":"deadline","parts":[{"kind":"fail","n":9,"seconds":0.402236}],"n":8,"secon'
        'ds":0.0,"limit_s":10.002646},{"kind":"first","parts":[{"kind":"fail","n":12,"seconds":0.403606},'
        '{"kind":"seq","parts":[{"kind":"plain","n":15,"seconds":0.504123,"is_random":true,"times":1},{"k'
        'ind":"work","n":16,"seconds":0.104359}],"n":14,"seconds":0.0}],"n":11,"seconds":0.0}],"n":7,"sec'
        'onds":0.0},{"kind":"block_and_fail","n":21,"seconds":0.806083}],"n":3,"seconds":0.0},{"is_stored'
        '":true,"ends":[[7,8,true]]}]'
    ),
    "a time-out that passes while the thread of a deadline runs on": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"deadline","parts'
        '":[{"kind":"block","n":13,"seconds":0.403606}],"n":7,"seconds":0.0,"limit_s":1.204123}],"n":4,"s'
        'econds":0.0,"limit_s":0.304796},{"kind":"work","n":18,"seconds":0.205568}],"n":3,"seconds":0.0},'
        '{"kind":"work","n":27,"seconds":0.108426}],"n":1,"seconds":0.0},{"is_stored":true,"ends":[[0,4,t'
        "rue],[2,3,true]]}]"
    ),
    "a time-out that passed while another one was held up, in the execution before": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"wait","parts":[{'
        '"kind":"work","n":7,"seconds":0.201414},{"kind":"seq","parts":[{"kind":"plain","n":12,"seconds":'
        '0.502646,"is_random":true,"times":3},{"kind":"work","n":13,"seconds":0.403317}],"n":11,"seconds"'
        ':0.0},{"kind":"timeout","parts":[{"kind":"timeout","parts":[{"kind":"timeout","parts":[{"kind":"'
        'work","n":17,"seconds":0.403606}],"n":16,"seconds":0.0,"limit_s":0.154123}],"n":15,"seconds":0.0'
        ',"limit_s":0.154359}],"n":14,"seconds":0.0,"limit_s":1.204796},{"kind":"fail","n":18,"seconds":0'
        '.805385}],"n":5,"seconds":0.0,"limit_s":0.305568},{"kind":"fail","n":19,"seconds":0.806403}],"n"'
        ':3,"seconds":0.0,"limit_s":0.306557},{"kind":"work","n":20,"seconds":0.106856}],"n":2,"seconds":'
        '0.0},{"kind":"work","n":22,"seconds":0.107681}],"n":1,"seconds":0.0},{"seed":397,"is_stored":tru'
        'e,"ends":[[14,6,true],[0,6,true],[8,3,true]]}]'
    ),
    "a task that a call has left running makes another call after its end": (
        '[{"kind":"first","parts":[{"kind":"ask","n":4},{"kind":"agent","parts":[{"kind":"gather","parts"'
        ':[{"kind":"loop","parts":[{"kind":"ask","n":8}],"n":7,"times":3},{"kind":"model","parts":[{"kind'
        '":"model","parts":[{"kind":"work","n":13,"seconds":0.101414}],"n":10}],"n":9},{"kind":"tool","pa'
        'rts":[{"kind":"work","n":16,"seconds":0.401732,"limit_s":0.602236,"retries":2}],"n":15,"limit_s"'
        ':0.152646}],"n":6}],"n":5},{"kind":"work","n":20,"seconds":0.203606}],"n":3},{"is_stored":true,"'
        'ends":[[7,0,true],[9,0,true]]}]'
    ),
    "a thread that had run on after its race has less time left in a later execution": (
        '[{"kind":"loop","parts":[{"kind":"timeout","parts":[{"kind":"first","parts":[{"kind":"work","n":'
        '5,"seconds":0.101414},{"kind":"block","n":6,"seconds":0.101732}],"n":4}],"n":3,"limit_s":0.15223'
        '6}],"n":2,"times":3},{"is_stored":true,"ends":[[4,7,true],[8,0,true]]}]'
    ),
    "an answer whose place is stored with a call that a retry executes again": (
        '[{"kind":"seq","parts":[{"kind":"ask","n":3},{"kind":"completed","parts":[{"kind":"agent","parts'
        '":[{"kind":"mended","n":7,"seconds":0.401414}],"n":5},{"kind":"work","n":8,"seconds":0.401732}],'
        '"n":4},{"kind":"ask","n":11}],"n":2},{"seed":4,"is_stored":true,"retries":1}]'
    ),
    "a call that only a later try has ended has not started where an earlier one had started it": (
        '[{"kind":"gather","parts":[{"kind":"mended","n":3,"seconds":0.201414},{"kind":"try","parts":[{"k'
        'ind":"gather","parts":[{"kind":"work","n":6,"seconds":0.201732},{"kind":"work","n":8,"seconds":0'
        '.802236},{"kind":"flaky","n":9,"seconds":0.202646,"limit_s":1.203317}],"n":5},{"kind":"block_and'
        '_fail","n":13,"seconds":0.803606}],"n":4}],"n":2},{"seed":197,"is_stored":true,"retries":2}]'
    ),
    "an end that an execution has delivered sooner than an earlier one takes no longer when a time-out passes again": (
        '[{"kind":"gather","parts":[{"kind":"block","n":4,"seconds":0.801414},{"kind":"agent","parts":[{"'
        'kind":"gather","parts":[{"kind":"wait","parts":[{"kind":"ask","n":10},{"kind":"work","n":11,"sec'
        'onds":0.401732},{"kind":"ask","n":12},{"kind":"work","n":13,"seconds":0.102236}],"n":9,"limit_s"'
        ':0.152646},{"kind":"mended","n":14,"seconds":0.803317}],"n":8}],"n":6}],"n":3},{"is_stored":true'
        ',"ends":[[9,4,true],[2,2,true],[6,0,true]],"retries":1}]'
    ),
    "a call that failed before one that is dropped is kept, as the program had gone on": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"gather","parts":[{"kind":"tool","parts":'
        '[{"kind":"timeout","parts":[{"kind":"mended","n":6,"seconds":0.101414}],"n":5,"limit_s":0.601732'
        '}],"n":4,"limit_s":0.302236},{"kind":"block","n":10,"seconds":0.802646},{"kind":"mended","n":11,'
        '"seconds":0.203606}],"n":3},{"kind":"work","n":12,"seconds":0.104123}],"n":2},{"kind":"work","n"'
        ':13,"seconds":0.104359},{"kind":"mended","n":14,"seconds":0.104796}],"n":1},{"seed":371,"is_stor'
        'ed":true,"ends":[[4,2,true],[8,4,true]],"cancel":[13,14,true],"retries":2}]'
    ),
    "what was done in a call is kept by a retry that does not cancel it again": (
        '[{"kind":"group","parts":[{"kind":"mended","n":4,"seconds":0.101414},{"kind":"tool","parts":[{"k'
        'ind":"completed","parts":[{"kind":"block_and_fail","n":7,"seconds":0.401732},{"kind":"agent","pa'
        'rts":[{"kind":"ask","n":13}],"n":12},{"kind":"completed","parts":[{"kind":"try","parts":[{"kind"'
        ':"block","n":18,"seconds":0.203606,"limit_s":0.304123,"is_once":true},{"kind":"work","n":19,"sec'
        'onds":0.104359,"limit_s":0.604796,"is_once":true}],"n":16}],"n":15}],"n":6}],"n":5}],"n":2},{"se'
        'ed":134,"is_stored":true,"ends":[[4,1,true]],"retries":1}]'
    ),
    "a call that is cancelled as it begins is not held up by what waits for a start": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"completed","parts":[{"kind":"timeout",'
        '"parts":[{"kind":"block","n":11,"seconds":0.102646}],"n":9,"limit_s":0.153317}],"n":4},{"kind":"'
        'gather","parts":[{"kind":"seq","parts":[{"kind":"plain","n":14,"times":3},{"kind":"work","n":15,'
        '"seconds":0.403606}],"n":13}],"n":12},{"kind":"ask","n":20}],"n":3},{"kind":"work","n":23,"secon'
        'ds":0.106083}],"n":1},{"is_stored":true,"ends":[[1,6,false],[6,0,true]]}]'
    ),
    "a call that begins in a task that is to be cancelled": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"try","parts":[{"kind":"group","parts":'
        '[{"kind":"fail","n":7,"seconds":0.801732,"limit_s":0.602236,"retries":2},{"kind":"fail","n":8,"s'
        'econds":0.402646}],"n":6},{"kind":"fail","n":11,"seconds":0.803317}],"n":5},{"kind":"fail","n":1'
        '7,"seconds":0.404796}],"n":3},{"kind":"work","n":18,"seconds":0.105385}],"n":2},{"seed":943,"is_'
        'stored":true,"ends":[[5,11,true]]}]'
    ),
    "a call that had failed is cancelled in another order, and then not again": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"deadline","parts":[{"kind":"deadline","p'
        'arts":[{"kind":"first","parts":[{"kind":"gather","parts":[{"kind":"sleep","n":8,"seconds":6.0017'
        '32}],"n":6},{"kind":"gather","parts":[{"kind":"sleep","n":10,"seconds":0.202236},{"kind":"work",'
        '"n":11,"seconds":0.102646},{"kind":"deadline","parts":[{"kind":"block_and_fail","n":13,"seconds"'
        ':0.103317}],"n":12,"limit_s":0.603606}],"n":9},{"kind":"deadline","parts":[{"kind":"fail","n":19'
        ',"seconds":0.404123,"limit_s":0.154359,"retries":2}],"n":15,"limit_s":0.605568}],"n":5}],"n":4,"'
        'limit_s":0.606403}],"n":3,"limit_s":10.006557},{"kind":"work","n":26,"seconds":0.106856}],"n":2}'
        ',{"kind":"work","n":28,"seconds":0.107681}],"n":1},{"seed":889,"is_stored":true,"ends":[[6,9,tru'
        "e],[8,9,true],[4,6,false]]}]"
    ),
    "time waited in vain to be cancelled again is not waited for again, and does not double": (
        '[{"kind":"loop","parts":[{"kind":"loop","parts":[{"kind":"loop","parts":[{"kind":"gather","parts'
        '":[{"kind":"gather","parts":[{"kind":"sleep","n":9,"seconds":6.001732}],"n":6},{"kind":"first","'
        'parts":[{"kind":"work","n":15,"seconds":0.803317},{"kind":"sleep","n":16,"seconds":6.003606}],"n'
        '":14}],"n":5}],"n":4,"times":2}],"n":3,"times":2}],"n":2,"times":3},{"seed":155,"is_stored":true'
        "}]"
    ),
    "an answer that is delivered first does not wait for starts that come after it": (
        '[{"kind":"gather","parts":[{"kind":"gather","parts":[{"kind":"gather","parts":[{"kind":"sleep","'
        'n":6,"seconds":6.001414},{"kind":"ask","n":8}],"n":5},{"kind":"ask","n":9}],"n":4},{"kind":"try"'
        ',"parts":[{"kind":"deadline","parts":[{"kind":"sleep","n":12,"seconds":0.701732}],"n":11,"limit_'
        's":1.202236},{"kind":"deadline","parts":[{"kind":"deadline","parts":[{"kind":"sleep","n":16,"sec'
        'onds":6.002646}],"n":14,"limit_s":10.004123}],"n":13,"limit_s":10.004359}],"n":10}],"n":3},{"is_'
        'stored":true,"ends":[[0,4,true]]}]'
    ),
    "a thread whose task was cancelled ends late, also if its engine stops at the same moment": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"agent","parts":[{"kind":"agent","parts'
        '":[{"kind":"group","parts":[{"kind":"agent","parts":[{"kind":"fail","seconds":0.401414,"is_equal'
        '":true}],"n":7},{"kind":"loop","parts":[{"kind":"tool","parts":[{"kind":"fail","n":11,"seconds":'
        '0.201732}],"n":10,"limit_s":0.302236}],"n":9,"times":3},{"kind":"work","n":12,"seconds":0.202646'
        '}],"n":6}],"n":5}],"n":4},{"kind":"seq","parts":[{"kind":"block","n":14,"seconds":0.103317},{"ki'
        'nd":"work","n":15,"seconds":0.203606}],"n":13}],"n":3},{"kind":"work","n":22,"seconds":0.105385}'
        '],"n":2},{"seed":477,"is_stored":true,"ends":[[0,8,true],[10,17,false]]}]'
    ),
    "a sleep that ends after a crash comes after the answers of those that had ended before": (
        '[{"kind":"gather","parts":[{"kind":"loop","parts":[{"kind":"sleep","n":12,"seconds":6.002236}],"n"'
        ':11,"seconds":0.0,"times":3},{"kind":"loop","parts":[{"kind":"sleep","n":14,"seconds":20.002646}],'
        '"n":13,"seconds":0.0,"times":3},{"kind":"block","n":17,"seconds":0.103606}],"n":6,"seconds":0.0},{'
        '"is_stored":true,"ends":[[8,0,true],[0,0,true]]}]'
    ),
    "a limit of a call does not pass while a cancellation in it is late again": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"tool","parts":[{"kind":"work","n":6,"sec'
        'onds":0.201414}],"n":5,"seconds":0.0,"limit_s":0.301732},{"kind":"block_and_fail","n":7,"seconds":'
        '0.102236}],"n":4,"seconds":0.0},{"kind":"work","n":10,"seconds":0.104123}],"n":2,"seconds":0.0},{"'
        'seed":332,"is_stored":true,"ends":[[3,6,false],[2,2,true]]}]'
    ),
    "a limit of a call does not pass while a cancellation in a group in it is late again": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"group","parts":[{"kind":"ask","n":5,"sec'
        'onds":0.0},{"kind":"tool","parts":[{"kind":"group","parts":[{"kind":"ask","n":10,"seconds":0.0},{"'
        'kind":"seq","parts":[{"kind":"plain","n":12,"seconds":0.0,"times":3},{"kind":"work","n":13,"second'
        's":0.801414}],"n":11,"seconds":0.0}],"n":9,"seconds":0.0}],"n":6,"seconds":0.0,"limit_s":0.601732}'
        '],"n":4,"seconds":0.0},{"kind":"fail","n":14,"seconds":0.102236,"limit_s":0.602646,"is_once":true}'
        ',{"kind":"gather","parts":[{"kind":"group","parts":[{"kind":"work","n":18,"seconds":0.203317},{"ki'
        'nd":"fail","n":19,"seconds":0.103606}],"n":16,"seconds":0.0},{"kind":"work","n":20,"seconds":0.404'
        '123,"limit_s":0.304359},{"kind":"work","n":24,"seconds":0.204796}],"n":15,"seconds":0.0}],"n":3,"s'
        'econds":0.0},{"kind":"work","n":25,"seconds":0.105385}],"n":2,"seconds":0.0},{"seed":434,"is_store'
        'd":true,"ends":[[9,4,false],[9,4,true]]}]'
    ),
    "a plain time-out that had passed while a call of another task went on does not pass again": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"completed","par'
        'ts":[{"kind":"work","n":6,"seconds":0.801414}],"n":4,"seconds":0.0}],"n":3,"seconds":0.0,"limit_s"'
        ':0.604359},{"kind":"seq","parts":[{"kind":"plain","n":15,"seconds":0.504796,"is_random":true,"time'
        's":1},{"kind":"work","n":16,"seconds":0.205385}],"n":14,"seconds":0.0}],"n":2,"seconds":0.0},{"kin'
        'd":"work","n":21,"seconds":0.106856}],"n":1,"seconds":0.0},{"is_stored":true,"ends":[[2,13,true]]}'
        "]"
    ),
    "a cancelled function in a thread that another process had executed, and whose end it did not store": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"first","parts":[{"kind":"block","n'
        '":8,"seconds":0.401732},{"kind":"first","parts":[{"kind":"receive","n":11,"seconds":40.00264'
        '6,"comes":"during"},{"kind":"receive","n":12,"seconds":2.003317,"comes":"never"}],"n":10}],"'
        'n":4},{"kind":"seq","parts":[{"kind":"plain","n":21,"seconds":0.055385,"times":1},{"kind":"w'
        'ork","n":22,"seconds":0.105568}],"n":20}],"n":3},{"kind":"work","n":25,"seconds":0.106557}],'
        '"n":1},{"seed":569,"is_stored":true,"ends":[[0,0,true],[4,8,true]]}]'
    ),
    "a call that is cancelled after the late result of one that is not cancelled again": (
        '[{"kind":"group","parts":[{"kind":"group","parts":[{"kind":"loop","parts":[{"kind":"gather",'
        '"parts":[{"kind":"ask","n":6},{"kind":"seq","parts":[{"kind":"plain","n":8,"times":1},{"kind'
        '":"work","n":9,"seconds":0.801414}],"n":7}],"n":5}],"n":4,"times":3},{"kind":"work","n":10,"'
        'seconds":0.201732,"limit_s":0.302236,"is_once":true}],"n":3},{"kind":"first","parts":[{"kind'
        '":"work","n":12,"seconds":0.402646},{"kind":"work","n":13,"seconds":0.803317},{"kind":"block'
        '_and_fail","n":14,"seconds":0.803606},{"kind":"block_and_fail","n":16,"seconds":0.204123}],"'
        'n":11}],"n":2},{"seed":379,"is_stored":true,"ends":[[7,0,false]],"retries":1}]'
    ),
    "an answer that is noted as the next one, beside a cancelled call that starts have overtaken": (
        '[{"kind":"gather","parts":[{"kind":"first","parts":[{"kind":"seq","parts":[{"kind":"plain","'
        'n":7,"seconds":0.0,"times":1},{"kind":"work","n":8,"seconds":0.801414}],"n":6,"seconds":0.0}'
        ',{"kind":"fail","n":9,"seconds":0.101732,"limit_s":0.302236,"is_once":true}],"n":5,"seconds"'
        ':0.0},{"kind":"fail","n":11,"seconds":0.802646},{"kind":"loop","parts":[{"kind":"work","n":1'
        '4,"seconds":0.103317,"limit_s":0.303606,"is_once":true}],"n":13,"seconds":0.0,"times":2},{"k'
        'ind":"ask","n":16,"seconds":0.0}],"n":4,"seconds":0.0},{"seed":717,"is_stored":true,"ends":['
        "[8,1,true],[7,2,true]]}]"
    ),
    "a cancelled call that raises what its tasks have raised": (
        '[{"kind":"group","parts":[{"kind":"fail","n":5,"seconds":0.401414,"limit_s":1.201732,"is_onc'
        'e":true},{"kind":"agent","parts":[{"kind":"gather","parts":[{"kind":"group","parts":[{"kind"'
        ':"fail","n":10,"seconds":0.102646},{"kind":"work","n":11,"seconds":0.103317,"limit_s":1.2036'
        '06,"is_once":true}],"n":9,"seconds":0.0}],"n":8,"seconds":0.0}],"n":7,"seconds":0.0},{"kind"'
        ':"gather","parts":[{"kind":"block","n":17,"seconds":0.104359},{"kind":"seq","parts":[{"kind"'
        ':"plain","n":19,"seconds":0.0,"times":3},{"kind":"work","n":20,"seconds":0.204796}],"n":18,"'
        'seconds":0.0}],"n":14,"seconds":0.0}],"n":3,"seconds":0.0},{"is_stored":true,"ends":[[1,7,tr'
        "ue],[11,2,false]]}]"
    ),
    "a message for a call that was cancelled in the instant in which the message was numbered": (
        '[{"kind":"first","parts":[{"kind":"deadline","parts":[{"kind":"ask","n":5,"seconds":0.0}],'
        '"n":4,"seconds":0.0,"limit_s":30.001414},{"kind":"deadline","parts":[{"kind":"deadline","p'
        'arts":[{"kind":"gather","parts":[{"kind":"deadline","parts":[{"kind":"work","seconds":0.40'
        '2236,"is_equal":true}],"n":10,"seconds":0.0,"limit_s":30.003317},{"kind":"first","parts":['
        '{"kind":"work","n":15,"seconds":0.103606},{"kind":"receive","n":16,"seconds":40.004123}],"'
        'n":14,"seconds":0.0}],"n":8,"seconds":0.0}],"n":7,"seconds":0.0,"limit_s":30.006083}],"n":'
        '6,"seconds":0.0,"limit_s":30.006403}],"n":3,"seconds":0.0},{"seed":260,"is_stored":true,"e'
        'nds":[[1,11,true],[6,0,true]]}]'
    ),
    "a cancelled thread that had begun before what is missing": (
        '[{"kind":"seq","parts":[{"kind":"first","parts":[{"kind":"first","parts":[{"kind":"block",'
        '"n":6,"seconds":0.801414},{"kind":"work","n":7,"seconds":0.101732}],"n":4,"seconds":0.0},{'
        '"kind":"loop","parts":[{"kind":"seq","parts":[{"kind":"plain","n":12,"seconds":0.0,"times"'
        ':20},{"kind":"work","n":13,"seconds":0.202646}],"n":11,"seconds":0.0}],"n":10,"seconds":0.'
        '0,"times":3}],"n":3,"seconds":0.0},{"kind":"work","n":16,"seconds":0.104359},{"kind":"work'
        '","n":17,"seconds":0.104796}],"n":1,"seconds":0.0},{"seed":9,"is_stored":true,"ends":[[0,0'
        ",true],[10,0,true],[2,4,true]]}]"
    ),
    "a call after a time-out that has cancelled nothing, and another one before it": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"complet'
        'ed","parts":[{"kind":"block","n":15,"seconds":0.804123}],"n":11,"seconds":0.0}],"n":3,"sec'
        'onds":0.0,"limit_s":0.604359},{"kind":"seq","parts":[{"kind":"plain","n":17,"seconds":0.50'
        '4796,"times":1},{"kind":"work","n":18,"seconds":0.805385}],"n":16,"seconds":0.0}],"n":2,"s'
        'econds":0.0},{"kind":"work","n":19,"seconds":0.105568},{"kind":"work","n":20,"seconds":0.1'
        '06083}],"n":1,"seconds":0.0},{"is_stored":true,"ends":[[7,0,true]]}]'
    ),
    "a time-out that passes while a thread runs, and a late result as the engine stops": (
        '[{"kind":"gather","parts":[{"kind":"timeout","parts":[{"kind":"first","parts":[{"kind":"bl'
        'ock","n":7,"seconds":0.401414},{"kind":"block_and_fail","n":8,"seconds":0.101732}],"n":6,"'
        'seconds":0.0}],"n":5,"seconds":0.0,"limit_s":0.302236},{"kind":"block","n":10,"seconds":0.'
        '402646}],"n":3,"seconds":0.0},{"is_stored":true,"ends":[[5,4,false]]}]'
    ),
    "a cancelled tool that waits for its thread, and a time-out that passes meanwhile": (
        '[{"kind":"seq","parts":[{"kind":"try","parts":[{"kind":"timeout","parts":[{"kind":"first",'
        '"parts":[{"kind":"tool","parts":[{"kind":"deadline","parts":[{"kind":"block_and_fail","n":'
        '7,"seconds":0.201414}],"n":6,"seconds":0.0,"limit_s":1.201732}],"n":5,"seconds":0.0},{"kin'
        'd":"work","n":9,"seconds":0.102236}],"n":4,"seconds":0.0}],"n":3,"seconds":0.0,"limit_s":0'
        '.153606},{"kind":"work","n":11,"seconds":0.104123}],"n":2,"seconds":0.0},{"kind":"work","n'
        '":13,"seconds":0.104796}],"n":1,"seconds":0.0},{"is_stored":true,"ends":[[2,1,true],[7,0,t'
        "rue]]}]"
    ),
    "another time-out passes first, since time is skipped, and does not cancel a call": (
        '[{"kind":"try","parts":[{"kind":"wait","parts":[{"kind":"seq","parts":[{"kind":"work","sec'
        'onds":0.101414,"is_equal":true},{"kind":"gather","parts":[{"kind":"work","n":11,"seconds":'
        '0.203317},{"kind":"timeout","parts":[{"kind":"seq","parts":[{"kind":"plain","n":15,"second'
        's":3.003606,"is_random":true,"times":20},{"kind":"work","n":16,"seconds":0.204123}],"n":14'
        ',"seconds":0.0}],"n":12,"seconds":0.0,"limit_s":0.154796}],"n":10,"seconds":0.0}],"n":5,"s'
        'econds":0.0},{"kind":"work","n":18,"seconds":0.105568}],"n":3,"seconds":0.0,"limit_s":0.15'
        '6403},{"kind":"work","n":19,"seconds":0.106557}],"n":2,"seconds":0.0},{"is_stored":true,"e'
        'nds":[[5,5,true]]}]'
    ),
    "a time-out passes while a group that has failed waits for its tasks": (
        '[{"kind":"timeout","parts":[{"kind":"group","parts":[{"kind":"fail","seconds":0.803317,"is'
        '_equal":true},{"kind":"group","parts":[{"kind":"seq","parts":[{"kind":"plain","n":10,"seco'
        'nds":0.503606,"is_random":true,"times":3},{"kind":"work","n":11,"seconds":0.804123}],"n":9'
        ',"seconds":0.0},{"kind":"fail","n":12,"seconds":0.404359}],"n":8,"seconds":0.0}],"n":3,"se'
        'conds":0.0}],"n":2,"seconds":0.0,"limit_s":1.204796},{"is_stored":true,"ends":[[3,7,true],'
        "[0,6,true]]}]"
    ),
    "a time-out that passes while a race waits for a thread does not pass again": (
        '[{"kind":"seq","parts":[{"kind":"case","parts":[{"kind":"wait","parts":[{"kind":"first","p'
        'arts":[{"kind":"loop","parts":[{"kind":"block","n":7,"seconds":0.402236}],"n":6,"times":3}'
        ',{"kind":"work","n":9,"seconds":0.402646}],"n":5}],"n":4,"limit_s":0.604359},{"kind":"work'
        '","n":11,"seconds":0.105},{"kind":"work","n":12,"seconds":0.106}],"n":3},{"kind":"work","n'
        '":13,"seconds":0.106}],"n":2},{"is_stored":true,"ends":[[9,0,true]]}]'
    ),
    "a tool whose time passes after its group has failed": (
        '[{"kind":"tool","parts":[{"kind":"group","parts":[{"kind":"gather","parts":[{"kind":"ask",'
        '"n":8,"seconds":0.0},{"kind":"tool","parts":[{"kind":"work","n":14,"seconds":0.401732}],"n'
        '":10,"seconds":0.0,"limit_s":0.302236}],"n":7,"seconds":0.0}],"n":6,"seconds":0.0}],"n":5,'
        '"seconds":0.0,"limit_s":0.153606},{"is_stored":true,"ends":[[0,0,true]],"retries":1}]'
    ),
    "equal calls that are cancelled again in another order": (
        '[{"kind":"try","parts":[{"kind":"gather","parts":[{"kind":"deadline","parts":[{"kind":"work","n":10,'
        '"seconds":0.401414}],"n":8,"limit_s":1.202236},{"kind":"deadline","parts":[{"kind":"gather",'
        '"parts":[{"kind":"sleep","n":15,"seconds":0.704123},{"kind":"sleep","n":18,"seconds":6.004359}],"n":14}],'
        '"n":13,"limit_s":0.305568}],"n":4},{"kind":"work","n":20,"seconds":0.106403}],"n":2},{"is_stored":true,'
        '"ends":[[2,0,true],[7,0,false]]}]'
    ),
    "an equal call waits in vain to be cancelled again by another order": (
        '[{"kind":"try","parts":[{"kind":"group","parts":[{"kind":"work","n":10,"seconds":0.402236},{"kind":"try",'
        '"parts":[{"kind":"fail","seconds":0.402646,"is_equal":true},{"kind":"flaky","n":14,"seconds":0.103317,'
        '"limit_s":0.153606,"retries":2}],"n":11},{"kind":"fail","seconds":0.804359,"is_equal":true}],"n":3},'
        '{"kind":"flaky","n":20,"seconds":0.805568,"limit_s":0.156083,"retries":1}],"n":2},{"seed":112,'
        '"is_stored":true,"ends":[[5,0,true],[0,0,true],[4,0,false]]}]'
    ),
    "a race cancels in a retry what a time-out had cancelled before": (
        '[{"kind":"first","parts":[{"kind":"loop","parts":[{"kind":"work","n":11,"seconds":0.103317,'
        '"limit_s":0.603606,"retries":1}],"n":10,"times":3},{"kind":"timeout","parts":[{"kind":"work","n":15,'
        '"seconds":0.404796}],"n":14,"limit_s":0.155385}],"n":6},{"is_stored":true,"ends":[[6,4,true],[5,6,true]],'
        '"cancel":[8,18,true],"retries":2}]'
    ),
}


@pytest.mark.parametrize("name", FOUND_IN_MEMORY)
def test_what_was_found_in_memory(name: str, attempt_in_memory: Attempt) -> None:
    attempt_in_memory(*msgspec.json.decode(FOUND_IN_MEMORY[name], type=tuple[Statement, Fate]))


def test_a_call_that_a_store_forgets_is_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    find_calls = queries.find_calls
    monkeypatch.setattr(queries, "find_calls", lambda *args: find_calls(*args)[1:])
    with pytest.raises(AssertionError, match=r"work\(1\) is executed again.*\n\ncall work\(1\)  # takes 0.101 s\n"):
        attempt(program("seq", call(1), call(9)), Fate(is_stored=True, ends=(End(2, 5),)))


def test_equal_calls_that_a_store_forgets_are_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which one of equal calls is executed again may differ, but not how often all of them are executed."""
    find_calls, equal = queries.find_calls, replace(call(1), n=0, is_equal=True)
    attempt(program("seq", equal, equal, call(9)), Fate(is_stored=True, ends=(End(4, 5),)))
    monkeypatch.setattr(queries, "find_calls", lambda *args: find_calls(*args)[2:])
    with pytest.raises(AssertionError, match="equal calls of work are executed 4 times, and not up to 2 times"):
        attempt(program("seq", equal, equal, call(9)), Fate(is_stored=True, ends=(End(4, 5),)))


def test_a_run_that_never_ends_is_found(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Journal, "call", lambda *args: asyncio.Event().wait())
    with pytest.raises(AssertionError, match="No end after"):
        attempt(call(1), Fate())
