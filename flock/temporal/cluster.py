"""A Temporal cluster: how it is reached, what must be there, and what its errors mean here."""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import timedelta
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.operatorservice.v1 import AddSearchAttributesRequest, ListSearchAttributesRequest
from temporalio.api.workflowservice.v1 import (
    DeleteWorkflowExecutionRequest,
    DescribeNamespaceRequest,
    RegisterNamespaceRequest,
)
from temporalio.client import Client
from temporalio.common import (
    SearchAttributePair,
    TypedSearchAttributes,
    WorkflowIDConflictPolicy,
    WorkflowIDReusePolicy,
)
from temporalio.envconfig import ClientConfig
from temporalio.service import RetryConfig, RPCError, RPCStatusCode

from flock.errors import DefinitionError, EngineFull, StoreError
from flock.runs import Batch, Run
from flock.temporal.messages import AGENT, FLOCK, PRINCIPAL, SEARCH_ATTRIBUTES, TASK_TIMEOUT, decoded
from flock.temporal.payloads import PayloadFolder

__all__ = ["Cluster"]

logger = logging.getLogger("flock.temporal")

T = TypeVar("T")

#: How long the cluster may take for an answer, in seconds: a caller is told within two.
ANSWER_TIMEOUT_S = 1.8
#: How long it is waited for when a process starts, and how long it may take to learn of search attributes, in seconds.
START_TIMEOUT_S = 5.0
#: How long a namespace that is made here keeps what has ended.
RETENTION = timedelta(days=30)

#: What the cluster says of a call that it does not let us make.
DENIED = (
    RPCStatusCode.PERMISSION_DENIED,
    RPCStatusCode.UNAUTHENTICATED,
    RPCStatusCode.UNIMPLEMENTED,
)


