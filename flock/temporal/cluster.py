"""The connection to a Temporal cluster: it checks the namespace and translates the cluster's errors."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from google.protobuf.duration_pb2 import Duration
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import (
    DeleteWorkflowExecutionRequest,
    DescribeNamespaceRequest,
    RegisterNamespaceRequest,
)
from temporalio.client import Client, WorkflowExecutionDescription, WorkflowHandle
from temporalio.client import WorkflowHistoryEventFilterType as EventFilter
from temporalio.common import WorkflowIDReusePolicy
from temporalio.envconfig import ClientConfig
from temporalio.service import RetryConfig, RPCError, RPCStatusCode

from flock.errors import DefinitionError, EngineFull, StoreError
from flock.runs import Batch, Run
from flock.temporal.files import SharedContents
from flock.temporal.messages import (
    RUN_WORKFLOW,
    SEARCH_ATTRIBUTES,
    TASK_TIMEOUT,
    attributes_of,
    decoded,
    task_queue_of,
    workflow_id_of,
)
from flock.temporal.payloads import PayloadFolder, check_folder

logger = logging.getLogger("flock.temporal")

T = TypeVar("T")

#: The timeout of a request to the cluster, in seconds, so that clients get an answer within two.
ANSWER_TIMEOUT_S = 1.8
#: How long a starting process retries to connect, and the timeout of one attempt, in seconds.
START_TIMEOUT_S = 5.0
#: The pause before a request that a worker needs is sent again, in seconds.
RETRY_AFTER_S = 1.0
#: How often a history is read that the cluster changes meanwhile.
MAX_READS = 3
#: The retention of a namespace that is created here.
RETENTION = timedelta(days=30)

#: The statuses of calls that are not permitted.
DENIED = (RPCStatusCode.PERMISSION_DENIED, RPCStatusCode.UNAUTHENTICATED, RPCStatusCode.UNIMPLEMENTED)


class Cluster:
    """One namespace of a cluster.

    Args:
        address: ``host:port``; if None, ``TEMPORAL_ADDRESS``.
        namespace: if None, ``TEMPORAL_NAMESPACE``, and "default" without that.
        payload_dir: see ``PayloadFolder``.
        files_dir: the folder for the files of runs, the same for all processes. With None, there is none.

    Attributes:
        files: of the runs in this namespace; None without a folder.

    TLS, API key and other settings are read as Temporal's own tools read them (``temporalio.envconfig``): from
    ``TEMPORAL_TLS``, ``TEMPORAL_API_KEY`` and others, or from the file in ``TEMPORAL_CONFIG_FILE``.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: str | None = None,
        payload_dir: str | os.PathLike[str] | None = None,
        files_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.payloads = PayloadFolder(payload_dir)
        overrides: dict[str, Any] = {"target_host": address, "namespace": namespace}
        settings: dict[str, Any] = {**ClientConfig.load_client_connect_config()}
        self._config = settings | {name: value for name, value in overrides.items() if value is not None}
        if "target_host" not in self._config:
            raise DefinitionError(
                "The address of the Temporal cluster is missing. Pass host:port (--temporal), or set TEMPORAL_ADDRESS."
            )
        self.address = str(self._config["target_host"])
        self.namespace = str(self._config.setdefault("namespace", "default"))
        self.files = None if files_dir is None else SharedContents(Path(files_dir, quote(self.namespace, safe="")))
        self._retries = RetryConfig(max_elapsed_time_millis=round(1000 * ANSWER_TIMEOUT_S))
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None, "call connect() first"
        return self._client

    def handle(self, workflow_id: str, run_id: str | None = None) -> WorkflowHandle[Any, Any]:
        """Return the handle of a workflow, or of one of its executions, even if it does not exist."""
        return self.client.get_workflow_handle(workflow_id, run_id=run_id)

    async def connect(self, *, lazy: bool = True) -> None:
        """Connect to the cluster. Create the namespace and the search attributes if they are missing.

        Args:
            lazy: connect when a call needs it, which the SDK does not support for workers.

        Raises:
            StoreError: the cluster does not answer.
            DefinitionError: something is missing and cannot be created from here. The message has the command for it.
        """
        self.payloads.check()
        if self.files is not None:
            check_folder(self.files.root.parent, "folder for files", "--files-dir, files_dir=")
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                async with self.rpc_scope(START_TIMEOUT_S):
                    self._client = await Client.connect(
                        **self._config,
                        lazy=lazy,
                        data_converter=self.payloads.converter,
                        retry_config=self._retries,
                    )
                    await self._ensure_namespace()
                    await self._ensure_search_attributes()
                return
            except (StoreError, EngineFull) as exc:  # the cluster may be starting too
                if time.monotonic() > give_up_at:
                    raise StoreError(
                        f"The Temporal cluster at {self.address} cannot be used: {exc.__cause__ or exc}. Start it, or "
                        "name another (--temporal). For one on this machine: temporal server start-dev --db-filename "
                        "temporal.db"
                    ) from exc
            await asyncio.sleep(0.2)

    async def client_of_worker(self) -> Client:
        """Return a client that is connected, which the SDK needs for workers. Raises StoreError, EngineFull."""
        async with self.rpc_scope(START_TIMEOUT_S):
            return await Client.connect(**self._config, data_converter=self.payloads.converter)

    @contextlib.asynccontextmanager
    async def rpc_scope(
        self, timeout_s: float | None = ANSWER_TIMEOUT_S, *, missing_ok: bool = False, missing: Exception | None = None
    ) -> AsyncIterator[None]:
        """Limit the time for the client's calls in the block, and translate their errors.

        Args:
            timeout_s: for all calls together; None means no limit.
            missing_ok: leave the block if a workflow does not exist, or has ended.
            missing: raised in this case.

        Raises:
            StoreError: the cluster does not answer, or a call fails.
            EngineFull: the cluster is overloaded.
            RPCError: only NOT_FOUND and ALREADY_EXISTS, which the caller handles, unless *missing_ok* or *missing*.
        """
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except RPCError as exc:
            if exc.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.ALREADY_EXISTS):
                if missing_ok:
                    return
                if missing is not None:
                    raise missing from exc
                raise
            if exc.status is RPCStatusCode.RESOURCE_EXHAUSTED:
                raise EngineFull("The cluster is overloaded. Try again later.") from exc
            logger.warning("the Temporal cluster at %s: %s", self.address, exc)
            raise StoreError("The cluster cannot be used now. The server's log has the reason.") from exc
        except (TimeoutError, RuntimeError) as exc:  # a lazy client that cannot connect raises RuntimeError
            logger.warning("the Temporal cluster at %s does not answer: %r", self.address, exc)
            raise StoreError("The cluster does not answer. The server's log has the reason.") from exc

    async def answered(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Return what *ask* returns. Call it until the cluster answers."""
        while True:
            try:
                return await ask()
            except (StoreError, EngineFull):
                await asyncio.sleep(RETRY_AFTER_S)

    async def ask(self, workflow_id: str, query: Callable[..., T], *args: Any) -> T:
        """Return the answer of a workflow to a *query*, a method of its class. It needs a worker.

        Raises: StoreError, EngineFull; RPCError, NOT_FOUND if it does not exist; WorkflowQueryFailedError.
        """
        async with self.rpc_scope():
            found: T = await self.handle(workflow_id).query(query, args=args)
        return found

    async def signal(self, workflow_id: str, signal: str | Callable[..., None], value: Any) -> bool:
        """Send a *signal*. Returns False if the workflow does not exist or has ended. Raises StoreError, EngineFull."""
        async with self.rpc_scope(missing_ok=True):
            await self.handle(workflow_id).signal(signal, value)
            return True
        return False

    async def input_of(self, workflow_id: str, type_: type[T]) -> T:
        """Return the input of a workflow. Raises RPCError, NOT_FOUND if it does not exist or its retention is over."""
        async for event in self.handle(workflow_id).fetch_history_events(page_size=1):
            await self.payloads.resolve([event])
            return decoded(event.workflow_execution_started_event_attributes.input.payloads[0], type_)
        raise AssertionError("every history has a first event")

    async def history_of(
        self, workflow_id: str, run_id: str | None = None, *, with_inputs: bool = False
    ) -> Sequence[HistoryEvent]:
        """Return the history of a workflow, or of one of its executions.

        The inputs of the steps of a run are not needed: they follow from the results of earlier ones.

        Raises: RPCError, with NOT_FOUND if it does not exist.
        """
        events = (await _again_if_changed(self.handle(workflow_id, run_id).fetch_history)).events
        scheduled = EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
        await self.payloads.resolve(event for event in events if with_inputs or event.event_type != scheduled)
        return events

    async def describe(
        self, workflow_id: str, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> WorkflowExecutionDescription | None:
        """Return the current state of a workflow, or None if it does not exist. Raises StoreError, EngineFull."""
        async with self.rpc_scope(timeout_s, missing_ok=True):
            return await self.handle(workflow_id).describe()
        return None

    async def until_change(self, workflow_id: str, after: int | None = None) -> int:
        """Wait until a workflow is closed or does not exist.

        Args:
            after: if given, also until it begins to wait for answers, after the event with this id.

        Returns: the id of the event with which it began to wait, or 0. Raises StoreError, EngineFull.
        """
        wanted = EventFilter.CLOSE_EVENT if after is None else EventFilter.ALL_EVENT
        handle = self.handle(workflow_id)

        async def find() -> int:
            async for event in handle.fetch_history_events(wait_new_event=True, event_filter_type=wanted):
                if after is None:
                    break
                is_change = event.event_type == EventType.EVENT_TYPE_UPSERT_WORKFLOW_SEARCH_ATTRIBUTES
                if is_change and event.event_id > after:
                    return event.event_id
            return 0

        async with self.rpc_scope(None, missing_ok=True):
            return await _again_if_changed(find)
        return 0

    async def last_attempt(self, workflow: str, first_id: str) -> int:
        """Return the number of the last retry of the workflow *first_id*, from 2, or 1 if there is none.

        This finds runs and batches whose first attempt is past its retention.
        """
        query = f"WorkflowType = '{workflow}' AND WorkflowId STARTS_WITH '{first_id}:'"
        async with self.rpc_scope():
            retries = self.client.list_workflows(query)
            return max([int(retry.id.rpartition(":")[2]) async for retry in retries], default=1)

    async def has(self, workflow_id: str) -> bool:
        """Whether a workflow, or a retry of it if it is a run, exists. Raises StoreError, EngineFull."""
        if await self.describe(workflow_id) is not None:
            return True
        return workflow_id.startswith("run:") and await self.last_attempt(RUN_WORKFLOW, workflow_id) > 1

    async def delete(self, workflow_id: str, run_id: str = "") -> None:
        """Delete one execution of a workflow, or the latest, and its long payloads, if it exists.

        Raises: StoreError, EngineFull.
        """
        request = DeleteWorkflowExecutionRequest(
            namespace=self.namespace, workflow_execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
        )
        async with self.rpc_scope(None, missing_ok=True):
            await self.client.workflow_service.delete_workflow_execution(request)
        await self.payloads.delete(workflow_id)

    async def start_workflow(
        self, workflow: Any, *orders: Any, flock: str, timeout_s: float = ANSWER_TIMEOUT_S, **options: Any
    ) -> None:
        """Start a workflow of *flock* with *orders*. *options*: as for the client.

        Raises:
            WorkflowAlreadyStartedError: there is one with this id.
            StoreError, EngineFull: see ``rpc_scope``.
        """
        unknown = StoreError(f"The cluster does not know the namespace {self.namespace!r} now.")
        async with self.rpc_scope(timeout_s, missing=unknown):
            await self.client.start_workflow(
                workflow, args=orders, task_queue=task_queue_of(flock), task_timeout=TASK_TIMEOUT, **options
            )

    async def start(self, workflow: str, order: Any, record: Run | Batch, **options: Any) -> None:
        """Start *workflow*, one attempt of a run or batch, with *order* and the search attributes for lists.

        Raises: WorkflowAlreadyStartedError if this attempt was started before; see ``start_workflow``.
        """
        await self.start_workflow(
            workflow,
            order,
            flock=record.flock,
            id=workflow_id_of(record),
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            search_attributes=attributes_of(record),
            **options,
        )

    async def _ensure_namespace(self) -> None:
        try:
            namespace = await self._describe_namespace()
        except RPCError as exc:
            if exc.status in DENIED:
                raise DefinitionError(
                    f"The cluster at {self.address} denies access to the namespace {self.namespace!r}: {exc.message} "
                    "Name a namespace with access (TEMPORAL_NAMESPACE), and its key or certificate (TEMPORAL_API_KEY, "
                    "TEMPORAL_TLS_CLIENT_CERT_PATH)."
                ) from exc
            if exc.status is not RPCStatusCode.NOT_FOUND:
                raise
            namespace = await self._register_namespace()
        retention = namespace.config.workflow_execution_retention_ttl.ToTimedelta()
        logger.info("The namespace %s of %s keeps runs for %s after they end.", self.namespace, self.address, retention)

    async def _describe_namespace(self) -> Any:
        return await self.client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=self.namespace))

    async def _register_namespace(self) -> Any:
        retention = Duration(seconds=round(RETENTION.total_seconds()))
        request = RegisterNamespaceRequest(namespace=self.namespace, workflow_execution_retention_period=retention)
        try:
            await self.client.workflow_service.register_namespace(request)
        except RPCError as exc:
            if exc.status in DENIED:
                raise DefinitionError(
                    f"The cluster at {self.address} has no namespace {self.namespace!r}, and does not permit creating "
                    f"it from here. Create it with: temporal operator namespace create -n {self.namespace} "
                    f"--retention {RETENTION.days}d --address {self.address}"
                ) from exc
            if exc.status is not RPCStatusCode.ALREADY_EXISTS:
                raise
        return await self._when_known(self._describe_namespace)

    async def _ensure_search_attributes(self) -> None:
        try:
            missing = await self._when_known(self._missing_attributes)
        except RPCError as exc:
            if exc.status not in DENIED:
                raise
            # An administrator may have created them, so this is not an error.
            logger.warning(
                "Cannot check whether the namespace %s has the search attributes for lists of runs. Without them, runs "
                "are refused. Create them with: %s",
                self.namespace,
                self._commands_for(SEARCH_ATTRIBUTES),
            )
            return
        if not missing:
            return
        try:
            await self.client.operator_service.add_search_attributes(
                AddSearchAttributesRequest(
                    namespace=self.namespace, search_attributes={name: SEARCH_ATTRIBUTES[name] for name in missing}
                )
            )
        except RPCError as exc:
            if exc.status in DENIED:
                raise DefinitionError(
                    f"The namespace {self.namespace!r} does not have the search attributes {', '.join(missing)}, which "
                    "lists of runs need, and does not permit creating them from here. Create them with: "
                    f"{self._commands_for(missing)}"
                ) from exc
            if exc.status is not RPCStatusCode.ALREADY_EXISTS:  # another process created them
                raise
        while await self._missing_attributes():  # noqa: ASYNC110 - the cluster sends no event
            await asyncio.sleep(0.1)

    def _commands_for(self, names: Iterable[str]) -> str:
        options = f"--type Keyword -n {self.namespace} --address {self.address}"
        return "; ".join(f"temporal operator search-attribute create --name {name} {options}" for name in names)

    async def _missing_attributes(self) -> list[str]:
        request = ListSearchAttributesRequest(namespace=self.namespace)
        attributes = await self.client.operator_service.list_search_attributes(request)
        return [name for name in SEARCH_ATTRIBUTES if name not in attributes.custom_attributes]

    async def _when_known(self, call: Callable[[], Any]) -> Any:
        """Return the result of *call*. A new namespace may be unknown to parts of the cluster for seconds."""
        while True:
            try:
                return await call()
            except RPCError as exc:
                if exc.status is not RPCStatusCode.NOT_FOUND:
                    raise
            await asyncio.sleep(0.1)


async def _again_if_changed(read: Callable[[], Awaitable[T]]) -> T:
    """Return what *read* returns. Call it again if the cluster has changed a history between two of its pages."""
    for _ in range(MAX_READS - 1):
        try:
            return await read()
        except RPCError as exc:
            if exc.status is not RPCStatusCode.INVALID_ARGUMENT:
                raise
    return await read()
