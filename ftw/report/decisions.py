"""What a record says about every candidate of a step: why it was picked or refused. Standard library only.

A step's ``decisions`` are one compressed field::

    {"version": 1, "n": candidates, "data": base64 of zlib of JSON columns}

The columns are ``id``, ``code`` (a `ftw.Reason`), ``score``, ``residual``, ``rival`` (a number in the pool, -1 for
none), ``similarity``, ``rank`` and ``weight`` (of the picked ones, else null) and, where they are given, ``source``.
Numbers have six digits. There is no text of samples in them.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ftw.reasons import Reason

from .record import Record

__all__ = ["Decision", "columns_of", "decisions", "history", "why"]

VERSION = 1
LARGEST = 1 << 28  # bytes that one step may unfold to: a record is not trusted
COLUMNS = ("id", "code", "score", "residual", "rival", "similarity", "rank", "weight", "source")


class Decision(NamedTuple):
    """What one step decided about one candidate."""

    run: str
    step: int
    id: str
    code: int
    score: float | None
    residual: float | None
    rank: int | None
    weight: float | None
    rival: str | None
    similarity: float | None
    source: str | None

    @property
    def message(self) -> str:
        """The decision in a sentence."""
        known = self.code in tuple(Reason)
        words = Reason(self.code).message if known else f"code {self.code}"
        if self.code == Reason.PICKED and self.rank is not None:
            words = f"picked, place {self.rank + 1}, weight {_shown(self.weight)}"
        if self.rival is not None:
            words = f"refused: {self.rival} was kept, and explains most of it (cosine {_shown(self.similarity)})"
        source = "" if self.source is None else f", of source {self.source}"
        numbers = f"score {_shown(self.score)}, residual {_shown(self.residual)}"
        return f"step {self.step}: {self.id}{source}: {words}; {numbers}"


def decisions(selection: Any, ids: Iterable[Any], *, sources: Iterable[Any] | None = None) -> dict[str, Any]:
    """Return the ``decisions`` of a step for `Recorder.step`.

    Parameters
    ----------
    selection : ftw.Selection
        With ``reasons``, as ``explain=True`` gives them; arrays of any library.
    ids : iterable (n,)
        A name for each candidate of the pool, the same wherever it comes up.
    sources : iterable (n,), optional
        The source of each.

    Raises
    ------
    ValueError
        If the selection has no reasons, or a column has another length.
    """
    reasons = selection.reasons
    if reasons is None:
        raise ValueError("decisions: the selection has no reasons; select with explain=True")
    code = [int(x) for x in _listed(reasons.code)]
    n = len(code)
    rank: list[int | None] = [None] * n
    weight: list[float | None] = [None] * n
    for place, (i, w) in enumerate(zip(_listed(selection.indices), _listed(selection.weights), strict=True)):
        if code[i] == Reason.PICKED:
            rank[i], weight[i] = place, _rounded(w)
    columns: dict[str, list[Any]] = {
        "id": [str(x) for x in _listed(ids)],
        "code": code,
        "score": [_rounded(x) for x in _listed(selection.scores)],
        "residual": [_rounded(x) for x in _listed(reasons.residual)],
        "rival": [int(x) for x in _listed(reasons.rival)],
        "similarity": [_rounded(x) for x in _listed(reasons.similarity)],
        "rank": rank,
        "weight": weight,
    }
    if sources is not None:
        columns["source"] = [str(x) for x in _listed(sources)]
    wrong = {name: len(column) for name, column in columns.items() if len(column) != n}
    if wrong:
        raise ValueError(f"decisions: columns of other lengths than the {n} candidates: {wrong}")
    data = json.dumps(columns, allow_nan=False, separators=(",", ":")).encode()
    return {"version": VERSION, "n": n, "data": base64.b64encode(zlib.compress(data, 6)).decode()}


def history(record: Record, id: str, *, step: int | None = None, run: str | None = None) -> list[Decision]:
    """Return what was decided about a sample, step after step.

    Parameters
    ----------
    record : Record
    id : str
        The sample's name, as given to `decisions`.
    step : int, optional
        That step alone.
    run : str, optional
        That run alone.
    """
    found = []
    for one in record.runs:
        if run is not None and one.name != run:
            continue
        for number, line in sorted(one.steps.items()):
            if step is not None and number != step:
                continue
            columns = columns_of(line.get("decisions"))
            ids = columns.get("id", [])
            found += [_decision(one.name, number, columns, i) for i, name in enumerate(ids) if name == id]
    return found


def why(record: Record, id: str, *, step: int | None = None, run: str | None = None) -> list[str]:
    """Return what was decided about a sample as lines of text.

    Raises
    ------
    ValueError
        If the record has no such sample, saying what it has.
    """
    found = history(record, id, step=step, run=run)
    if found:
        several = len({decision.run for decision in found}) > 1
        return [f"{decision.run}, {decision.message}" if several else decision.message for decision in found]
    steps = [n for one in record.runs for n, line in one.steps.items() if columns_of(line.get("decisions"))]
    if not steps:
        raise ValueError(
            "the record has no decisions: select with explain=True, and record decisions=ftw.report.decisions(...)"
        )
    where = f"step {step}" if step is not None else "any step"
    raise ValueError(f"no sample {id!r} in {where}: decisions are there of steps {min(steps)} .. {max(steps)}")


def _decision(run: str, step: int, columns: Mapping[str, list[Any]], i: int) -> Decision:
    def at(name: str) -> Any:
        column = columns.get(name)
        return column[i] if column is not None else None

    rival = at("rival")
    known = isinstance(rival, int) and 0 <= rival < len(columns["id"])
    return Decision(
        run,
        step,
        str(at("id")),
        int(at("code")),
        _number(at("score")),
        _number(at("residual")),
        at("rank") if isinstance(at("rank"), int) else None,
        _number(at("weight")),
        str(columns["id"][rival]) if known else None,
        _number(at("similarity")),
        None if at("source") is None else str(at("source")),
    )


def columns_of(packed: Any) -> dict[str, list[Any]]:
    """Return the columns of a step's decisions; none for what is not there, or not what it should be."""
    if not isinstance(packed, dict) or not isinstance(packed.get("data"), str) or packed.get("version") != VERSION:
        return {}
    try:
        unfold = zlib.decompressobj()
        data = unfold.decompress(base64.b64decode(packed["data"], validate=True), LARGEST)
        columns = json.loads(data)
    except (binascii.Error, zlib.error, ValueError, RecursionError):
        return {}
    if not isinstance(columns, dict) or not isinstance(columns.get("id"), list):
        return {}
    n = len(columns["id"])
    good = {k: v for k, v in columns.items() if k in COLUMNS and isinstance(v, list) and len(v) == n}
    codes = good.get("code")
    return good if codes is not None and all(isinstance(code, int) for code in codes) else {}


def _listed(x: Any) -> Sequence[Any]:
    if hasattr(x, "tolist"):
        listed: Sequence[Any] = x.tolist()
        return listed
    return list(x)


def _rounded(x: Any) -> float | None:
    return float(f"{x:.6g}") if isinstance(x, (int, float)) and math.isfinite(x) else None


def _number(x: Any) -> float | None:
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def _shown(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.3g}"
