"""What is too long for the cluster lies in a folder that all processes share; histories have its checksum in its place.

It is a driver of the SDK's external storage (``temporalio.converter.ExternalStorage``), which calls it for whatever is
sent and received. Histories that are read as they are, outside of a workflow, are completed by ``resolve``.

``{folder}/{workflow id}/{sha256}`` is one payload. Files are written whole or not at all, are on the disk before
anything names them, and never change, so that whoever writes one a second time has nothing to do.
"""

import asyncio
import dataclasses
import hashlib
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from google.protobuf.message import Message
from temporalio.api.common.v1 import Payload
from temporalio.common import RawValue
from temporalio.converter import (
    DataConverter,
    ExternalStorage,
    StorageDriver,
    StorageDriverClaim,
    StorageDriverRetrieveContext,
    StorageDriverSelectContext,
    StorageDriverStoreContext,
    StorageDriverWorkflowInfo,
)
from temporalio.exceptions import ApplicationError

from flock.errors import DefinitionError, StoreError
from flock.temporal.messages import CONVERTER

__all__ = ["PAYLOAD_LOST", "PayloadFolder"]

logger = logging.getLogger("flock.temporal")

#: ``error_type`` of a run whose worker cannot read what it was to go on with.
PAYLOAD_LOST = "payload_lost"
#: What is longer lies in the folder, in bytes.
THRESHOLD_BYTES = 256 * 1024
#: How long a full disk, or one that is away, is left alone, in seconds.
RETRY_AFTER_S = 1.0

#: Claims come from the cluster: none leads out of the folder.
CLAIM = re.compile(r"[\w%~-][\w%~.-]*/[0-9a-f]{64}", re.ASCII)


class PayloadFolder(StorageDriver):
    """Where long payloads are kept.

    Args:
        folder: the same one in all processes, API and workers, on one host or on a disk that all of them reach; None
            keeps nothing there, and says so when something is met that another process did keep.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        storage = ExternalStorage(
            drivers=[self],
            driver_selector=self._select,
            payload_size_threshold=THRESHOLD_BYTES,
        )
        #: in place of ``CONVERTER``
        self.converter: DataConverter = dataclasses.replace(CONVERTER, external_storage=storage)

    def name(self) -> str:
        return "flock-folder"

    def type(self) -> str:
        return "flockapi.folder"

    def check(self) -> None:
        """Raise DefinitionError where the folder cannot be used."""
        if self._folder is not None and not (self._folder.is_dir() and os.access(self._folder, os.W_OK | os.X_OK)):
            raise DefinitionError(
                f"The folder for long payloads {str(self._folder)!r} is not there, or cannot be written: make it, or "
                "name another one, the same for all processes (--payload-dir, payload_dir=)."
            )

    # What the SDK calls

    def _select(self, context: StorageDriverSelectContext, payload: Payload) -> StorageDriver | None:
        """Heartbeats, which come every second and are forgotten as often, are of no workflow."""
        return self if self._folder is not None and isinstance(context.target, StorageDriverWorkflowInfo) else None

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:
        """Raises StoreError."""
        assert context.target is not None
        assert context.target.id is not None
        return [await self._store(context.target.id, payload) for payload in payloads]

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        """Raises ApplicationError, by which a workflow fails: to try again would change nothing. And OSError."""
        return [await asyncio.to_thread(self._read, claim.claim_data.get("file", "")) for claim in claims]

    # What the engine and the worker call

    async def store_ahead(self, workflow_id: str, value: Any) -> None:
        """Write what is about to be sent, if it is long, as long as that takes: afterwards it is sent at once.

        A full disk is waited for. Cancellation: the file is written whole or not at all.
        """
        (payload,) = self.converter.payload_converter.to_payloads([value])
        while self._folder is not None and payload.ByteSize() >= THRESHOLD_BYTES:
            try:
                await self._store(workflow_id, payload)
                return
            except StoreError as exc:
                logger.warning("%s: %s Trying again.", workflow_id, exc)
                await asyncio.sleep(RETRY_AFTER_S)

    async def resolve(self, messages: Iterable[Message]) -> None:
        """Put what lies in the folder into *messages*, in its place. Raises StoreError."""
        payloads = [payload for message in messages for payload in _payloads_of(message) if payload.external_payloads]
        if not payloads:
            return
        try:
            found = await self.converter.decode(payloads, [RawValue] * len(payloads))
        except ApplicationError as exc:
            raise StoreError(exc.message) from exc
        except OSError as exc:
            raise StoreError(f"A long payload cannot be read now: {exc.strerror}.") from exc
        for payload, raw in zip(payloads, found, strict=True):
            payload.CopyFrom(raw.payload)

    async def delete(self, workflow_id: str) -> None:
        """Delete what is kept of a workflow that is deleted."""
        if self._folder is not None:
            await asyncio.to_thread(shutil.rmtree, self._folder / _name_of(workflow_id), ignore_errors=True)

    # Files

    async def _store(self, workflow_id: str, payload: Payload) -> StorageDriverClaim:
        try:
            file = await asyncio.to_thread(self._write, _name_of(workflow_id), payload)
        except OSError as exc:
            raise StoreError(f"A long payload cannot be written: {exc.strerror}.") from exc
        return StorageDriverClaim(claim_data={"file": file})

    def _write(self, name: str, payload: Payload) -> str:
        assert self._folder is not None
        content = payload.SerializeToString(deterministic=True)
        place = self._folder / name
        path = place / hashlib.sha256(content).hexdigest()
        file = f"{name}/{path.name}"
        try:
            os.utime(path)  # its age, by which the folder is cleaned up, is that of its last use
            return file
        except FileNotFoundError:
            pass
        if not place.is_dir():
            place.mkdir(exist_ok=True)
            _sync_folder(self._folder)
        new = place / f".{secrets.token_hex(8)}"
        try:
            with new.open("xb") as written:
                written.write(content)
                written.flush()
                os.fsync(written.fileno())
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        _sync_folder(place)
        return file

    def _read(self, file: str) -> Payload:
        if self._folder is None:
            raise _payload_lost(
                "A long payload lies in a folder that this process was not told of. Start it with --payload-dir "
                "(payload_dir=), the same folder for the API and all workers."
            )
        if CLAIM.fullmatch(file) is None:
            raise _payload_lost("A long payload is claimed by what is no name of one.")
        try:
            content = (self._folder / file).read_bytes()
        except FileNotFoundError as exc:
            logger.error("%s is not in %s", file, self._folder)
            raise _payload_lost(
                "A long payload is not in its folder. Do all processes have the same --payload-dir, and is nothing "
                "deleted from it before the cluster forgets the run?"
            ) from exc
        if hashlib.sha256(content).hexdigest() != file.rpartition("/")[2]:
            logger.error("%s in %s is damaged", file, self._folder)
            raise _payload_lost("A long payload is damaged: its checksum is another one.")
        return Payload.FromString(content)


def _payload_lost(message: str) -> ApplicationError:
    return ApplicationError(message, type=PAYLOAD_LOST, non_retryable=True)


def _name_of(workflow_id: str) -> str:
    return quote(workflow_id, safe="")


def _sync_folder(folder: Path) -> None:
    """A new name is on the disk once its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _payloads_of(message: Message) -> Iterator[Payload]:
    if isinstance(message, Payload):
        yield message
        return
    for _, value in message.ListFields():
        values = [value] if isinstance(value, Message | str | bytes | int | float) else value
        for each in values.values() if hasattr(values, "values") else values:
            if isinstance(each, Message):
                yield from _payloads_of(each)
