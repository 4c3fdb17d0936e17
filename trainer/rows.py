"""Rows of files or of a hub dataset, each value with the type that it has there.

Owns which files are read, how, and what is refused. Does not depend on tokenizers or prompts.

Arrow has one type per column, so it would turn ``"2024-03-01"`` into a time, and 3 into 3.0 if another row has 2.5. A
row of a JSON file therefore stays JSON text until it is used. What is read is kept in the cache of ``datasets`` under a
digest of the files' bytes.
"""

import codecs
import glob
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetsError

from common.config import Data
from common.errors import UserError, one_line

FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
EXPECTED_PATH = "expected a JSON, JSONL or Parquet file, a glob of them, or the name of a hub dataset"
_JSON = "a row as JSON text"  # a name that no column has
_FEATURES = Features({_JSON: Value("large_string")})


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All rows, on disk. ``dataset`` has either the rows' own columns or, for JSON, one column with their text."""

    dataset: Dataset
    fingerprint: str  # other rows have another one
    is_json: bool

    def __len__(self) -> int:
        return len(self.dataset)

    def has_column(self, column: str) -> bool:
        """Whether any row has it."""
        return column in self._columns() or (self.is_json and any(column in row for row in self._all()))

    def column_names(self) -> list[str]:
        """The columns of the first rows, sorted."""
        return sorted(self._columns())

    def first(self, num_rows: int) -> "Rows":
        return replace(self, dataset=self.dataset.select(range(min(num_rows, len(self)))))

    def _columns(self) -> set[str]:
        if not self.is_json:
            return {*self.dataset.column_names}
        return {key for row in islice(self._all(), 100) for key in row}

    def _all(self) -> Iterator[dict[str, Any]]:
        return (row for batch in self.dataset.iter(1000) for row in rows_of(batch))


