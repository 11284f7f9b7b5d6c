"""What people import: ``Flock``, ``FlockFactory`` and ``agent``."""

from collections.abc import Mapping, Sequence
from typing import Any

from flock.declared import BatchInputs, DeclaredFlock, FlockFactory, agent

__all__ = ["BatchInputs", "Flock", "FlockFactory", "agent"]


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
        """Serve the agents over HTTP until the process is told to stop. It blocks.

        If others can connect, directly or by a proxy, every request needs a key. If none is named, one is made and
        printed.

        Args:
            port: 0 takes a free one.
            server_name: the title of the pages and of the served specification.
            create_ui: serve the web page, too, at ``/ui``; see ``flockapi.create_app``.
            custom_endpoints: Starlette routes of your own; see ``routes`` of ``flockapi.create_app``.
            api_keys: by name; see ``flockapi.create_app``. If None, ``FLOCK_API_KEYS``.
            allow_anonymous: let everybody in who can connect.
            allowed_hosts, root_path, forwarded_allow_ips: for a server behind a proxy; see
                ``flock.command.server.ServerSettings``.
        """
        # Imported here, so that a program that serves nothing does not load a server.
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
