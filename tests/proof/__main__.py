"""Execute one program in one order, and print the order: python -m tests.proof questions 17

Or execute random workflow programs, on an engine with a store or, much faster, without:
python -m tests.proof --programs 10000
python -m tests.proof --in-memory --programs 1000000
"""

import argparse
import tempfile
from pathlib import Path

import msgspec

from tests.proof.generator import CLASSES, Fate
from tests.proof.invariants import store_of, trial, trial_with_restart
from tests.proof.lives import processes
from tests.proof.many import execute_many
from tests.proof.memory import memories
from tests.proof.programs import PROGRAMS
from tests.proof.schedules import Schedule, execute
from tests.proof.workflows import Statement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS, nargs="?")
    parser.add_argument("seed", type=int, nargs="?", default=0)
    parser.add_argument(
        "--cancel-at", type=int, metavar="STEP", help="the step of the loop at which the run is cancelled"
    )
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="the step at which its engine stops")
    parser.add_argument("--programs", type=int, metavar="COUNT", help="execute random workflow programs")
    parser.add_argument("--class", dest="classes", choices=CLASSES, action="append", help="only of this class")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="of the first hundred programs")
    parser.add_argument("--program", dest="workflow", metavar="JSON", help="execute the workflow program of a failure")
    parser.add_argument("--in-memory", action="store_true", help="execute them without an engine and a store")
    chosen = parser.parse_args()
    is_in_memory = chosen.in_memory
    if chosen.programs is not None:
        raise SystemExit(
            execute_many(chosen.programs, chosen.classes or list(CLASSES), chosen.first, is_in_memory=is_in_memory)
        )
    if chosen.workflow is not None:
        with memories() if is_in_memory else processes() as attempt:
            attempt(*msgspec.json.decode(chosen.workflow, type=tuple[Statement, Fate]))
        return
    if chosen.program is None:
        parser.error("Name a program, or use --programs.")

    async def shown(loop: Schedule) -> None:
        program = PROGRAMS[chosen.program]
        try:
            if chosen.stop_at is not None:
                await trial_with_restart(loop, program, Path(folder) / "flock.db", stop_at=chosen.stop_at)
            else:
                await trial(loop, program, store_of(chosen.seed, Path(folder)), cancel_at=chosen.cancel_at)
        finally:
            print(*(f"{step:4} {line}" for step, line in enumerate(loop.trace, 1)), sep="\n")

    with tempfile.TemporaryDirectory() as folder:
        execute(shown, chosen.seed)


if __name__ == "__main__":
    main()
