"""The export of traces by our own server, as the ``OTEL_*`` variables say. A host exports its own traces."""

import logging
import os
import threading
from collections.abc import Callable

from flock.extras import pip_install

logger = logging.getLogger("flock.server")

#: Traces are exported if one of these is set, or ``OTEL_TRACES_EXPORTER``.
ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: How long the last spans of a process may take, in seconds.
FLUSH_TIMEOUT_S = 5.0

_shutdowns: list[Callable[[], None]] = []


def export_traces(service_name: str) -> None:
    """Export the spans of this process in the background, if ``OTEL_*`` variables name exporters.

    The SDK reads the others: of the sampler, the resource, the batches and the exporter. A problem is logged as a
    WARNING. No effect if the program has set a tracer provider, as ``opentelemetry-instrument`` does.
    """
    listed = os.environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if any(map(os.environ.get, ENDPOINTS)) else "none")
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    otlp = f"otlp_proto_{'grpc' if protocol == 'grpc' else 'http'}"
    names = dict.fromkeys(otlp if name == "otlp" else name for name in map(str.strip, listed.split(",")))
    if not (wanted := [name for name in names if name not in ("", "none")]):
        return
    try:
        from importlib.metadata import entry_points

        from opentelemetry import trace
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return
        found = {each.name: each for each in entry_points(group="opentelemetry_traces_exporter")}
        if missing := [name for name in wanted if name not in found]:
            raise ImportError(f"no package has the exporter {missing[0]!r}")
        exporters = [found[name].load()() for name in wanted]
        resource = Resource.create({"service.name": service_name}).merge(OTELResourceDetector().detect())
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        for exporter in exporters:
            provider.add_span_processor(BatchSpanProcessor(exporter))
        trace.set_tracer_provider(provider)
        _shutdowns.append(provider.shutdown)
    except ImportError as exc:
        install = pip_install("opentelemetry-exporter-otlp-proto-http")
        logger.warning("No traces are exported: %s. Install an exporter with its SDK: %s", exc, install)
    except Exception as exc:  # such as an invalid value of a variable
        logger.warning("No traces are exported: %s: %s", type(exc).__name__, exc)


def end_export() -> None:
    """Export the last spans, but wait no longer than FLUSH_TIMEOUT_S for a receiver that does not respond."""
    while _shutdowns:
        flushing = threading.Thread(target=_shutdowns.pop(), daemon=True)
        flushing.start()
        flushing.join(FLUSH_TIMEOUT_S)
