"""Run one case on one backend, and say how far it is from what it should be."""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import re
import time
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np

from . import known_gaps
from .backends import Backend
from .table import Case, Expect, Refusal, map_arrays
from .tolerances import tolerance

__all__ = ["FAIL", "GAP", "PASS", "SKIP", "Result", "measure", "run", "with_gap"]

RECORDS = {"OuterProduct", "Rows", "Packed", "PackedRows", "Dense"}
PASS, FAIL, GAP, SKIP = "pass", "FAIL", "gap", "skip"


class Result(NamedTuple):
    """One row of the printed table; ``error`` and ``tolerance`` are those of the output closest to failing."""

    case: str
    backend: str
    dtype: str
    verdict: str
    error: float = 0.0
    tolerance: float = 0.0
    steps: int | None = None
    detail: str = ""
    seconds: float = 0.0


_compiled: dict[tuple[str, int], Any] = {}  # one compilation a call, for all cases that share it
_alive: list[Any] = []  # what the ids above belong to


def run(case: Case | Refusal, backend: Backend, dtype: str, gaps: list[known_gaps.Gap] | None = None) -> Result:
    """Return the verdict on one case."""
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("default", category=DeprecationWarning)
            result = _refused(case, backend, dtype) if isinstance(case, Refusal) else _compared(case, backend, dtype)
    except Exception as error:
        result = _row(case, backend, dtype, FAIL, np.inf, detail=f"{type(error).__name__}: {_short(error)}")
    result = with_gap(result, gaps)
    return result._replace(seconds=time.perf_counter() - start)


def _row(case: Case | Refusal, backend: Backend, dtype: str, verdict: str, error: float = 0.0, **more: Any) -> Result:
    return Result(case.name, backend.name, dtype, verdict, error, **more)


def with_gap(result: Result, gaps: list[known_gaps.Gap] | None) -> Result:
    """Return the verdict in the light of the known gaps."""
    gap = known_gaps.find(result.case, result.backend, result.dtype, gaps)
    if gap is None:
        return result
    if gap.expires < datetime.date.today():
        return result._replace(verdict=FAIL, detail=f"gap expired on {gap.expires}: {gap.reason}; {result.detail}")
    if result.verdict == FAIL:
        return result._replace(verdict=GAP, detail=f"{gap.reason} (until {gap.expires}); {result.detail}")
    return result._replace(detail=f"closed: take the gap {gap.reason!r} off the list")


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _held(backend: Backend, dtype: str, tree: Any) -> Any:
    """Return the inputs as arrays of the backend: records in ``dtype``, the rest in float32 at least."""

    def convert(x: Any, inside: str) -> Any:
        if x.dtype.kind != "f":
            return backend.from_numpy(x, str(x.dtype))
        sixteen = dtype in ("float16", "bfloat16")
        return backend.from_numpy(x, "float32" if sixteen and inside not in RECORDS else dtype)

    return map_arrays(tree, convert)


def _seen(backend: Backend, dtype: str, tree: Any) -> Any:
    """Return the inputs as the backend held them, in float64 NumPy: what the account starts from."""

    def convert(x: Any, inside: str) -> Any:
        if x.dtype.kind != "f":
            return x
        sixteen = dtype in ("float16", "bfloat16")
        name = "float32" if sixteen and inside not in RECORDS else dtype
        return np.asarray(backend.to_numpy(backend.from_numpy(x, name)), dtype=np.float64)

    return map_arrays(tree, convert)


def _call(case: Case | Refusal, backend: Backend, held: Any) -> Any:
    key = (backend.name, id(case.call))
    if key not in _compiled:
        _compiled[key] = backend.wrap(case.call)
        _alive.append(case.call)
    with np.errstate(all="raise"), _strict(backend):  # as a user may have them: no call depends on them
        return _compiled[key](*held)


def _strict(backend: Backend) -> AbstractContextManager[Any]:
    """Return the block in which JAX refuses to add axes by itself."""
    if backend.name not in ("jax", "jit"):
        return nullcontext()
    context: AbstractContextManager[Any] = importlib.import_module("jax").numpy_rank_promotion("raise")
    return context


