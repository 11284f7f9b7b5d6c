"""What a request asks for with ``POST /run/batch``."""

from collections.abc import Mapping
from pathlib import Path

from starlette.requests import Request

from flock.agents.agent import Agent
from flock.agents.workflow import result_names
from flock.errors import AgentNotFound, DefinitionError, FieldError, InvalidData
from flock.rows.dialect import CSVDialect
from flock.rows.tables import MAX_EXPANSION, RowMapping, csv_rows, json_rows, ndjson_rows, read_file
from flock.runs import BatchOptions, Items
from flock.web.body import Body
from flock.web.options import AppOptions
from flock.web.requests import query_of
from flock.web.wire import BATCH_REQUEST, FlockBatchRequest, UploadQuery

__all__ = ["BATCH_TYPES", "agent_of", "batch_options", "options_in_body", "row_mapping_of", "rows_of"]

#: What the body of ``POST /run/batch`` may be.
BATCH_TYPES = ("application/json", "text/csv", "application/x-ndjson")


def options_in_body(request: Request, sent: bytes) -> FlockBatchRequest:
    """What a JSON body says. Raises InvalidData, also if the query has options, which would be ignored.

    Clients that are generated from the specification send its defaults.
    """
    query = query_of(request, UploadQuery, agent_name="")
    if query != UploadQuery(agent_name="", dry_run=query.dry_run):
        detail = "A JSON body says itself how it is meant; the query does so for text/csv and application/x-ndjson."
        raise InvalidData([FieldError(detail=detail, pointer="")])
    return BATCH_REQUEST.decode(sent)


def agent_of(agents: Mapping[str, Agent], name: str) -> Agent:
    """Raises AgentNotFound."""
    if name not in agents:
        raise AgentNotFound(name, list(agents))
    return agents[name]


def row_mapping_of(
    agents: Mapping[str, Agent], options: AppOptions, wanted: FlockBatchRequest, body: Body
) -> RowMapping:
    """How the rows of a batch become inputs. Raises InvalidData, AgentNotFound."""

    def max_static_bytes() -> int:
        return MAX_EXPANSION * max(options.max_body_bytes, body.received_bytes)

    return RowMapping(
        agent_of(agents, wanted.agent_name).input,
        wanted.static_inputs,
        wanted.input_mapping,
        max_static_bytes,
        on_extra=wanted.on_extra,
        result_names=result_names(wanted.agent_name, agents),
    )


def rows_of(
    options: AppOptions, media_type: str, wanted: FlockBatchRequest, body: Body, row_mapping: RowMapping
) -> Items:
    """The rows of a batch, none of which is read yet. Raises InvalidData; reading them raises more."""
    chunks = body.upload()
    limits = {"max_row_bytes": options.max_body_bytes, "max_depth": options.max_json_depth}
    if media_type == "application/x-ndjson":
        return ndjson_rows(chunks, row_mapping, **limits)
    if media_type == "application/json":
        if not isinstance(wanted.batch_inputs, str):
            return json_rows(wanted.batch_inputs, row_mapping)
        if options.csv_dir is None:
            detail = (
                "Send the rows themselves: a list of objects here, or the file as a body of text/csv. No file of the "
                "server is read on a client's word, unless its owner names a folder for them (csv_dir=, --csv-dir)."
            )
            raise InvalidData([FieldError(detail=detail, pointer="/batch_inputs")])
        chunks = read_file(Path(options.csv_dir), wanted.batch_inputs, options.max_upload_bytes)
    try:
        dialect = CSVDialect(delimiter=wanted.delimiter, decimal=wanted.decimal, encoding=wanted.encoding)
    except DefinitionError as exc:
        raise InvalidData([FieldError(detail=str(exc), pointer="")]) from exc
    # A file below csv_dir is not what the client sent, so its names are not measured by that.
    return csv_rows(chunks, row_mapping, dialect, **limits, are_names_counted=media_type == "text/csv")


def batch_options(wanted: FlockBatchRequest) -> BatchOptions:
    """Raises InvalidData."""
    if wanted.write_to_csv is not None:
        detail = "No file of the server is written on a client's word. Leave it out, and read the results over HTTP."
        raise InvalidData([FieldError(detail=detail, pointer="/write_to_csv")])
    return BatchOptions(
        max_workers=wanted.max_workers,
        parallel=wanted.parallel,
        return_errors=wanted.return_errors,
        box_results=wanted.box_results,
        timeout_s=wanted.timeout_s,
    )
