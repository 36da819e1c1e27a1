"""The column of a data set that says where samples come from: kept on its way to the pool, and counted for the log."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

import ftw
from ftw import Quota, Selection
from ftw.spi import as_count

from .step import Ranks

__all__ = ["WithColumns", "column_of", "mixture"]


class WithColumns:
    """A collator that passes columns by the trainer's own, as lists: texts too.

    Parameters
    ----------
    collator : callable
    names : sequence of str
    """

    def __init__(self, collator: Callable[[list[Any]], Any], names: Sequence[str]) -> None:
        self.collator, self.names = collator, names

    def __call__(self, samples: list[Any], *args: Any, **kwargs: Any) -> Any:
        """Return the batch of some samples."""
        there = [name for name in self.names if samples and isinstance(samples[0], Mapping) and name in samples[0]]
        if not there:
            return self.collator(samples, *args, **kwargs)
        columns = {name: [_plain(sample[name]) for sample in samples] for name in there}
        rest = [{name: x for name, x in sample.items() if name not in there} for sample in samples]
        return {**self.collator(rest, *args, **kwargs), **columns}


def _plain(x: Any) -> Any:
    return x.item() if hasattr(x, "item") else x


def column_of(column: Any, ranks: Ranks) -> list[Any] | None:
    """Return the column (total,) of all processes' pools from this one's; None if there is none."""
    if column is None:
        return None
    own = column.tolist() if isinstance(column, Tensor) else list(column)
    return [x for text in ranks.texts(json.dumps(own)) for x in json.loads(text)]


def mixture(selection: Selection, sources: Sequence[Any] | None, quota: Quota | None) -> dict[str, float]:
    """Return what the log says of a selection by source and by reason.

    The share of the picks from each source, ``picked/SOURCE``; ``floors_bound``, how many floors of a quota were just
    met, which says that without them there would have been fewer; ``relaxed``, how many bounds gave way; and how many
    candidates were refused or dropped for each reason.
    """
    found: dict[str, float] = {}
    if sources is not None:
        picked = Counter(sources[i] for i in selection.indices.tolist())
        total = max(1, len(selection.indices))
        for name in sorted(set(sources), key=str):
            found[f"picked/{name}"] = picked[name] / total
        if quota is not None and quota.at_least is not None:
            floors = quota.at_least
            named = floors.items() if isinstance(floors, Mapping) else enumerate(floors)
            found["floors_bound"] = float(
                sum(0 < picked[name] == as_count(floor, total, up=True) for name, floor in named)
            )
    if selection.relaxed is not None:
        found["relaxed"] = float(selection.relaxed)
    if selection.reasons is not None:
        codes = Counter(selection.reasons.code.tolist())
        for reason in ftw.Reason:
            if reason != ftw.Reason.PICKED:
                found[reason.name.lower()] = float(codes[int(reason)])
    return found