class Cluster:
    """One namespace of a cluster.

    Args:
        address: ``host:port``; if None, ``TEMPORAL_ADDRESS``.
        namespace: if None, ``TEMPORAL_NAMESPACE``, and "default" without that.
        payload_dir: see ``PayloadFolder``.

    TLS, an API key and all else are read as Temporal's own tools read them (``temporalio.envconfig``): from
    ``TEMPORAL_TLS``, ``TEMPORAL_API_KEY`` and others, or from the file that ``TEMPORAL_CONFIG_FILE`` names.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        namespace: str | None = None,
        payload_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.payloads = PayloadFolder(payload_dir)
        named: dict[str, Any] = {"target_host": address, "namespace": namespace}
        found: dict[str, Any] = {**ClientConfig.load_client_connect_config()}
        self._config = found | {name: value for name, value in named.items() if value is not None}
        if "target_host" not in self._config:
            raise DefinitionError("No Temporal cluster is named: pass its host:port (--temporal), or TEMPORAL_ADDRESS.")
        self.address = str(self._config["target_host"])
        self.namespace = str(self._config.setdefault("namespace", "default"))
        self._client: Client | None = None

    @property
    def client(self) -> Client:
        assert self._client is not None, "connect() comes first"
        return self._client

    async def connect(self, *, lazy: bool = True) -> None:
        """Reach the cluster and see that all is there which runs need; what may be made is made.

        Args:
            lazy: find out by each call whether the cluster is there; the SDK lets no worker do so.

        Raises:
            StoreError: it does not answer.
            DefinitionError: something is missing that may not be made from here; it says how to make it.
        """
        self.payloads.check()
        give_up_at = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                async with self.rpc_scope(START_TIMEOUT_S):
                    self._client = await Client.connect(
                        **self._config,
                        lazy=lazy,
                        data_converter=self.payloads.converter,
                        retry_config=RetryConfig(max_elapsed_time_millis=round(1000 * ANSWER_TIMEOUT_S)),
                    )
                    await self._ensure_namespace()
                    await self._ensure_search_attributes()
                return
            except StoreError as exc:  # it may be starting at the same time as we are
                if time.monotonic() > give_up_at:
                    raise StoreError(
                        f"The Temporal cluster at {self.address} cannot be used: {exc.__cause__ or exc}. Start it, or "
                        "name another (--temporal). For one on this machine: temporal server start-dev --db-filename "
                        "temporal.db"
                    ) from exc
            await asyncio.sleep(0.2)

    @contextlib.asynccontextmanager
    async def rpc_scope(self, timeout_s: float | None = ANSWER_TIMEOUT_S) -> AsyncIterator[None]:
        """Within it the client is called; *timeout_s* is for all of its calls together.

        Raises:
            StoreError: the cluster does not answer, or refuses.
            EngineFull: it has more to do than it takes.
            RPCError: NOT_FOUND and ALREADY_EXISTS, which are answers.
        """
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except RPCError as exc:
            if exc.status in (RPCStatusCode.NOT_FOUND, RPCStatusCode.ALREADY_EXISTS):
                raise
            if exc.status is RPCStatusCode.RESOURCE_EXHAUSTED:
                raise EngineFull("The cluster takes no more at this moment.") from exc
            logger.warning("the Temporal cluster at %s: %s", self.address, exc)
            raise StoreError("The cluster cannot be used now; the server's log says why.") from exc
        except (TimeoutError, RuntimeError) as exc:  # a lazy client that finds nobody raises RuntimeError
            logger.warning("the Temporal cluster at %s does not answer: %r", self.address, exc)
            raise StoreError("The cluster does not answer now; the server's log says more.") from exc

    async def input_of(self, workflow_id: str, type_: type[T]) -> T:
        """What a workflow was started with. Raises RPCError, NOT_FOUND if the cluster has forgotten it."""
        async for event in self.client.get_workflow_handle(workflow_id).fetch_history_events(page_size=1):
            await self.payloads.resolve([event])
            return decoded(event.workflow_execution_started_event_attributes.input.payloads[0], type_)
        raise AssertionError("every history has a first event")

    async def last_attempt(self, workflow: str, first_id: str) -> int:
        """The number of the last attempt that is kept of what began as *first_id*, above 1; 0 if there is none.

        The cluster forgets first attempts before the last one.
        """
        query = f"WorkflowType = '{workflow}' AND WorkflowId STARTS_WITH '{first_id}:'"
        async with self.rpc_scope():
            found = self.client.list_workflows(query)
            return max([int(each.id.rpartition(":")[2]) async for each in found], default=0)

    async def delete(self, workflow_id: str, run_id: str = "") -> None:
        """Delete a workflow, one execution or the last one, and its long payloads. It may be gone already."""
        wanted = DeleteWorkflowExecutionRequest(
            namespace=self.namespace, workflow_execution=WorkflowExecution(workflow_id=workflow_id, run_id=run_id)
        )
        try:
            await self.client.workflow_service.delete_workflow_execution(wanted)
        except RPCError as exc:
            if exc.status is not RPCStatusCode.NOT_FOUND:
                raise
        await self.payloads.delete(workflow_id)

    async def start(self, workflow: str, order: Any, about: Run | Batch, *, id: str, **options: Any) -> None:
        """Start *workflow*, one attempt of a run or a batch, with *order*, so that lists find it.

        Raises:
            WorkflowAlreadyStartedError: this attempt was begun before.
            StoreError, EngineFull: see ``rpc_scope``.
        """
        attributes = [SearchAttributePair(FLOCK, about.flock), SearchAttributePair(AGENT, about.agent_name)]
        if about.principal is not None:
            attributes.append(SearchAttributePair(PRINCIPAL, about.principal))
        async with self.rpc_scope():
            await self.client.start_workflow(
                workflow,
                order,
                id=id,
                task_timeout=TASK_TIMEOUT,
                id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
                id_conflict_policy=WorkflowIDConflictPolicy.FAIL,
                search_attributes=TypedSearchAttributes(attributes),
                **options,
            )

    async def _ensure_namespace(self) -> None:
        try:
            found = await self._retrying(self._describe_namespace)
        except RPCError as exc:
            if exc.status in DENIED:
                raise DefinitionError(
                    f"The cluster at {self.address} does not let us into the namespace {self.namespace!r}: "
                    f"{exc.message} Name one that we may use (TEMPORAL_NAMESPACE), and the key or the certificate for "
                    "it (TEMPORAL_API_KEY, TEMPORAL_TLS_CLIENT_CERT_PATH)."
                ) from exc
            if exc.status is not RPCStatusCode.NOT_FOUND:
                raise
            await self._register_namespace()
            return
        kept_for = found.config.workflow_execution_retention_ttl.ToTimedelta()
        logger.info("The namespace %s of %s keeps runs for %s after their end.", self.namespace, self.address, kept_for)

    async def _describe_namespace(self) -> Any:
        return await self.client.workflow_service.describe_namespace(DescribeNamespaceRequest(namespace=self.namespace))

    async def _register_namespace(self) -> None:
        command = (
            f"temporal operator namespace create -n {self.namespace} --retention {RETENTION.days}d "
            f"--address {self.address}"
        )
        keeps = Duration()
        keeps.FromTimedelta(RETENTION)
        wanted = RegisterNamespaceRequest(namespace=self.namespace, workflow_execution_retention_period=keeps)
        try:
            await self.client.workflow_service.register_namespace(wanted)
        except RPCError as exc:
            if exc.status in DENIED:
                raise DefinitionError(
                    f"The cluster at {self.address} has no namespace {self.namespace!r}, and none may be made from "
                    f"here. Make it with: {command}"
                ) from exc
            if exc.status is not RPCStatusCode.ALREADY_EXISTS:
                raise
        await self._retrying(self._describe_namespace, is_new=True)

    async def _ensure_search_attributes(self) -> None:
        try:
            missing = await self._retrying(self._missing_attributes, is_new=True)
        except RPCError as exc:
            if exc.status not in DENIED:
                raise
            # Where only an administrator may look, somebody may have made them.
            logger.warning(
                "Whether the namespace %s has the search attributes by which runs are found cannot be seen from here. "
                "If it has not, runs are refused; make them with: %s",
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
                    f"The namespace {self.namespace!r} has no search attributes {', '.join(missing)}, by which runs "
                    f"are found, and none may be made from here. Make them with: "
                    f"{self._commands_for(missing)}"
                ) from exc
            if exc.status is not RPCStatusCode.ALREADY_EXISTS:  # another process makes them too
                raise
        while await self._missing_attributes():  # noqa: ASYNC110 - the cluster tells nobody
            await asyncio.sleep(0.1)

    def _commands_for(self, names: Iterable[str]) -> str:
        options = f"--type Keyword -n {self.namespace} --address {self.address}"
        return "; ".join(f"temporal operator search-attribute create --name {name} {options}" for name in names)

    async def _missing_attributes(self) -> list[str]:
        wanted = ListSearchAttributesRequest(namespace=self.namespace)
        found = await self.client.operator_service.list_search_attributes(wanted)
        return [name for name in SEARCH_ATTRIBUTES if name not in found.custom_attributes]

    async def _retrying(self, call: Callable[[], Any], *, is_new: bool = False) -> Any:
        """What *call* gives; a namespace that *is_new* may not be known everywhere for a few seconds."""
        while True:
            try:
                return await call()
            except RPCError as exc:
                if not is_new or exc.status is not RPCStatusCode.NOT_FOUND:
                    raise
            await asyncio.sleep(0.1)
