"""Pictures of a run's record with matplotlib, the extra ``plot``: curves, the match, weights by source.

Each draws on ``ax``, or on a new figure, and returns the axes.
"""

from __future__ import annotations

from typing import Any

from .command_line import require
from .report.record import Record, number_in
from .report.summary import highlighted, metric
from .report.svg import curve_of

__all__ = ["curves", "match", "weights_by_source"]


def curves(record: Record, field: str | None = None, *, ax: Any = None) -> Any:
    """Draw a field of a record by step: a line a method, its mean over the runs, one standard deviation as a band.

    Parameters
    ----------
    record : Record
        Of `ftw.report.read`.
    field : str, optional
        Of a step's line; the loss that the record is judged by is the default.
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes

    Raises
    ------
    ValueError
        If no step has the field.
    ImportError
        If matplotlib is not installed.
    """
    name = metric(record) if field is None else field
    lines = {method: line for method, runs in record.methods.items() if (line := curve_of(runs, name))}
    if not lines:
        raise ValueError(f"curves: no step of the record has a number {name!r}")
    ax = _axes(ax)
    for method, points in lines.items():
        steps, means, low, high = zip(*points, strict=True)
        (drawn,) = ax.plot(steps, means, label=method)
        ax.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
    ax.set_xlabel("step")
    ax.set_ylabel(name.replace("_", " "))
    ax.legend()
    return ax


def match(record: Record, *, ax: Any = None) -> Any:
    """Draw the cosine between the chosen update and the target's, as `curves` does."""
    return curves(record, "match", ax=ax)


def weights_by_source(record: Record, method: str | None = None, *, ax: Any = None) -> Any:
    """Draw each source's share of the weights by step, stacked, over all runs of a method.

    Parameters
    ----------
    record : Record
        Of `ftw.report.read`; its picks have a ``source`` and a ``weight``.
    method : str, optional
        The method that the record is about is the default.
    ax : matplotlib axes, optional

    Returns
    -------
    matplotlib axes

    Raises
    ------
    ValueError
        If there is no such method, or its picks have no source and weight.
    ImportError
        If matplotlib is not installed.
    """
    name = highlighted(record) if method is None else method
    if name not in record.methods:
        raise ValueError(f"weights_by_source: no method {name!r}; the record has {[*record.methods]}")
    sums: dict[int, dict[str, float]] = {}
    for run in record.methods[name]:
        for step, sample in run.samples("picked"):
            weight = number_in(sample.get("weight"))
            if weight is not None and "source" in sample:
                column, source = sums.setdefault(step, {}), str(sample["source"])
                column[source] = column.get(source, 0.0) + weight
    if not sums:
        raise ValueError(f"weights_by_source: no pick of {name!r} has a source and a weight")
    steps = sorted(sums)
    totals = {step: sum(sums[step].values()) or 1.0 for step in steps}
    sources = list(dict.fromkeys(source for step in steps for source in sums[step]))
    ax = _axes(ax)
    ax.stackplot(steps, *([sums[i].get(s, 0.0) / totals[i] for i in steps] for s in sources), labels=sources)
    ax.set_xlabel("step")
    ax.set_ylabel("share of the weights")
    ax.set_ylim(0, 1)
    ax.set_title(name)
    ax.legend()
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    require("ftw.plot", "matplotlib", extra="plot")
    import matplotlib.pyplot as plt

    return plt.subplots()[1]
