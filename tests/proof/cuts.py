"""Power cuts: what a real server does to its files is recorded, and every state in which a power cut may leave them is
opened by the engine.

python -m tests.proof.cuts                        all cuts of all recordings
python -m tests.proof.cuts power --states 500     of one: the files as they were after each call, and a sample of others
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import shutil
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tests.proof.mutations import mutated
from tests.proof.recordings import RECORDINGS, Recording
from tests.proof.scenarios import provider
from tests.proof.servers import Forge, Place
from tests.support import ROOT

#: What a disk writes at once: a write may be torn at these sizes.
BLOCKS = (512, 4096)
#: The states of one cut: everything, nothing that was not synced, no data, no names, the last write torn, and samples.
SAMPLES = 4
HEAD = struct.Struct("c7xqqqqq")


class Call(NamedTuple):
    """A record of ``calls.c``; of a sync, *offset* is the thread. "A" is what was acknowledged then, as JSON in *data*,
    and "Y" a sync of all files.
    """

    what: str
    file: int
    offset: int
    name: str
    data: bytes


def calls_of(content: bytes) -> list[Call]:
    at, calls = 0, list[Call]()
    while at < len(content):
        what, file, offset, _, name, data = HEAD.unpack_from(content, at)
        at += HEAD.size
        end = at + name + data
        calls.append(Call(what.decode(), file, offset, content[at : at + name].decode(), content[at + name : end]))
        at = end
    return calls


@dataclass(eq=False)
class File:
    """What is on disk of a file, and the writes that may be: an offset and data, or a size without data."""

    durable: bytes = b""
    pending: list[tuple[int, bytes | None]] = field(default_factory=list)

    def content(self, kept: list[tuple[int, bytes | None]]) -> bytes:
        content = bytearray(self.durable)
        for offset, data in kept:
            if len(content) < offset:
                content += bytes(offset - len(content))
            if data is None:
                del content[offset:]
            else:
                content[offset : offset + len(data)] = data
        return bytes(content)


FOLDER = File()


class Disk:
    """The files of a folder after the calls so far, by what POSIX promises, which is nothing but syncs.

    A name is on disk after a sync of its folder, and the data of a file after one of the file. What is in a folder
    whose own name is lost, is lost.
    """

    def __init__(self) -> None:
        self._files = defaultdict[int, File](File)
        self._names, self._durable_names = dict[str, File](), dict[str, File]()
        self._pending_names = defaultdict[str, list[tuple[str, File | None]]](list)  # by folder
        #: how many writes or names each thread that syncs a file will have synced; that of a killed one never ends
        self._syncs = defaultdict[int, dict[int, int]](dict)

    def apply(self, call: Call) -> None:
        match call.what:
            case "c":
                self._files[call.file] = File()
                self._rename(call.name, self._files[call.file])
            case "m":
                self._rename(call.name, FOLDER)
            case "w":
                self._files[call.file].pending.append((call.offset, call.data))
            case "t":
                self._files[call.file].pending.append((call.offset, None))
            case "u" if call.name in self._names:
                self._rename(call.name, None)
            case "r" if call.name in self._names:
                self._rename(call.data.decode(), self._names[call.name])
                self._rename(call.name, None)
            case "Y":
                for each in self._files.values():
                    each.durable, each.pending = each.content(each.pending), []
                self._durable_names = dict(self._names)
                self._pending_names.clear()
            case "s":
                file = self._files.get(call.file)
                pending = self._pending_names[call.name] if file is None else file.pending
                self._syncs[call.file][call.offset] = len(pending)
            case "S":
                self._sync(call.file, call.name, self._syncs[call.file].pop(call.offset))

    def _rename(self, name: str, file: File | None) -> None:
        _set(self._names, name, file)
        self._pending_names[os.path.dirname(name)].append((name, file))

    def _sync(self, number: int, name: str, count: int) -> None:
        if (file := self._files.get(number)) is None:  # a folder
            for each in self._pending_names[name][:count]:
                _set(self._durable_names, *each)
            del self._pending_names[name][:count]
        else:
            file.durable = file.content(file.pending[:count])
            del file.pending[:count]
        for thread, left in self._syncs[number].items():
            self._syncs[number][thread] = max(0, left - count)

    def state(self, number: int, cut: int) -> Mapping[str, bytes | None]:
        """Return the files and folders, which are None, after a power cut: one of ``COUNT`` states."""
        choice = random.Random(f"{cut} {number}")
        block = BLOCKS[number % 2]
        names = dict(self._durable_names)
        for name, each in itertools.chain(*self._pending_names.values()):
            if number in (0, 2, 4, 5) or (number > 5 and choice.random() < 0.7):
                _set(names, name, each)

        def kept(file: File) -> list[tuple[int, bytes | None]]:
            if number in (0, 3):
                return file.pending
            if number in (1, 2):
                return []
            if number in (4, 5):  # only the last write is torn
                offset, data = file.pending[-1] if file.pending else (0, None)
                if data is None:
                    return file.pending
                return [*file.pending[:-1], (offset, data[: choice.randrange(0, len(data), block)])]
            parts = list[tuple[int, bytes | None]]()
            for offset, data in file.pending:
                if data is None:
                    parts.append((offset, None))
                    continue
                first = block - offset % block
                cuts = [0, *range(first, len(data), block), len(data)]
                parts += [(offset + a, data[a:b]) for a, b in itertools.pairwise(cuts)]
            share = choice.choice((0.1, 0.5, 0.9))
            return [part for part in parts if choice.random() < share]

        return {name: None if file is FOLDER else file.content(kept(file)) for name, file in names.items()}


#: The number of states after each cut, and how many of them differ from those before on average.
COUNT, STATES_OF_A_CUT = 6 + 2 * SAMPLES, 7


def _set(names: dict[str, File], name: str, file: File | None) -> None:
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file


def states(
    calls: list[Call], cuts: Collection[int], has_prefixes: bool
) -> Iterator[tuple[int, int, Mapping[str, bytes | None], list[Any]]]:
    """Yield the cut, the number of the state, the files, and what was acknowledged before. Equal ones come once.

    These are all states of *cuts*, and the first one of each other cut if it *has_prefixes*.
    """
    disk, acks, seen = Disk(), list[Any](), set[bytes]()
    for cut, call in enumerate(calls):
        if call.what == "A":
            acks.append(json.loads(call.data))
        else:
            disk.apply(call)
        count = COUNT if cut in cuts else int(has_prefixes)
        for number in range(count if call.what != "s" else 0):
            files = disk.state(number, cut)
            digest = hashlib.blake2b(str(len(acks)).encode())
            for name, content in sorted(files.items()):
                digest.update(f"{name} {len(content or b'')} ".encode() + (content or b""))
            if digest.digest() not in seen:
                seen.add(digest.digest())
                yield cut, number, files, acks


class Result(NamedTuple):
    """The number of calls, and of states; what fails; how many runs each state lacks if they may be missing."""

    calls: int
    tried: int
    failed: list[str]
    missing: list[int]


def execute(
    recording: Recording,
    count: int | None = None,
    seed: int = 0,
    package: Path = ROOT,
    keep: Path | None = None,
    has_prefixes: bool = False,
) -> Result:
    """Record, and check all states, or about *count* of them.

    Args:
        has_prefixes: check also, after each call, the state in which all calls so far are done.
        package: the folder of another copy of the product.
        keep: where to copy the files of the first state that fails.
    """
    tried, missing, failed = 0, list[int](), list[str]()
    with Forge(package) as forge, provider() as (model, env):
        with Place(forge, env, *recording.options, record=True) as place:
            recording.play(place)
            calls, root = calls_of(place.record.read_bytes()), str(place.folder)
        cuts: Collection[int] = range(len(calls))
        if count is not None:
            cuts = set(random.Random(seed).sample(range(len(calls)), min(len(calls), -(-count // STATES_OF_A_CUT))))
        for cut, number, files, acks in states(calls, cuts, has_prefixes):
            tried += 1
            with Place(forge, env, *recording.options) as place:
                for path, content in sorted(files.items()):
                    file = Path(place.folder, os.path.relpath(path, root))
                    if content is None and file.parent.exists():
                        file.mkdir()
                    elif content is not None and file.parent.exists():
                        file.write_bytes(content)
                try:
                    missing.append(recording.check(place, model, acks))
                except Exception as exc:
                    failed.append(f"cut {cut} of {len(calls)}, after {calls[cut][:4]}, state {number}: {exc!r}")
                    print(failed[-1], flush=True)
                    if keep is not None and len(failed) == 1:
                        shutil.copytree(place.folder, keep)
    return Result(len(calls), tried, failed, missing)


def main() -> None:  # pragma: no cover - run by hand
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recording", nargs="*", help=", ".join(RECORDINGS))
    parser.add_argument(
        "--states",
        type=int,
        metavar="COUNT",
        help="about that many of each recording, besides those after each call in which nothing is lost",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the files of the first state that fails")
    parser.add_argument("--mutation", type=Path, metavar="PATCH", help="change the product before")
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    is_broken = False
    with mutated(chosen.mutation) if chosen.mutation else contextlib.nullcontext(ROOT) as package:
        for name in chosen.recording or RECORDINGS:
            began_s = time.monotonic()
            calls, tried, failed, missing = execute(
                RECORDINGS[name], chosen.states, chosen.seed, package, chosen.keep, True
            )
            is_broken |= bool(failed)
            took_s, lossy = time.monotonic() - began_s, [count for count in missing if count]
            lost = f", {len(lossy)} of them without up to {max(lossy)} acknowledged runs" if lossy else ""
            print(f"{name}: {calls} calls, {tried} states{lost}, {len(failed)} wrong, {took_s:.0f} s", flush=True)
    sys.exit(is_broken)


if __name__ == "__main__":
    main()
