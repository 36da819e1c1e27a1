"""What a trainer says about its selections: means for its own logger, and lines for the run's record."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import math
import os
import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import ftw
from ftw import Reasons, Selection, Status
from ftw.report import Recorder, decisions, describe

__all__ = ["RunLog", "fingerprint", "weighted_loss"]

PACKAGES = ("filter-then-weight", "torch", "transformers", "accelerate", "trl", "peft")


class RunLog:
    """Collects what the selections of a run said.

    Parameters
    ----------
    record : path, optional
        Where to append the run's record (`ftw.report`), one line an optimizer step.
    name : str
        Of the run.
    seed : int, optional
    text : bool
        Keep the ``text`` of samples.
    **header
        For the record's header.
    """

    def __init__(
        self,
        record: str | os.PathLike[str] | None,
        name: str,
        *,
        seed: int | None = None,
        text: bool = False,
        **header: Any,
    ) -> None:
        self.name = name
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.line: dict[str, Any] | None = None
        self.decided: list[tuple[Selection, list[str], Any]] = []  # of each pool: with its samples' names and sources
        self.step = 0
        self.path, self.seed, self.text, self.header = record, seed, text, header
        self.recorder: Recorder | None = None

    def add(
        self,
        step: int,
        selection: Selection,
        n: int,
        seconds: float,
        lengths: Any = None,
        *,
        leaked: Sequence[int] = (),
        watch_loss: float | None = None,
        about: Mapping[str, Sequence[str]] | None = None,
        more: Mapping[str, float] | None = None,
    ) -> list[int]:
        """Take in one selection over a pool of n; return the candidates that were dropped as not finite.

        ``leaked`` are the picks that stand in the target too, ``watch_loss`` is that of a second target split,
        ``about`` has columns (n,) for the record: ``id``, ``source``, ``text``; ``more`` numbers for the log alone.
        Several selections of one step, by gradient accumulation, are averaged; the record lists the picks of each.
        """
        share = len(selection.indices) / n
        values = torch.stack(
            [
                torch.as_tensor(x, dtype=torch.float64).cpu()
                for x in (
                    selection.match,
                    selection.effective_size,
                    selection.target_loss,
                    selection.shrinkage,
                    selection.status,
                )
            ]
        )
        match, size, target_loss, shrinkage, status = values.tolist()
        dropped = torch.nonzero(~torch.isfinite(selection.scores))[:, 0].tolist()
        means = {
            "match": match,
            "effective_size": size,
            "picked_share": share,
            "target_loss": target_loss,
            "shrinkage": shrinkage,
            "selection_seconds": seconds,
        }
        if watch_loss is not None:
            means["watch_loss"] = watch_loss
        means = {name: value for name, value in means.items() if not math.isnan(value)}  # what was not measured
        totals = {"dropped": len(dropped), "leaked": len(leaked)}
        totals["nothing_useful"] = int(status == Status.NOTHING_USEFUL)
        for name, value in (means | dict(more or {})).items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1
        for name, amount in totals.items():
            if amount:  # totals since the last log, and not means
                self.sums[name] = self.sums.get(name, 0.0) + amount
                self.counts[name] = 1
        if self.path is not None:
            places = {"dropped": dropped, "leaked": list(leaked)}
            columns = dict(about or {}) | ({} if lengths is None else {"length": lengths.tolist()})
            self._describe(step, selection, means, Status(int(status)), places, columns)
            if selection.reasons is not None:
                self.decided.append((selection, list(columns["id"]), columns.get("source")))
        return dropped

    def _describe(
        self,
        step: int,
        selection: Selection,
        means: dict[str, float],
        status: Status,
        places: dict[str, list[int]],
        about: Mapping[str, Sequence[Any]],
    ) -> None:
        if step != self.step:
            self.write()
        self.step = step
        scores = selection.scores.tolist()
        columns = {"score": scores, "loss": selection.losses.tolist(), **about}
        picked = describe(selection.indices.tolist(), selection.weights.tolist(), **columns)
        others = sorted(
            {*range(len(scores))} - {*selection.indices.tolist(), *places["dropped"]}, key=lambda i: -scores[i]
        )
        refused = describe([*others[:2], *others[2:][-2:]], **columns)  # the best that were passed over, and the worst
        offered = {name: list(about[name]) for name in ("id", "length") if name in about}
        pool = Counter(about.get("source", ()))
        seconds = means.pop("selection_seconds")
        means["loss"] = float(weighted_loss(selection))
        if self.line is None:
            self.line = {**means, "status": status.name, "seconds": {"selection": seconds}, "picked": picked}
            self.line |= {"pools": 1, "refused": refused, "offered": offered, "pool": pool, **places}
            return
        line, pools = self.line, self.line["pools"] + 1
        for sample in (*picked, *refused):
            sample["pool"] = pools - 1
        for name, value in means.items():
            before = line.get(name, value)
            line[name] = before + (value - before) / pools
        line["seconds"]["selection"] += seconds
        line["picked"] += picked
        line["refused"] += refused
        line["pool"] += pool
        for name, values in offered.items():
            line["offered"].setdefault(name, []).extend(values)
        for name, found in places.items():
            line[name] += found
        line["pools"] = pools
        if status != Status.OK:
            line["status"] = status.name

    def means(self) -> dict[str, float]:
        """Return the means since the last call, and forget them."""
        out = {name: total / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, {}
        return out

    def write(self, **fields: Any) -> None:
        """Append the step's line to the record, with further fields."""
        if self.path is not None and self.line is not None:
            if self.recorder is None:
                self.recorder = Recorder(self.path, text=self.text, packages=packages(), **self.header)
                self.recorder.run(self.name, method="filter-then-weight", seed=self.seed)
            if self.decided:
                self.line["decisions"] = _decisions(self.decided)
            self.recorder.step(self.name, self.step, **self.line, **fields)
        self.line, self.decided = None, []

    def close(self) -> None:
        """Write what is there and close the record; the next line opens it again."""
        self.write()
        if self.recorder is not None:
            self.recorder.close()
            self.recorder = None

    def __del__(self) -> None:
        recorder = getattr(self, "recorder", None)
        if recorder is not None:
            recorder.close()


