"""Execute one program in one order, and print the order: python -m tests.proof questions 17"""

import argparse
import tempfile
from pathlib import Path

from tests.proof.invariants import store_of, trial, trial_with_restart
from tests.proof.programs import PROGRAMS
from tests.proof.schedules import Schedule, execute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("seed", type=int)
    parser.add_argument(
        "--cancel-at", type=int, metavar="STEP", help="the step of the loop at which the run is cancelled"
    )
    parser.add_argument("--stop-at", type=int, metavar="STEP", help="the step at which its engine stops")
    chosen = parser.parse_args()

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
