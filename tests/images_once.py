"""No image is sent twice: a batch of images from a folder, killed twice while it runs, with flat memory.

    python -m tests.images_once --images 10000

The provider kills the command when a third and two thirds of the images have arrived. An image whose call was in flight
at a kill may arrive again, with the same idempotency key. Anything else ends the script with an error.
"""

import argparse
import base64
import csv
import logging
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from flock.testing import FakeModel, ModelRequest, Reply
from tests.support import ROOT
from tests.support.servers import flockapi_command
from tests.test_files import PNG

TARGET = """
import os
from flock.core import Flock, FlockFactory, Model

flock = Flock("images", model=Model("fake/model", base_url=os.environ["FAKE_URL"], api_key="none"))
flock.add_agent(FlockFactory.create_default_agent("look", input="photo: Image", output="number: int"))
"""
IMAGE_BYTES, WORKERS, KILLS = 16 * 1024, 20, 2


def image(number: int, size: int) -> bytes:
    """Return a PNG with its number and other bytes behind its end, which is still a PNG for everybody."""
    return PNG + number.to_bytes(4, "big") + random.Random(number).randbytes(size - len(PNG) - 4)


class Provider(FakeModel):
    """Notes the keys of each image, and kills *process* when *kill_at* images have arrived."""

    def __init__(self, image_bytes: int) -> None:
        super().__init__(self._reply)
        self.image_bytes = image_bytes
        self.keys: dict[int, list[str]] = defaultdict(list)
        self.kill_at, self.lock, self.memory = 0, threading.Lock(), list[int]()
        self.process: subprocess.Popen[bytes] | None = None

    def _reply(self, request: ModelRequest) -> Reply:
        (url,) = [
            part["image_url"]["url"] for part in request["messages"][-1]["content"] if part["type"] == "image_url"
        ]
        content = base64.b64decode(url.partition(",")[2])
        number = int.from_bytes(content[len(PNG) : len(PNG) + 4], "big")
        with self.lock:
            assert len(content) == self.image_bytes
            self.keys[number].append(request.headers["idempotency-key"])
            self.requests.clear()
            process = self.process
            if process is not None and len(self.keys) % 100 == 0:
                self.memory.append(peak_of(process.pid))
            if process is not None and len(self.keys) == self.kill_at:
                self.memory.append(peak_of(process.pid))
                process.send_signal(signal.SIGKILL)
        return Reply({"number": number})


def peak_of(pid: int) -> int:
    """Return the most memory that a process had so far, in MB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return max([int(line.split()[1]) // 1000 for line in lines if line.startswith("VmHWM")], default=0)


def play(images: int, image_bytes: int = IMAGE_BYTES) -> int:
    """Return the most memory that a process of the command had, in MB.

    Raises AssertionError if an image was sent twice.
    """
    provider = Provider(image_bytes)
    with tempfile.TemporaryDirectory() as made, provider.serve() as url:
        folder = Path(made)
        (folder / "target.py").write_text(TARGET)
        (folder / "photos").mkdir()
        with open(folder / "rows.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["photo"])
            for number in range(images):
                (folder / "photos" / f"{number}.png").write_bytes(image(number, image_bytes))
                rows.writerow([f"{number}.png"])
        env = {**os.environ, "FAKE_URL": url, "PYTHONPATH": str(ROOT)}
        command = flockapi_command("batch", "target.py", "look", "rows.csv", "-o", "out.csv", "--files", "photos")
        for kill_at in (*(images * (each + 1) // (KILLS + 1) for each in range(KILLS)), 0):
            began = time.monotonic()
            with subprocess.Popen(
                [*command, "--max-workers", str(WORKERS)], cwd=folder, env=env, stderr=subprocess.PIPE
            ) as process:
                with provider.lock:
                    provider.kill_at, provider.process = kill_at, process
                said = process.communicate()[1].decode().strip().splitlines()
            print(
                f"  exit code {process.returncode} after {time.monotonic() - began:.0f} s, {len(provider.keys):,} "
                f"images sent, {max(provider.memory, default=0)} MB of memory: {said[-1] if said else ''}",
                flush=True,
            )
            assert process.returncode == (-signal.SIGKILL if kill_at else 0), said
        with open(folder / "out.csv", newline="") as file:
            answers = [int(row["number"]) for row in csv.DictReader(file)]
        assert answers == list(range(images)), "each row has the answer about its own image"
        again = [number for number, keys in provider.keys.items() if len(keys) > 1]
        print(f"  {len(provider.keys):,} images sent, {len(again)} of them in flight at a kill and sent again")
        assert len(again) <= KILLS * WORKERS, again
        assert all(len(set(keys)) == 1 for keys in provider.keys.values()), "repeated with the same key"
        assert len(provider.keys) == images
    return max(provider.memory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    logging.getLogger("uvicorn.error").disabled = True  # requests that a kill has cut off
    count = parser.parse_args().images
    few = play(count // 10)
    most = play(count)
    print(f"{few} MB of memory with {count // 10:,} images, and {most} MB with {count:,}")
    assert most < few + 40, "memory is flat"
