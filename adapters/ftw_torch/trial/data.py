"""A user's text from JSONL or CSV files: every defect is an error that names the file, the line and the remedy."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import TrialError

__all__ = ["MOST_ROWS", "Row", "Table", "read", "refuse_overlap", "refuse_unequal", "without_repeats"]

MOST_ROWS = 20_000  # rows used of one file
KINDS = (("prompt", "completion"), ("text",))  # the columns that a file must have: one of these sets
CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Row:
    """One sample: its text, or a prompt with its completion, and its label if there is one."""

    text: str
    completion: str | None
    label: str | int | float | None
    line: int

    @property
    def key(self) -> str:
        """The text without regard to white space: two rows with the same key are the same sample."""
        return " ".join(f"{self.text} {self.completion or ''}".split())


@dataclass(frozen=True)
class Table:
    """The rows of one file; ``columns`` are those that the trial reads."""

    path: str
    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read(path: str, *, most: int = MOST_ROWS) -> Table:
    """Read a file of samples.

    Parameters
    ----------
    path : str
        JSONL (``.jsonl``, ``.ndjson``, ``.json``) or CSV (``.csv``, ``.tsv``), in UTF-8; Parquet, Arrow and compressed
        JSONL are read by the ``datasets`` package where it is installed. Columns: ``text``, or ``prompt`` and
        ``completion``; ``label`` beside ``text`` for a classifier. Other columns are ignored.
    most : int
        Rows to use; of a longer file a random part, the same at every call.

    Raises
    ------
    TrialError
        If the file is missing, empty, unreadable or not UTF-8, has no text column, or rows with unequal columns.
    """
    file = Path(path)
    if file.is_dir():
        raise TrialError(f"{path}: is a folder; give a JSONL or CSV file")
    if not file.exists():
        raise TrialError(f"{path}: there is no such file")
    try:
        rows = list(_rows(file))
    except UnicodeDecodeError as error:
        raise TrialError(f"{path}: not UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise TrialError(f"{path}: cannot be read: {error}") from None
    if not rows:
        raise TrialError(f"{path}: is empty; it must hold samples, one a line")
    columns = _columns(path, rows)
    made = [_row(path, line, row, columns) for line, row in rows]
    full = [row for row in made if row.text.strip() and (row.completion is None or row.completion.strip())]
    notes = [f"{path}: {len(made) - len(full)} rows without text are left out"] if len(full) < len(made) else []
    if not full:
        raise TrialError(f"{path}: no row has any text in {' and '.join(columns)}")
    if len(full) > most:
        notes.append(f"{path}: a random {most:,} of its {len(full):,} rows are used")
        full = [full[i] for i in sorted(random.Random(0).sample(range(len(full)), most))]
    return Table(path, tuple(full), columns, tuple(notes))


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the line number and the columns of each row."""
    suffix = file.suffix.lower()
    if suffix in CSV_SUFFIXES:
        yield from _csv_rows(file, CSV_SUFFIXES[suffix])
    elif suffix in JSON_SUFFIXES:
        yield from _json_rows(file)
    else:
        yield from _datasets_rows(file)


def _csv_rows(file: Path, delimiter: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with open(file, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, delimiter=delimiter)
            for row in reader:
                if None in row or None in row.values():
                    have = sum(value is not None for name, value in row.items() if name is not None)
                    have += len(row.get(None, ()))
                    raise TrialError(
                        f"{file}: unequal columns: the row that ends in line {reader.line_num} has {have} fields, the "
                        f"heading {len(reader.fieldnames or ())}"
                    )
                yield reader.line_num, row
    finally:
        csv.field_size_limit(limit)


def _json_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(file, encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TrialError(f"{file}: line {number} is not JSON ({error}); one object a line") from None
            if not isinstance(row, dict):
                raise TrialError(f"{file}: line {number} is a {type(row).__name__}; expected an object with columns")
            yield number, row


def _datasets_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    known = f"known: {', '.join((*JSON_SUFFIXES, *CSV_SUFFIXES))}"
    try:
        import datasets
    except ImportError:
        raise TrialError(
            f"{file}: {file.suffix or 'no suffix'} is read by `datasets`, not installed; {known}"
        ) from None
    kind = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".gz": "json", ".zst": "json"}
    if file.suffix.lower() not in kind:
        raise TrialError(f"{file}: unknown suffix {file.suffix!r}; {known}, .parquet, .arrow")
    try:
        found: Any = datasets.load_dataset(kind[file.suffix.lower()], data_files=str(file), split="train")
    except Exception as error:  # whatever the file's format raises
        raise TrialError(f"{file}: cannot be read: {error}") from None
    yield from enumerate(found, 1)


def _columns(path: str, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Return the columns that every row has and the trial reads."""
    line, first = rows[0]
    for other, row in rows:
        if row.keys() != first.keys():
            raise TrialError(
                f"{path}: unequal columns: line {other} has {sorted(map(str, row))}, "
                f"line {line} {sorted(map(str, first))}"
            )
    for kind in KINDS:
        if set(kind) <= first.keys():
            return (*kind, "label") if "label" in first else kind
    raise TrialError(
        f"{path}: no text column among {sorted(map(str, first))}; name it 'text', or 'prompt' and 'completion'"
    )


def _row(path: str, line: int, row: Mapping[str, Any], columns: Sequence[str]) -> Row:
    for name in columns:
        value = row[name]
        expected = (str, int, float) if name == "label" else str
        if not isinstance(value, expected):
            wanted = "text or a number" if name == "label" else "text"
            raise TrialError(f"{path}: line {line}: {name} is a {type(value).__name__}; expected {wanted}")
    text = row["prompt"] if "prompt" in columns else row["text"]
    return Row(text, row["completion"] if "prompt" in columns else None, row.get("label"), line)


def refuse_unequal(tables: Sequence[Table]) -> None:
    """Raise if the files do not have the same columns."""
    first = tables[0]
    for other in tables[1:]:
        if other.columns != first.columns:
            raise TrialError(
                f"unequal columns: {first.path} has {', '.join(first.columns)}, {other.path} {', '.join(other.columns)}"
            )


def without_repeats(table: Table) -> Table:
    """Return the table without rows that repeat an earlier one, which would be on both sides of a split."""
    kept = {row.key: row for row in reversed(table.rows)}
    rows = tuple(sorted(kept.values(), key=lambda row: row.line))
    gone = len(table.rows) - len(rows)
    notes = (f"{table.path}: {gone} rows that repeat others are left out",) if gone else ()
    return Table(table.path, rows, table.columns, (*table.notes, *notes))


def refuse_overlap(one: Table, other: Table) -> None:
    """Raise if samples of one file occur in the other."""
    lines = {row.key: row.line for row in other.rows}
    shared = [row for row in one.rows if row.key in lines]
    if shared:
        first = shared[0]
        raise TrialError(
            f"{len(shared)} of the {len(one.rows)} samples of {one.path} are in {other.path} too (line {first.line}, "
            f"there line {lines[first.key]}): the model would train on what it is judged by; take them out of one file"
        )