def rows_of(batch: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """The rows of a batch of ``Rows.dataset``. Numbers with a point are Decimal if the file is JSON."""
    if _JSON in batch:
        return [_parsed(text) for text in batch[_JSON]]
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def answer_text(value: object, place: str) -> str | None:
    """An answer as text: text and whole numbers as they are, or the content of a list of one assistant message.

    None for null and for the NaN that pandas writes in gaps. A whole number in a column of floats has no point. Raises
    UserError that starts with ``place`` for everything else.
    """
    match value:
        case None | str():
            return value
        case float() if math.isnan(value):
            return None
        case float() if value.is_integer():
            return str(int(value))
        case bool():
            pass
        case int() | float() | Decimal():
            return str(value)
        case [{"role": "assistant", "content": str(content)}]:
            return content
        case date() | time() | timedelta():
            raise UserError(f"{place} holds the time {value}; expected text, which JSON files named by path keep")
    raise UserError(
        f"{place} holds {type(value).__name__} {_short(value)}; expected text, a number or a list of one assistant "
        "message"
    )


def load_rows(config: Data, key: str) -> Rows:
    """The rows of a path, from local files or from the hub. Raises UserError naming file, line and column."""
    files = _local_files(config.path, f"{key}.path")
    try:
        rows = _of_files(files, config, f"{key}.path") if files else _of_name(config)
    # `datasets` raises its own errors, Arrow's and the hub's here, and StopIteration for a file without rows.
    except (DatasetsError, OSError, ValueError, StopIteration) as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        where = "" if files or os.path.isdir(config.path) else " from the Hugging Face hub"
        reason = one_line(error.__cause__ or error or "no rows")
        raise UserError(f"{key}.path: can't read {config.path!r}{where}: {reason}; {EXPECTED_PATH}") from error
    if len(rows) == 0:
        raise UserError(f"{key}.path: {config.path!r} has no rows, expected at least one")
    return rows


def _of_name(config: Data) -> Rows:
    """A hub dataset, or a folder with one. ``datasets`` chooses the types."""
    dataset = load_dataset(os.path.expanduser(config.path), config.name, split=config.split)
    return Rows(dataset=dataset, fingerprint=dataset._fingerprint, is_json=False)


def _of_files(files: list[Path], config: Data, key: str) -> Rows:
    digest = _digest(files)
    if FORMATS[files[0].suffix] == "json":
        dataset = Dataset.from_generator(
            _json_texts, features=_FEATURES, gen_kwargs={"files": list(map(str, files)), "key": key, "digest": digest}
        )
        (part,) = ReadInstruction.from_spec(config.split).to_absolute({"train": len(dataset)})
        dataset = dataset.select(range(part.from_ or 0, len(dataset) if part.to is None else part.to))
        return Rows(dataset=dataset, fingerprint=digest, is_json=True)
    names = [glob.escape(str(file)) for file in files]  # `datasets` takes names as patterns
    # By default the cache goes by names and times, and a file that was replaced may have both.
    cache = Path(datasets.config.HF_DATASETS_CACHE) / digest
    dataset = load_dataset("parquet", data_files=names, split=config.split, cache_dir=str(cache))
    return Rows(dataset=dataset, fingerprint=digest, is_json=False)


def _json_texts(files: list[str], key: str, digest: str) -> Iterator[dict[str, str]]:
    """Each row's text. ``digest`` makes ``datasets`` run this again when the files have changed."""
    for file in files:
        with open(file, "rb") as opened:
            start = opened.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
        rows = _texts_of_list(file, key) if start == b"[" else _texts_of_lines(file, key)
        yield from ({_JSON: text} for text in rows)


def _texts_of_lines(file: str, key: str) -> Iterator[str]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            text = _decoded(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, file, key, first_line=number)
            if text.strip():
                _checked(text, file, key, first_line=number)
                yield text.strip()


def _texts_of_list(file: str, key: str) -> Iterator[str]:
    text = _decoded(Path(file).read_bytes().removeprefix(codecs.BOM_UTF8), file, key, first_line=1)
    _checked(text, file, key, first_line=1)
    decoder, place = json.JSONDecoder(), text.index("[") + 1
    while (place := _skip(text, place, " \t\r\n,")) < len(text) and text[place] != "]":
        _, end = decoder.raw_decode(text, place)
        yield text[place:end]
        place = end


def _checked(text: str, file: str, key: str, *, first_line: int) -> None:
    """Raise UserError with the place of what is no JSON, or no row."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{key}: {file}: line {line}, column {error.colno}: {error.msg}; expected JSON") from error
    except RecursionError as error:
        raise UserError(f"{key}: {file}: line {first_line}: expected JSON that is nested less deeply") from error
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            place = f"line {first_line}" if len(rows) == 1 else f"row {number}"
            raise UserError(f"{key}: {file}: {place} holds {_short(row)}, expected an object with a value per column")


def _decoded(content: bytes, file: str, key: str, *, first_line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = first_line + before.count(b"\n"), error.start - before.rfind(b"\n")
        raise UserError(
            f"{key}: {file}: line {line}, column {column}: byte 0x{content[error.start]:02x} is not UTF-8; expected a "
            "file in UTF-8"
        ) from error


def _parsed(text: str) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(text, parse_float=Decimal)
    return row


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _digest(files: list[Path]) -> str:
    digests = []
    for file in files:
        with file.open("rb") as opened:
            digests.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _local_files(path: str, key: str) -> list[Path]:
    """The files of a path, sorted; none for a hub name or a folder, which ``datasets`` resolves itself.

    A path is a pattern only if no file has that name. A name that looks like a path but matches no file is refused at
    once and not looked up on the hub.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        return []
    is_glob = any(character in path for character in "*?[")
    files = [Path(expanded)] if os.path.isfile(expanded) else sorted(map(Path, glob.glob(expanded, recursive=True)))
    files = [file for file in files if file.is_file()]
    if not files:
        looks_local = is_glob or path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).suffix in FORMATS
        if looks_local:
            raise UserError(f"{key}: no such file: {path!r}; {EXPECTED_PATH}")
        return []
    suffixes = {file.suffix for file in files}
    if len(suffixes) > 1 or not suffixes <= FORMATS.keys():
        raise UserError(f"{key}: {path!r} names {sorted(suffixes)} files, expected one of {list(FORMATS)}")
    for file in files:
        if file.stat().st_size == 0:
            raise UserError(f"{key}: {str(file)!r} is empty, expected at least one row")
    return files
