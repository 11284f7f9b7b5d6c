"""The formats of tables. HTTP, its client, programs and the command line share this list."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from flock.errors import InvalidData
from flock.extras import pip_install

EXCEL_TYPE = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"


class Format(NamedTuple):
    """A format of rows and results.

    Attributes:
        name: in ``?format=`` and ``--format``.
        endings: of file names, optionally followed by ``.gz``.
        extra, packages: the extra of this distribution that it needs, and the packages in it that read and write it.
    """

    name: str
    media_type: str
    endings: tuple[str, ...]
    extra: str = ""
    packages: tuple[str, str] = ("", "")

    def check_installed(self, *, is_read: bool) -> None:
        """Raise InvalidData if it needs a package that is not installed."""
        package = self.packages[not is_read]
        if package and find_spec(package) is None:
            raise InvalidData.of(f"{self.name} needs the extra flockapi[{self.extra}]: {pip_install(package)}")


#: By name. The first one is the default of downloads.
FORMATS = {
    each.name: each
    for each in (
        Format("json", "application/json", (".json",)),
        Format("ndjson", "application/x-ndjson", (".ndjson", ".jsonl")),
        Format("csv", "text/csv", (".csv",)),
        Format("tsv", "text/tab-separated-values", (".tsv", ".tab")),
        Format("xlsx", EXCEL_TYPE, (".xlsx",), "excel", ("openpyxl", "xlsxwriter")),
        Format("parquet", "application/vnd.apache.parquet", (".parquet",), "parquet", ("pyarrow", "pyarrow")),
    )
}
BY_ENDING = {ending: each for each in FORMATS.values() for ending in each.endings}
BY_MEDIA_TYPE = {each.media_type: each for each in FORMATS.values()}
ENDINGS = ", ".join(BY_ENDING)


def format_of(path: Path) -> Format | None:
    """Return the format of a file, by the ending of its name before ``.gz``, or None if it is unknown."""
    return BY_ENDING.get(suffix_of(path))


def suffix_of(path: Path) -> str:
    """Return the suffix of a file name in lower case, before ``.gz``, or ""."""
    return (path.with_suffix("") if is_gzipped(path) else path).suffix.lower()


def is_gzipped(path: Path) -> bool:
    return path.suffix.lower() == ".gz"


def each_row(rows: Any) -> Any:
    """Return the rows of a data frame of pandas or polars as mappings, without missing values; others as they are."""
    if hasattr(rows, "iter_rows"):  # polars
        found = rows.iter_rows(named=True)
    elif hasattr(rows, "itertuples"):
        names = list(map(str, rows.columns))
        found = (dict(zip(names, values, strict=True)) for values in rows.itertuples(index=False, name=None))
    else:
        return rows
    return ({name: _plain(value) for name, value in row.items() if not is_missing(value)} for row in found)


def _plain(value: Any) -> Any:
    """Return a value of pandas or numpy as one of Python."""
    return getattr(value, "isoformat", getattr(value, "tolist", lambda: value))()


def is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or what pandas has for them."""
    is_nan = isinstance(value, float) and value != value
    return is_nan or value is None or type(value).__name__ in ("NAType", "NaTType")
