"""The record of a run: JSON lines, written as the run goes on, and read again.

The record is a file that is only ever appended to, one line a step; a process that is killed costs at most the line it
was writing. `ftw.report` says what the lines hold.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Record", "RecordWarning", "Recorder", "Run", "describe", "number_in", "numbers_in", "read"]

FORMAT, VERSION = "ftw-run", 1

# ---------------------------------------------------------------------------------------------------------------------
# Writing


class RecordWarning(UserWarning):
    """A run's record could not be written."""


class Recorder:
    """Append a run's record to a file, a line at a time.

    A disk that is full, or any other failure to write, ends the record with a warning and lets the training go on.

    Parameters
    ----------
    path : path
        The record. If it exists it is continued, after a line that a killed process left unfinished.
    text : bool
        Keep the ``text`` of samples; otherwise it is left out of every line.
    fresh : bool
        Start anew where ``path`` exists.
    **header
        What holds for all runs; the page knows ``title``, ``note``, ``highlight`` (a method), ``domain`` (a source).
    """

    def __init__(self, path: str | os.PathLike[str], *, text: bool = False, fresh: bool = False, **header: Any) -> None:
        self.path = Path(path)
        self._text = text
        self._file = open(self.path, "w+b" if fresh else "a+b", buffering=0)  # noqa: SIM115
        if size := self._file.seek(0, os.SEEK_END):
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.write(b"\n")
        self._write({"kind": "header", "format": FORMAT, "version": VERSION, "text": text, **header})

    def run(self, run: str, *, method: str | None = None, seed: int | None = None, **meta: Any) -> None:
        """Announce a run; runs of one method are drawn together."""
        self._write({"kind": "run", "run": run, "method": run if method is None else method, "seed": seed, **meta})

    def step(self, run: str, step: int, **fields: Any) -> None:
        """Record what happened in a step, in arrays of any library. Of a step recorded twice the last counts."""
        self._write({"kind": "step", "run": run, "step": step, **fields})

    def _write(self, line: Mapping[str, Any]) -> None:
        if self._file.closed:
            return
        data = json.dumps(_plain(line, self._text), allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.close()
            words = f"{self.path}: the record ends here ({error.strerror}); the run goes on"
            warnings.warn(words, RecordWarning, stacklevel=3)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def describe(indices: Iterable[int], weights: Iterable[float] | None = None, **columns: Any) -> list[dict[str, Any]]:
    """Return samples for ``picked`` or ``refused``: index, weight, and the entry of each column, (n,) over the pool."""
    chosen = [int(i) for i in indices]
    samples: list[dict[str, Any]] = [
        {"index": i, **{name: column[i] for name, column in columns.items()}} for i in chosen
    ]
    if weights is not None:
        for sample, weight in zip(samples, weights, strict=True):
            sample["weight"] = weight
    return samples


def _plain(value: Any, text: bool) -> Any:
    """Return ``value`` as what JSON has: arrays as lists, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, text) for k, v in value.items() if k != "text" or text or isinstance(v, bool)}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _plain(value.tolist(), text)
    if isinstance(value, Iterable):
        return [_plain(v, text) for v in value]
    return str(value)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@dataclass
class Run:
    """One run: its name, method, seed, and its steps by number."""

    name: str
    method: str
    seed: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)

    def values(self, name: str) -> dict[int, float]:
        """Return the finite values of a field, by step."""
        found = ((step, number_in(line.get(name))) for step, line in sorted(self.steps.items()))
        return {step: value for step, value in found if value is not None}

    def samples(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        """Return (step, sample) of every sample in ``picked`` or ``refused``."""
        lines = ((step, line.get(name)) for step, line in sorted(self.steps.items()))
        return [(step, s) for step, line in lines if isinstance(line, list) for s in line if isinstance(s, dict)]


@dataclass
class Record:
    """What one or several records hold; ``damaged`` counts lines that could not be read."""

    header: dict[str, Any]
    runs: list[Run]
    damaged: int = 0

    @property
    def methods(self) -> dict[str, list[Run]]:
        """The runs by method, in order of appearance."""
        found: dict[str, list[Run]] = {}
        for run in self.runs:
            found.setdefault(run.method, []).append(run)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return a row a step, run by run, for `pandas.DataFrame`: its numbers, with ``seconds`` by part."""
        found = []
        for run in self.runs:
            for step, line in sorted(run.steps.items()):
                row: dict[str, Any] = {"run": run.name, "method": run.method, "seed": run.seed, "step": step}
                for name, value in line.items():
                    parts = value.items() if name == "seconds" and isinstance(value, dict) else ()
                    row |= {f"seconds_{part}": number_in(v) for part, v in parts}
                    if name not in row and name != "kind" and isinstance(value, str | int | float):
                        row[name] = value
                found.append(row)
        return found

    def picks(self) -> list[dict[str, Any]]:
        """Return a row a sample that was picked, for `pandas.DataFrame`: run, step, and what is known of the sample."""
        return [
            {"run": run.name, "method": run.method, "seed": run.seed, "step": step, **sample}
            for run in self.runs
            for step, sample in run.samples("picked")
        ]


def read(*paths: str | os.PathLike[str]) -> Record:
    """Read records; lines that a killed process left unfinished are counted and passed over.

    Raises
    ------
    ValueError
        If a file is not a record, or was written by a later version.
    """
    record = Record({}, [])
    for path in map(Path, paths):
        header: dict[str, Any] = {}
        runs: dict[str, Run] = {}
        with open(path, encoding="utf-8", errors="replace") as file:
            for text in file:
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError):
                    line = None
                if not isinstance(line, dict):
                    record.damaged += 1
                    continue
                if line.get("kind") == "header" and line.get("format") == FORMAT:
                    if not isinstance(version := line.get("version"), int) or version > VERSION:
                        raise ValueError(f"{path}: a record of version {version!r}; this ftw reads up to {VERSION}")
                    header = line | header
                elif not header:
                    break
                elif line.get("kind") in ("run", "step"):
                    name = str(line.get("run", ""))
                    run = runs.setdefault(name, Run(name, name))
                    if line["kind"] == "run":
                        seed = line.get("seed")
                        run.method, run.meta = str(line.get("method", name)), line
                        run.seed = seed if isinstance(seed, int) else None
                    elif isinstance(step := line.get("step"), int) and abs(step) < 2**53:
                        run.steps[step] = line
        if not header:
            raise ValueError(f"{path}: not a record of a run: its first line must be a header of format {FORMAT!r}")
        record.header = header | record.header
        record.runs += runs.values()
    return record


def number_in(value: Any) -> float | None:
    """Return a number as a float; None for anything else, and for what is too large to reckon with."""
    return float(value) if isinstance(value, int | float) and -1e100 < value < 1e100 else None


def numbers_in(values: Iterable[Any]) -> list[float]:
    """Return the numbers among some values."""
    return [number for value in values if (number := number_in(value)) is not None]