def _refused(case: Refusal, backend: Backend, dtype: str) -> Result:
    held = _held(backend, dtype, case.inputs)
    try:
        _call(case, backend, held)
    except case.error as error:
        if re.search(case.says, str(error)):
            return _row(case, backend, dtype, PASS)
        return _row(case, backend, dtype, FAIL, np.inf, detail=f"says {_short(error)!r}, not {case.says!r}")
    return _row(case, backend, dtype, FAIL, np.inf, detail="accepted")


def _compared(case: Case, backend: Backend, dtype: str) -> Result:
    held = _held(backend, dtype, case.inputs)
    raw = _call(case, backend, held)
    got = {name: backend.to_numpy(x) for name, x in raw.items()}
    seen = _seen(backend, dtype, case.inputs)
    after = _back(backend, held)
    with np.errstate(all="ignore"):
        expected = case.account(got, *seen)
    missing = set(got) - set(expected) - {"steps"}
    if missing:
        return _row(case, backend, dtype, FAIL, np.inf, detail=f"no account of {sorted(missing)}")
    worst = (0.0, 0.0, "")
    for name, e in {**expected, **_unchanged(case.inputs, seen, after)}.items():
        value = np.asarray(got[name] if e.got is None and name in got else e.got)
        wide = "float32" if dtype in ("float16", "bfloat16") else dtype
        if e.got is None and value.dtype.kind == "f" and str(value.dtype) != wide:
            return _row(case, backend, dtype, FAIL, np.inf, detail=f"{name} is {value.dtype}, not {wide}")
        error, limit = measure(value, e), tolerance(e.rule, dtype, e.condition)
        if not error <= limit or _ratio(error, limit) > _ratio(worst[0], worst[1]) or not worst[2]:
            worst = (error, limit, name)
        if not error <= limit:
            break
    steps = int(np.max(got["steps"])) if "steps" in got else None
    good = worst[0] <= worst[1]
    detail = "" if good else f"{worst[2]}"
    return Result(case.name, backend.name, dtype, PASS if good else FAIL, worst[0], worst[1], steps, detail)


def _back(backend: Backend, held: Any) -> list[Any]:
    """Return the inputs' values after the call."""
    found: list[Any] = []

    def collect(tree: Any) -> None:
        if isinstance(tree, Mapping):
            tree = list(tree.values())
        elif dataclasses.is_dataclass(tree):
            tree = [getattr(tree, f.name) for f in dataclasses.fields(tree)]
        if isinstance(tree, (tuple, list)):
            for part in tree:
                collect(part)
        elif hasattr(tree, "dtype"):
            found.append(np.asarray(backend.to_numpy(tree)))

    collect(held)
    return found


def _unchanged(inputs: Any, seen: Any, after: list[Any]) -> dict[str, Expect]:
    """Expect that no input was written to."""
    before: list[Any] = []

    def collect(x: Any, inside: str) -> None:
        before.append(x)

    map_arrays(seen, collect)
    same = all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in zip(before, after, strict=True))
    return {"the inputs, afterwards": Expect(np.asarray(True), "exact", got=np.asarray(same))}


def measure(got: Any, e: Expect) -> float:
    """Return ``max |got - value| / scale``; infinite if shapes differ, or NaN is not where it should be."""
    got, value = np.asarray(got), np.asarray(e.value)
    if got.shape != value.shape:
        return float("inf")
    if got.dtype.kind in "biu" and value.dtype.kind in "biu":
        return 0.0 if np.array_equal(got, value) else float("inf")
    got, value = got.astype(float), value.astype(float)
    finite = np.isfinite(value)
    if not np.array_equal(got[~finite], value[~finite], equal_nan=True):
        return float("inf")
    scale = np.max(np.abs(value), initial=0.0, where=finite) if e.scale is None else e.scale
    scale = np.broadcast_to(np.asarray(scale, dtype=float), value.shape)[finite]
    error = np.abs(got[finite] - value[finite])
    if not np.all(np.isfinite(error)):
        return float("inf")
    scaled = np.where(error == 0, 0.0, error / np.where(scale > 0, scale, 1e-300))
    return float(np.max(scaled, initial=0.0))


def _ratio(error: float, limit: float) -> float:
    return error / limit if limit > 0 else (0.0 if error == 0 else float("inf"))