def _decisions(decided: list[tuple[Selection, list[str], Any]]) -> dict[str, Any]:
    """Return the decisions of a step, whose pools are numbered one after the other."""
    every = [selection for selection, _, _ in decided]
    starts = list(itertools.accumulate((len(x.scores) for x in every), initial=0))
    reasons = [x.reasons for x in every]
    rivals = [torch.where(r.rival < 0, r.rival, r.rival + start) for r, start in zip(reasons, starts, strict=False)]
    joined = every[0]._replace(
        indices=torch.cat([x.indices + start for x, start in zip(every, starts, strict=False)]),
        weights=torch.cat([x.weights for x in every]),
        scores=torch.cat([x.scores for x in every]),
        reasons=Reasons(
            torch.cat([r.code for r in reasons]),
            torch.cat([r.residual for r in reasons]),
            torch.cat(rivals),
            torch.cat([r.similarity for r in reasons]),
        ),
    )
    sources = [x for _, _, some in decided for x in some or ()]
    ids = [name for _, names, _ in decided for name in names]
    return decisions(joined, ids, sources=sources if len(sources) == len(ids) else None)


def weighted_loss(selection: Selection) -> Tensor:
    """Return the weighted mean loss () of those chosen; 0 if nobody counts."""
    weights = selection.weights
    losses = torch.where(weights > 0, selection.losses[selection.indices].to(weights.dtype), 0.0)
    mean: Tensor = (losses * weights).sum() / weights.sum().clamp(min=torch.finfo(weights.dtype).tiny)
    return mean


def packages() -> dict[str, str]:
    """Return the versions of what the run runs on."""
    found = {"python": platform.python_version(), "ftw": getattr(ftw, "__version__", "")}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {name: version for name, version in found.items() if version}


def fingerprint(dataset: Any) -> str:
    """Return a short name of a dataset's content: its length, its first and its last samples."""
    if dataset is None:
        return "none"
    known = getattr(dataset, "_fingerprint", None)
    if isinstance(known, str):
        return known
    try:
        size = len(dataset)
        some: Iterable[int] = itertools.chain(range(min(8, size)), range(max(0, size - 8), size))
        shown = [_canonical(dataset[i]) for i in some]
    except TypeError:
        return f"stream:{type(dataset).__name__}"
    return f"{size}:{hashlib.sha256(repr(shown).encode()).hexdigest()[:16]}"


def _canonical(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return sorted((str(key), _canonical(value)) for key, value in sample.items())
    if isinstance(sample, (list, tuple)):
        return [_canonical(value) for value in sample]
    return sample.tolist() if hasattr(sample, "tolist") else repr(sample)
