"""The format of CSV files: delimiter, decimal separator and encoding, with hints for files in another format."""

import codecs
import csv
import re
from collections.abc import Collection, Sequence
from encodings.aliases import aliases
from urllib.parse import quote

import msgspec

from flock.errors import DefinitionError

#: Supported encodings, by their names in Python. Other codecs decompress data, are slow, or are not for text. Unknown
#: names are not looked up, because Python caches each of them without a limit.
ENCODINGS = (
    *("utf_8", "utf_8_sig", "utf_16", "utf_16_le", "utf_16_be", "latin_1", "iso8859_2", "iso8859_15"),
    *("cp1250", "cp1251", "cp1252", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258"),
    *("cp437", "cp850", "cp874", "koi8_r", "mac_roman"),
    *("shift_jis", "cp932", "euc_jp", "gbk", "gb18030", "big5", "euc_kr", "cp949"),
)
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
#: Max cells and characters of a header that are checked for another delimiter.
MAX_TRIED_CELLS = 10_000
MAX_TRIED_CHARS = 64 * 1024
NO_DIGITS = str.maketrans("", "", "0123456789eE+-")
#: Digits with any separators that people use.
LOOSE_NUMBER = r"[+-]?[0-9][0-9.,'\u2019_\s]*([eE][+-]?[0-9]+)?"
#: Numbers such as 1,234 and 1.234, whose meaning depends on the country.
AMBIGUOUS = r"[+-]?[1-9][0-9]{0,2}[.,][0-9]{3}"


class CSVDialect(msgspec.Struct, frozen=True, kw_only=True):
    """The format of a CSV file.

    Args:
        delimiter: the character between cells.
        decimal: the decimal separator, "." or ",". Thousands separators are not supported.
        encoding: any of Python's names for one of ``ENCODINGS``, such as "utf-8", "utf-16" or "windows-1252".
            A byte order mark is skipped, and written only by "utf-8-sig" and "utf-16".

    Raises: DefinitionError if one of them is invalid.
    """

    delimiter: str = ","
    decimal: str = "."
    encoding: str = "utf-8"

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise DefinitionError(f"delimiter must be one character, such as ; or | or a tab, not {self.delimiter!r}.")
        if self.decimal not in (".", ","):
            raise DefinitionError(f'decimal must be "." or ",", not {self.decimal[:10]!r}.')
        if self.codec not in ENCODINGS:
            known = ", ".join(name.replace("_", "-") for name in ENCODINGS)
            raise DefinitionError(f"encoding must be one of {known}, not {self.encoding[:100]!r}.")

    @property
    def codec(self) -> str:
        name = re.sub(r"[^a-z0-9]+", "_", self.encoding[:100].lower())
        return aliases.get(name, name)

    @property
    def charset(self) -> str:
        """The encoding as a parameter of ``Content-Type``."""
        return self.codec.removesuffix("_sig").replace("latin_1", "iso-8859-1").replace("_", "-")

    def decoder(self) -> codecs.IncrementalDecoder:
        return codecs.getincrementaldecoder("utf-8-sig" if self.codec == "utf_8" else self.codec)()

    def encoder(self) -> codecs.IncrementalEncoder:
        """Return an encoder that writes "?" for a character that the encoding does not have."""
        return codecs.getincrementalencoder(self.codec)("replace")

    def decoding_problem(self, first_bytes: bytes) -> str:
        """Return an error message for a file that cannot be decoded, based on its first bytes."""
        if self.charset == "utf-8" and first_bytes.startswith((b"\xff", codecs.BOM_UTF16_BE)):
            return self._wrong_encoding("UTF-16", "utf-16")
        if self.charset == "utf-8":
            hint = _option("encoding", "cp1252")
            return f'This is not UTF-8. Save the file as "CSV UTF-8", or set the encoding, such as {hint}.'
        return f'This is not {self.encoding}. Save the file as "CSV UTF-8", or set the encoding.'

    def format_problem(self, line: str) -> str:
        """Return an error message if the header seems to have another encoding or delimiter, otherwise ""."""
        if "\x00" in line:
            return self._wrong_encoding("UTF-16", "utf-16-be" if line.startswith("\x00") else "utf-16-le")
        for delimiter in self._other_delimiters(line):
            try:
                cells = next(csv.reader([line[:MAX_TRIED_CHARS]], delimiter=delimiter, strict=True), [])
            except csv.Error:
                continue
            if len(cells) > 1:
                return self._wrong_delimiter(delimiter)
        return ""

    def delimiter_problem(self, header: Sequence[str], known: Collection[str], *, is_refused: bool) -> str:
        """Return an error message for a header without a *known* name (casefolded) if another delimiter fits better.

        Otherwise return "". If the header is a single column and *is_refused* anyway, any delimiter in it counts.
        """
        text = self.delimiter.join(header)
        for delimiter in self._other_delimiters(text):
            cells = text.split(delimiter, MAX_TRIED_CELLS)[:MAX_TRIED_CELLS]
            finds = any(cell.strip(' "').casefold() in known for cell in cells)
            if finds or (is_refused and len(header) == 1):
                return self._wrong_delimiter(delimiter)
        return ""

    def _other_delimiters(self, text: str) -> Sequence[str]:
        """Return the other delimiters in *text*, the most frequent one first."""
        counts = {other: text.count(other) for other in DELIMITERS if other != self.delimiter}
        return sorted((other for other in counts if counts[other]), key=lambda other: -counts[other])

    def _wrong_delimiter(self, other: str) -> str:
        ours = DELIMITERS.get(self.delimiter, repr(self.delimiter))
        return (
            f"The columns seem to be separated by {DELIMITERS[other]}, not {ours}. "
            f"Read it with {_option('delimiter', other)}."
        )

    def _wrong_encoding(self, name: str, encoding: str) -> str:
        hint = _option("encoding", encoding)
        label = "UTF-8" if self.charset == "utf-8" else self.encoding
        return f'This is not {label}: it looks like {name}. Save the file as "CSV UTF-8", or read it with {hint}.'

    def json_number(self, text: str) -> str:
        """Convert a number in this dialect to JSON. Return *text* unchanged if it is not a number.

        Raises ValueError, with a hint for the user, if it is a number in another dialect.
        """
        separators = text.translate(NO_DIGITS)
        if separators == self.decimal:
            return text.replace(",", ".")
        if not separators or re.fullmatch(LOOSE_NUMBER, text) is None:
            return text
        without = "write the number without thousands separators"
        if self.decimal == "." and separators == ",":
            hint = f"read the file with {_option('decimal', ',')}"
            if re.fullmatch(AMBIGUOUS, text):
                raise ValueError(
                    "The comma in this number may be a decimal comma or a thousands separator. "
                    f"If it is a decimal comma, {hint}. If not, {without}."
                )
            raise ValueError(f"This number has a decimal comma. Write it with a point, or {hint}.")
        if self.decimal == "," and separators == ".":
            raise ValueError(f'This number has a point, but decimal="," is set. Write it with a comma, or {without}.')
        raise ValueError(f"This number has thousands separators. Write it without them, such as 1234{self.decimal}5.")


def _option(name: str, value: str) -> str:
    """Return how to set an option in Python, on the command line and over HTTP."""
    shown = value.replace("\t", r"\t")
    return f'{name}="{shown}" (--{name} "{shown}", ?{name}={quote(value)})'
