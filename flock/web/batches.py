"""The request of ``POST /run/batch``: its rows and its options. The format of its results."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flock.declared import DeclaredFlock
from flock.engine.rowchecks import BatchCheck
from flock.errors import DefinitionError, InvalidData
from flock.formats import BY_MEDIA_TYPE, FORMATS, Format, format_of
from flock.rows.dialect import CSVDialect
from flock.rows.files import read_file, rows_in
from flock.rows.tables import MAX_EXPANSION, RowMapping, json_rows
from flock.runs import BatchOptions, Items
from flock.runs.records import shown_as
from flock.web.body import Body
from flock.web.negotiation import preferred
from flock.web.options import AppOptions
from flock.web.requests import query_of
from flock.web.responses import JSONResponse
from flock.web.wire import (
    BATCH_REQUEST,
    FlockBatchCheck,
    FlockBatchCheckRow,
    FlockBatchRequest,
    ResultsQuery,
    UploadQuery,
)


def options_in_body(request: Request, sent: bytes) -> FlockBatchRequest:
    """Parse a JSON body. Raises InvalidData if it is invalid, or if the query has options, which would be ignored.

    Defaults in the query are accepted, since generated clients send them.
    """
    query = query_of(request, UploadQuery, agent_name="")
    if query != UploadQuery(agent_name="", dry_run=query.dry_run):
        raise InvalidData.of(
            "With a JSON body, put the options into the body. Options in the query are for files of rows, also for a "
            "JSON array of rows, if the query has ?agent_name=."
        )
    return BATCH_REQUEST.decode(sent)


def row_mapping_of(
    flock: DeclaredFlock, options: AppOptions, batch_request: FlockBatchRequest, body: Body
) -> RowMapping:
    """Return the mapping from the rows of a batch to inputs. Raises InvalidData, AgentNotFound."""
    return flock.row_mapping(
        batch_request.agent_name,
        batch_request.static_inputs,
        batch_request.input_mapping,
        batch_request.on_extra,
        lambda: MAX_EXPANSION * max(options.max_body_bytes, body.received_bytes),
    )


def rows_of(
    options: AppOptions, format_: Format | None, batch_request: FlockBatchRequest, body: Body, row_mapping: RowMapping
) -> Items:
    """Return the rows of a batch, not read yet. Raises InvalidData. Reading them may raise other errors.

    *format_* is that of a body with rows; None if the body is the request itself.
    """
    chunks: AsyncIterator[bytes] = body.upload()
    is_sent = format_ is not None
    if format_ is None:
        if not isinstance(batch_request.batch_inputs, str):
            return json_rows(batch_request.batch_inputs, row_mapping)
        if options.csv_dir is None:
            detail = (
                "This server does not read files of its own. Send the rows as a list of objects here, or the file as a "
                "text/csv body. The server's owner can allow one folder with --csv-dir (csv_dir= in Python)."
            )
            raise InvalidData.of(detail, "/batch_inputs")
        chunks = read_file(Path(options.csv_dir), batch_request.batch_inputs, options.max_upload_bytes)
        format_ = format_of(Path(batch_request.batch_inputs)) or FORMATS["csv"]
    dialect = _dialect_of(batch_request)
    # A file below csv_dir was not sent by the client, so its column names do not count against the size of the body.
    limits = {"max_row_bytes": options.max_body_bytes, "max_depth": options.max_json_depth}
    return rows_in(format_.name, chunks, row_mapping, dialect, **limits, are_names_counted=is_sent)


def _dialect_of(options: FlockBatchRequest | ResultsQuery) -> CSVDialect:
    """Return the dialect of a CSV file. Raises InvalidData if the encoding is unknown."""
    try:
        return msgspec.convert(options, CSVDialect, from_attributes=True)
    except DefinitionError as exc:
        raise InvalidData.of(str(exc), "/encoding") from exc


def batch_options(batch_request: FlockBatchRequest) -> BatchOptions:
    """Return the options of the batch. Raises InvalidData if the server should write a file."""
    if batch_request.write_to_csv is not None:
        detail = "This server does not write files for a client. Omit write_to_csv, and download the results over HTTP."
        raise InvalidData.of(detail, "/write_to_csv")
    return msgspec.convert(batch_request, BatchOptions, from_attributes=True)


def results_format(request: Request, query: ResultsQuery) -> tuple[Format, CSVDialect]:
    """Return the format of a download, which is ``?format=``, or the preferred one in ``Accept``, and its dialect.

    Raises HTTPException 406, and InvalidData if it needs a package that is not installed, or the encoding is unknown.
    """
    named, dialect = query.format, _dialect_of(query)
    best = preferred(request.headers.get("accept", ""), list(BY_MEDIA_TYPE))
    if best is None and isinstance(named, msgspec.UnsetType):
        raise HTTPException(406, f"Results are available as {', '.join(BY_MEDIA_TYPE)}. Accept one of them.")
    format_ = BY_MEDIA_TYPE[best or ""] if isinstance(named, msgspec.UnsetType) else FORMATS[named]
    format_.check_installed(is_read=False)
    if format_.name in ("csv", "tsv"):
        format_ = format_._replace(media_type=f"{format_.media_type}; charset={dialect.charset}")
    return format_, dialect


def check_response(check: BatchCheck, row_mapping: RowMapping) -> Response:
    """Return the errors for which a batch would be rejected, or its first rows as they would be stored."""
    rows = [shown_as(FlockBatchCheckRow, row, extra=extra) for row, extra, *_ in check.rows]
    return JSONResponse(shown_as(FlockBatchCheck, check, columns=list(row_mapping.columns), rows=rows))
