"""The names that programs import, such as ``Flock``, ``FlockFactory`` and ``agent``."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import flock.store.files  # noqa: F401 - on Windows it says which systems are supported
from flock.agents.agent import agent
from flock.agents.history import History
from flock.agents.messages import Messages
from flock.agents.result import Result
from flock.declared import BatchInputs, DeclaredFlock, FlockFactory, blocking
from flock.files import Audio, Document, File, Image, data_url
from flock.models.models import Model, ModelChoice
from flock.models.prices import Price

if TYPE_CHECKING:
    from flock.rows.scores import ModelScore, Score

__all__ = ["BatchInputs", "Flock", "FlockFactory", "History", "Messages", "Model", "Price", "Result", "agent"]
__all__ += ["Audio", "Document", "File", "Image", "data_url"]


class Flock(DeclaredFlock):
    __doc__ = DeclaredFlock.__doc__

    def start_api(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8344,
        server_name: str = "Flock Server",
        create_ui: bool = False,
        custom_endpoints: Sequence[Any] = (),
        api_keys: Mapping[str, str] | None = None,
        allow_anonymous: bool = False,
        allowed_hosts: Sequence[str] = (),
        root_path: str = "",
        forwarded_allow_ips: str | None = None,
    ) -> None:
        """Serve the agents over HTTP and block until the process receives a stop signal.

        If other machines can connect, directly or through a proxy, every request needs an API key. If there are no
        keys, one is generated and printed.

        Args:
            port: the port to listen on; 0 picks a free one.
            server_name: the title of the web pages and of the served specification.
            create_ui: also serve the web page at ``/ui``; see ``flockapi.create_app``.
            custom_endpoints: additional Starlette routes; see ``routes`` of ``flockapi.create_app``.
            api_keys: API keys by name; see ``flockapi.create_app``. If None, they are read from ``FLOCK_API_KEYS``.
            allow_anonymous: serve everyone who can connect, without a key.
            allowed_hosts, root_path, forwarded_allow_ips: settings for a server behind a proxy; see
                ``flock.command.server.ServerSettings``.
        """
        # Imported here so that a program that does not serve does not load the server.
        from flock.command.server import ServerSettings, serve_flock
        from flock.web.options import AppOptions

        settings = ServerSettings(
            host=host,
            port=port,
            app=AppOptions(server_name=server_name, create_ui=create_ui, routes=custom_endpoints, api_keys=api_keys),
            allow_anonymous=allow_anonymous,
            allowed_hosts=allowed_hosts,
            root_path=root_path,
            forwarded_allow_ips=forwarded_allow_ips,
        )
        serve_flock(self, settings)

    async def evaluate_async(
        self,
        agent_name: str,
        rows: BatchInputs,
        expect: Sequence[str] | Mapping[str, str],
        *,
        scores: "Mapping[str, Score] | None" = None,
        models: Sequence[ModelChoice] = (),
        **options: Any,
    ) -> "list[ModelScore]":
        """Run an agent for many inputs, and compare its outputs with expected values.

        Args:
            rows: as in ``run_batch_async``. Other rows are written to a temporary file first.
            expect: the columns with expected values, each named like its output; or outputs by columns.
            scores: functions of an expected value and an output, by output, which return a number and may be async; see
                ``flock.rows.scores``. By default lists have ``set_f1``, and others ``exact``.
            models: models in place of the flock's. With several, all run the same rows.
            options: ``store``, an SQLite file whose results the next call takes, by default a temporary one;
                ``max_workers``, ``timeout_s``, ``max_cost``, ``max_failures``, ``dedupe``, ``limit``, ``sample``
                and ``seed`` as in ``BatchOptions``; ``input_mapping``, ``on_extra``, ``on_invalid`` and ``dialect``, a
                ``CSVDialect``.

        Returns: the scores of each model.

        Raises: as ``run_batch_async``; what a score raises.

        Cancellation: finished rows are kept in the store.
        """
        from flock.command.evaluate import evaluate_rows

        return await evaluate_rows(self, agent_name, rows, expect, scores or {}, models, **options)

    #: ``evaluate_async`` for scripts: blocks until the scores are available.
    evaluate = blocking(evaluate_async)
