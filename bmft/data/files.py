"""Examples from a file: CSV, TSV, JSON, JSON lines, Parquet or lines, told apart by the ending.

All text is UTF-8, with or without a byte order mark; lines end in LF or CRLF; blank lines are
skipped. A TSV has no quoting, as GLUE's have not: a tab or the end of a line always ends a field.
A .json is one array of objects; the lines of a .txt are the column `text`.
What cannot be read rightly is refused, with file and line.
"""

import csv
import io
import json
import pathlib
import sys

import pyarrow
import pyarrow.parquet

from bmft.data import table
from bmft.errors import Mistake, nearest

BLANK = (None, "")  # in CSV and TSV an empty field is a missing value


def read(path, columns, *, labelled=True, key="data.train"):
    """The `Table` of a file. columns: a `Columns`; labelled: as for `table.build`.

    key: the config key that named the file. Raises Mistake, with file and line.
    """
    data, lines, names = contents(path, key=key, label=columns.label)
    missing = BLANK if pathlib.Path(path).suffix.lower() in (".csv", ".tsv") else (None,)
    return table.build(
        data, columns, str(path), lines=lines, names=names, labelled=labelled, missing=missing
    )


def contents(path, *, key="data.train", label=None):
    """A whole file: {column: list of values}, line of each row, names of the classes of `label`.

    Lines and names are None where the file has none. Values are str in CSV and TSV; where a JSON
    object lacks a key, None.
    """
    path = pathlib.Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise Mistake(f"{key}={str(path)!r}: unknown ending; known: {', '.join(READERS)}")
    if not path.is_file():
        raise Mistake(f"{key}: no file {str(path)!r}{_neighbour(path)}")
    try:
        data, lines, names = reader(path, label)
    except OSError as error:
        raise Mistake(f"{key}: cannot read {str(path)!r}: {error.strerror or error}") from None
    return data, lines, names


def read_tsv(path, header=None, ragged=None):
    """({column: list of str}, lines) of a TSV. header: its column names if the file has none.

    ragged: a list that takes the line numbers of rows with a wrong number of fields, which are then
    left out (QQP has some); None: they are refused.
    """
    rows, lines = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            rows.append(line.removesuffix("\r").split("\t"))
            lines.append(number)
    return _columns(path, rows, lines, header, ragged, " (a .tsv is read without quoting)")


def _neighbour(path):
    """A file of a similar name in the folder, as the end of a message."""
    if path.is_dir():
        return ", it is a folder"
    if not path.parent.is_dir():
        return f": there is no folder {str(path.parent)!r}"
    names = [file.name for file in path.parent.iterdir() if file.suffix.lower() in READERS]
    return f"; {nearest(path.name, names)}" if names else ""


def _text(path):
    """The decoded text of a file, without its byte order mark."""
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Mistake(f"{path} line 1: the file is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise Mistake(
            f"{path} line {line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _columns(path, rows, lines, header=None, ragged=None, hint=""):
    """Rows of fields as columns; the first row is the header, unless one is given."""
    if header is None:
        if not rows:
            raise Mistake(f"{path} is empty")
        header, rows, lines = [name.strip() for name in rows[0]], rows[1:], lines[1:]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise Mistake(f"{path} line 1: two columns are named {twice[0]!r}")
    wrong = [i for i, row in enumerate(rows) if len(row) != len(header)]
    if wrong and ragged is None:
        i = wrong[0]
        raise Mistake(f"{path} line {lines[i]}: {len(rows[i])} fields, not {len(header)}{hint}")
    if wrong:
        ragged.extend(lines[i] for i in wrong)
        left_out = set(wrong)
        rows = [row for i, row in enumerate(rows) if i not in left_out]
        lines = [line for i, line in enumerate(lines) if i not in left_out]
    fields = zip(*rows, strict=True) if rows else [()] * len(header)
    return {name: list(field) for name, field in zip(header, fields, strict=True)}, lines


def _csv(path, label):
    rows, lines, before = [], [], 0
    limit = csv.field_size_limit(sys.maxsize)  # the default refuses texts beyond 131,072 characters
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            if len(row) > 1 or (row and row[0].strip()):
                rows.append(row)
                lines.append(before + 1)
            before = reader.line_num  # a quoted field may hold line ends
    except csv.Error as error:
        raise Mistake(f"{path} line {before + 1}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    return *_columns(path, rows, lines), None


def _tsv(path, label):
    return *read_tsv(path), None


def _txt(path, label):
    lines = _text(path).split("\n")
    kept = [number for number, line in enumerate(lines, start=1) if line.strip()]
    if not kept:
        raise Mistake(f"{path} is empty")
    return {"text": [lines[number - 1].removesuffix("\r") for number in kept]}, kept, None


def _json(path, label):
    try:
        rows = json.loads(_text(path), object_pairs_hook=_keys_once)
    except json.JSONDecodeError as error:
        where = f"{path} line {error.lineno} column {error.colno}"
        hint = "; JSON lines are a .jsonl" if error.msg == "Extra data" else ""
        raise Mistake(f"{where}: {error.msg}{hint}") from None
    except ValueError as error:
        raise Mistake(f"{path}: {error}") from None
    if not isinstance(rows, list) or not rows:
        kind = "an empty list" if rows == [] else f"a {type(rows).__name__}"
        raise Mistake(f"{path}: {kind}; a .json is one array of objects")
    for row, found in enumerate(rows):
        if not isinstance(found, dict):
            raise Mistake(f"{path} row {row}: a {type(found).__name__}; each is a JSON object")
    return _by_column(rows), None, None


def _jsonl(path, label):
    rows, lines = [], []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_keys_once)
        except json.JSONDecodeError as error:  # its own line number would always be 1
            where = f"{path} line {number} column {error.colno}"
            raise Mistake(f"{where}: {error.msg}") from None
        except ValueError as error:
            raise Mistake(f"{path} line {number}: {error}") from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise Mistake(f"{path} line {number}: a {kind}; each line is one JSON object")
        rows.append(row)
        lines.append(number)
    if not rows:
        raise Mistake(f"{path} is empty")
    return _by_column(rows), lines, None


def _by_column(rows):
    """{key: list of values, None where a row lacks it} of dicts."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _keys_once(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return row


def _parquet(path, label):
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            data = columns_of(file.read(), path)
            return data, None, class_names(file.schema_arrow, label)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise Mistake(f"{path} is no readable Parquet file: {error}") from None


def columns_of(read, path):
    """{column: list of values} of a pyarrow.Table. path: for messages."""
    twice = sorted({name for name in read.column_names if read.column_names.count(name) > 1})
    if twice:
        raise Mistake(f"{path}: two columns are named {twice[0]!r}")
    return {name: read[name].to_pylist() for name in read.column_names}


def class_names(schema, label):
    """Names of the classes of column `label`, where Hugging Face `datasets` wrote the file."""
    try:
        written = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        feature = written["info"]["features"][label]
        return tuple(feature["names"]) if feature["_type"] == "ClassLabel" else None
    except (KeyError, TypeError, ValueError):
        return None  # other tools write other metadata, or none


READERS = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
    ".txt": _txt,
}
