"""Text files: plain, JSON lines or Parquet, packed or not."""

import gzip
import json
import lzma
import zlib
from collections.abc import Sequence
from pathlib import Path

from slicing.families import InputError

KINDS = (".txt", ".jsonl", ".parquet")
FILES = ".txt, .jsonl (both also .gz or .xz) or .parquet"
PACKED = {".gz": gzip.decompress, ".xz": lzma.decompress}


def file_kind(name: str) -> str | None:
    """The suffix that says how to read a file of this name, without that of its packing; None if unknown."""
    stem = name.lower()
    for packing in PACKED:
        if stem.endswith(packing):
            stem = stem.removesuffix(packing)
            return next((kind for kind in KINDS if stem.endswith(kind) and kind != ".parquet"), None)
    return next((kind for kind in KINDS if stem.endswith(kind)), None)


def file_text(path: Path, column: str | None) -> str:
    """The whole text of a file; documents of a `.jsonl` or `.parquet` file joined by a blank line."""
    kind = file_kind(path.name)
    if not path.exists():
        raise InputError(f"there is no text file {str(path)!r}")
    if path.is_dir():
        raise InputError(f"{str(path)!r} is a folder; a text file is needed: {FILES}")
    if kind is None:
        raise InputError(f"the kind of the text file {str(path)!r} is unknown; known are {FILES}")
    if kind == ".parquet":
        documents = _parquet_documents(path, column or "text")
    else:
        text = _decoded(path)
        documents = [text] if kind == ".txt" else _jsonl_documents(path, text, column or "text")
    joined = "\n\n".join(documents)
    if not joined.strip():
        raise InputError(f"the text file {str(path)!r} is empty")
    return joined


def _decoded(path: Path) -> str:
    try:
        data = path.read_bytes()
        unpack = PACKED.get(path.suffix.lower())
        return (unpack(data) if unpack else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the text file {str(path)!r} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise InputError(f"the text file {str(path)!r} can't be read: {error}") from error


def _jsonl_documents(path: Path, text: str, column: str) -> list[str]:
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): strings may hold other line ends
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError also of a number with thousands of digits
            raise InputError(f"{where} is not JSON: {' '.join(str(error).split())}") from error
        _check_column(where, column, list(row) if isinstance(row, dict) else [])
        documents.append(_checked(where, column, row[column]))
    return documents


def _parquet_documents(path: Path, column: str) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    where = f"the text file {str(path)!r}"
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_column(where, column, names)
            if names.count(column) > 1:
                raise InputError(
                    f"{where} has {names.count(column)} columns of the name {column!r}: rename all but one"
                )
            values = file.read(columns=[column]).column(column).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:  # KeyError: a column of columns
        raise InputError(f"{where} can't be read: {' '.join(str(error).split())}") from error
    return [_checked(f"row {row} of {str(path)!r}", column, value) for row, value in enumerate(values, start=1)]


def _check_column(where: str, column: str, there: Sequence[str]) -> None:
    if column not in there:
        raise InputError(
            f"{where} has no field {column!r} but {', '.join(there) or 'none'}: name the field with the text"
        )


def _checked(where: str, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where} has {type(value).__name__} in the field {column!r}, not text")
    try:
        value.encode("utf-8")  # JSON's escapes can write half a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise InputError(f"{where} has {half} in the field {column!r}, half of a character: repair the text") from error
    return value
