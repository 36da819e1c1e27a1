"""What a record comes to: its methods over their runs, compared seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .record import Record, Run, number_in, numbers_in

__all__ = ["Summary", "highlighted", "mean_of", "metric", "paired", "pool_shares", "summarise", "table", "written"]


@dataclass(frozen=True)
class Summary:
    """A method over its runs; means over runs unless stated, None where the record does not say.

    Attributes
    ----------
    start, mean, spread : float or None
        The loss before the first step; after the last, its mean and its standard deviation over runs.
    final : dict
        The loss after the last step, by seed (by place where there is none).
    domain, domain_weight : float or None
        Share of the picks that came from the target domain, by number and by weight.
    effective_size, seconds : float or None
        Effective number of samples a step; seconds a run.
    """

    method: str
    start: float | None
    mean: float | None
    spread: float | None
    final: dict[Any, float]
    domain: float | None
    domain_weight: float | None
    effective_size: float | None
    seconds: float | None


def metric(record: Record) -> str:
    """Return the loss that the record is judged by: test, second target split, target, training."""
    return next(
        (n for n in ("test_loss", "watch_loss", "target_loss") if any(r.values(n) for r in record.runs)), "loss"
    )


def summarise(record: Record) -> list[Summary]:
    """Sum the record up, a method at a time."""
    name, domain = metric(record), record.header.get("domain")
    found = []
    for method, runs in record.methods.items():
        curves = [(place if run.seed is None else run.seed, run.values(name)) for place, run in enumerate(runs)]
        final = {seed: list(curve.values())[-1] for seed, curve in curves if curve}
        picks = [sample for run in runs for _, sample in run.samples("picked")]
        inside = [sample for sample in picks if domain is not None and sample.get("source") == domain]
        weight = sum(numbers_in(sample.get("weight") for sample in picks))
        seconds = [numbers_in(_seconds(line) for line in run.steps.values()) for run in runs]
        found.append(
            Summary(
                method,
                mean_of([next(iter(curve.values())) for _, curve in curves if curve]),
                mean_of(final.values()),
                spread_of(final.values()),
                final,
                len(inside) / len(picks) if picks and domain is not None else None,
                sum(numbers_in(s.get("weight") for s in inside)) / weight if weight and domain is not None else None,
                mean_of([value for run in runs for value in run.values("effective_size").values()]),
                mean_of([sum(values) for values in seconds if values]),
            )
        )
    return found


def paired(one: Summary, other: Summary) -> tuple[float, float | None, int, int] | None:
    """Return mean and standard deviation of ``one - other`` over shared seeds, how often it is below 0, of how many."""
    gaps = [one.final[seed] - other.final[seed] for seed in one.final if seed in other.final]
    if not gaps:
        return None
    return statistics.fmean(gaps), spread_of(gaps), sum(gap < 0 for gap in gaps), len(gaps)


def table(record: Record) -> list[list[str]]:
    """Return the record's table, as text: a row of headings, then a row a method, compared with those before it."""
    summaries = summarise(record)
    against = [f"against {one.method}" for one in summaries[:-1]]
    rows = [["method", "start", "end", *against, "from domain", "by weight", "effective", "seconds"]]
    for i, one in enumerate(summaries):
        end = written(one.mean, 3) + ("" if one.spread is None else f" ± {one.spread:.3f}")
        gaps = [_gap(paired(one, other)) if j < i else "" for j, other in enumerate(summaries[:-1])]
        shares = [written(None if v is None else 100 * v, 0, " %") for v in (one.domain, one.domain_weight)]
        numbers = [written(one.effective_size, 1), written(one.seconds, 1)]
        rows.append([one.method, written(one.start, 3), end, *gaps, *shares, *numbers])
    kept = [i for i in range(len(rows[0])) if i == 0 or any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def _gap(gap: tuple[float, float | None, int, int] | None) -> str:
    if gap is None:
        return ""
    mean, spread, below, count = gap
    return f"{mean:+.3f}" + ("" if spread is None else f" ± {spread:.3f}") + f" ({below}/{count})"


def highlighted(record: Record) -> str:
    """Return the method that the page is about: the header's, or the last one."""
    methods = list(record.methods)
    name = record.header.get("highlight")
    return name if name in methods else methods[-1] if methods else ""


def _seconds(line: Mapping[str, Any]) -> float | None:
    value = line.get("seconds")
    return sum(numbers_in(value.values())) if isinstance(value, dict) else number_in(value)


def mean_of(values: Iterable[float]) -> float | None:
    """Return the mean, or None of nothing."""
    values = list(values)
    return statistics.fmean(values) if values else None


def spread_of(values: Iterable[float]) -> float | None:
    """Return the standard deviation, or None of fewer than two values."""
    values = list(values)
    return statistics.stdev(values) if len(values) > 1 else None


def written(value: float | None, digits: int, unit: str = "") -> str:
    """Return a number as text, empty for None."""
    return "" if value is None else f"{value:.{digits}f}{unit}"


def _pool(line: Mapping[str, Any]) -> dict[str, float]:
    pool = line.get("pool")
    return {str(k): n for k, v in pool.items() if (n := number_in(v)) is not None} if isinstance(pool, dict) else {}


def pool_shares(runs: Iterable[Run]) -> dict[str, float]:
    """Return the share of each source in the pools of some runs."""
    counts: dict[str, float] = {}
    for run in runs:
        for line in run.steps.values():
            for source, count in _pool(line).items():
                counts[source] = counts.get(source, 0.0) + count
    total = sum(counts.values())
    return {source: count / total for source, count in counts.items()} if total else {}
