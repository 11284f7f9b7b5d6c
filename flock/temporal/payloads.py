"""Payloads that are too long for the cluster are files in a shared folder. Histories have their checksums instead.

The folder is a driver of the SDK's external storage (``temporalio.converter.ExternalStorage``). The SDK calls it for
all payloads that it sends and receives. For histories that are read outside of a workflow, ``resolve`` does the same.

``{folder}/{workflow id}/{sha256}`` is one payload. A file is written whole or not at all, is synced to disk before
anything refers to it, and never changes. So a file that exists already is not written again.
"""

import asyncio
import contextlib
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
from flock.store.files import sync_folder
from flock.temporal.messages import CONVERTER

logger = logging.getLogger("flock.temporal")

#: ``error_type`` of a run whose worker cannot read a long payload.
PAYLOAD_LOST = "payload_lost"
#: Payloads of at least this size, in bytes, are stored in the folder.
THRESHOLD_BYTES = 256 * 1024
#: Seconds between attempts to write to a disk that is full or missing.
RETRY_AFTER_S = 1.0

#: A valid claim. Claims come from the cluster, and none may lead out of the folder.
CLAIM = re.compile(r"[\w%~-][\w%~.-]*/[0-9a-f]{64}", re.ASCII)


class PayloadFolder(StorageDriver):
    """The folder for long payloads.

    Args:
        folder: the same one for all processes, API and workers, on one host or on a shared disk. With None, long
            payloads are sent to the cluster, and one that another process stored in a folder cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._folder = None if folder is None else Path(folder)
        storage = ExternalStorage(drivers=[self], driver_selector=self._select, payload_size_threshold=THRESHOLD_BYTES)
        #: replaces ``CONVERTER``
        self.converter: DataConverter = dataclasses.replace(CONVERTER, external_storage=storage)

    def name(self) -> str:
        return "flock-folder"

    def type(self) -> str:
        return "flockapi.folder"

    def check(self) -> None:
        """Raise DefinitionError if the folder is missing or not writable."""
        if self._folder is not None:
            check_folder(self._folder, "payload folder", "--payload-dir, payload_dir=")

    # Called by the SDK

    def _select(self, context: StorageDriverSelectContext, payload: Payload) -> StorageDriver | None:
        """Heartbeats stay out of the folder: their target is not a workflow, and the next one replaces them."""
        return self if self._folder is not None and isinstance(context.target, StorageDriverWorkflowInfo) else None

    async def store(self, context: StorageDriverStoreContext, payloads: Sequence[Payload]) -> list[StorageDriverClaim]:
        """Raises StoreError."""
        assert context.target is not None
        assert context.target.id is not None
        return [await self._store(context.target.id, payload) for payload in payloads]

    async def retrieve(
        self, context: StorageDriverRetrieveContext, claims: Sequence[StorageDriverClaim]
    ) -> list[Payload]:
        """Raises OSError, or ApplicationError, which fails the workflow because a retry would not help."""
        return [await asyncio.to_thread(self._read, claim.claim_data.get("file", "")) for claim in claims]

    # Called by the engine and the worker

    async def store_ahead(self, workflow_id: str, value: Any) -> None:
        """Write *value* to the folder before it is sent, if it is long. Nothing is left to write when it is sent.

        A failed write is retried until it succeeds, for example when the disk is full.

        Cancellation: the file is written whole or not at all.
        """
        (payload,) = self.converter.payload_converter.to_payloads([value])
        while self._folder is not None and payload.ByteSize() >= THRESHOLD_BYTES:
            try:
                await self._store(workflow_id, payload)
                return
            except StoreError as exc:
                logger.warning("%s: %s Retrying.", workflow_id, exc)
                await asyncio.sleep(RETRY_AFTER_S)

    async def resolve(self, messages: Iterable[Message]) -> None:
        """Replace the references in *messages* by the payloads in the folder. Raises StoreError."""
        payloads = [payload for message in messages for payload in _payloads_of(message) if payload.external_payloads]
        if not payloads:
            return
        try:
            decoded = await self.converter.decode(payloads, [RawValue] * len(payloads))
        except ApplicationError as exc:
            raise StoreError(exc.message) from exc
        except OSError as exc:
            raise StoreError(f"A long payload cannot be read: {exc.strerror}.") from exc
        for payload, raw in zip(payloads, decoded, strict=True):
            payload.CopyFrom(raw.payload)

    async def delete(self, workflow_id: str) -> None:
        """Delete the payloads of a workflow."""
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
        subfolder = self._folder / name
        path = subfolder / hashlib.sha256(content).hexdigest()
        file = f"{name}/{path.name}"
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # the folder is cleaned up by age, which counts from the last use
            return file
        if not subfolder.is_dir():
            subfolder.mkdir(exist_ok=True)
            sync_folder(self._folder)
        new = subfolder / f".{secrets.token_hex(8)}"
        try:
            with new.open("xb") as written:
                written.write(content)
                written.flush()
                os.fsync(written.fileno())
            new.replace(path)
        except OSError:
            new.unlink(missing_ok=True)
            raise
        sync_folder(subfolder)
        return file

    def _read(self, file: str) -> Payload:
        if self._folder is None:
            raise payload_lost(
                "A long payload is in a folder, and this process has no payload folder. Start it with --payload-dir "
                "(payload_dir=), the same folder for the API and all workers."
            )
        if CLAIM.fullmatch(file) is None:
            raise payload_lost("The reference to a long payload is not a valid file name.")
        try:
            content = (self._folder / file).read_bytes()
        except FileNotFoundError as exc:
            logger.error("%s is not in %s", file, self._folder)
            raise payload_lost(
                "A long payload is missing from the payload folder. Check that all processes have the same "
                "--payload-dir, and that no file is deleted from it before the cluster deletes the run."
            ) from exc
        if hashlib.sha256(content).hexdigest() != file.rpartition("/")[2]:
            logger.error("%s in %s is damaged", file, self._folder)
            raise payload_lost("A long payload is damaged: its checksum does not match.")
        return Payload.FromString(content)


def check_folder(folder: Path, what: str, options: str) -> None:
    """Raise DefinitionError if the folder is missing or not writable."""
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise DefinitionError(
            f"The {what} {str(folder)!r} is missing or not writable. Create it, or name another one, "
            f"the same for all processes ({options})."
        )


def payload_lost(message: str) -> ApplicationError:
    return ApplicationError(message, type=PAYLOAD_LOST, non_retryable=True)


def _name_of(workflow_id: str) -> str:
    return quote(workflow_id, safe="")


def _payloads_of(message: Message) -> Iterator[Payload]:
    if isinstance(message, Payload):
        yield message
        return
    for _, value in message.ListFields():
        values = [value] if isinstance(value, Message | str | bytes | int | float) else value
        for item in values.values() if hasattr(values, "values") else values:
            if isinstance(item, Message):
                yield from _payloads_of(item)
