"""What happens to a record while the backward is still running: scored, perhaps written out, perhaps forgotten.

A layer's factors A (t, d_in) and B (t, d_out) say the same as its gradient G = B'A (d_out, d_in). From the moment
both are there the cheaper of the two is kept. For t beyond ``d_out d_in / (d_out + d_in)`` that is G: forming it
costs what scoring by the factors would, and then the score, the Gram matrix and the update are next to free. Below,
the factors are smaller. Where nothing may be kept the Gram matrix is added up at once, from blocks of G.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ftw import Dense, OuterProduct, Packed, PackedRows, Rows
from ftw.geometry import Diagonal, Operator, Scale
from ftw.gradients import Record, matrix_shape
from ftw_torch.records.blocks import add_gram, add_sketches, block_bytes, gram_of, product, root_of
from ftw_torch.records.buckets import fits, joined, side_by_side
from ftw_torch.records.dtypes import promoted
from ftw_torch.records.join import bytes_of

__all__ = ["Stream", "worth_writing", "written"]

BLOCK_TOKENS = 1024


class Stream:
    """Takes the records of one piece of a pool as they arrive.

    Parameters
    ----------
    target : mapping of str to tensor
        g_T.
    operators : mapping of str to operator
        P.
    shortlist : int
        How many samples the Gram matrix is for; 0 if none is asked for.
    whole : bool
        Whether this piece is the whole pool, so that its Gram matrix can be added up at once.
    keep : bool
        Whether records are kept for the update. If not, every Gram matrix is added up at once.
    several : set of str
        Parameters known to be used more than once: the Gram matrix needs all their records together. Grows.
    budget : int, optional
        Bytes that may be kept; at the first record beyond them ``keep`` turns False.
    sketch : int, optional
        Add up count sketches of this size in place of Gram matrices, see `ftw.sketch`. They are linear: uses of a
        parameter, and pieces of a pool, need not be brought together.
    """

    def __init__(
        self,
        target: Mapping[str, Tensor],
        operators: Mapping[str, Operator],
        *,
        shortlist: int = 0,
        whole: bool = True,
        keep: bool = True,
        several: set[str] | None = None,
        budget: int | None = None,
        sketch: int | None = None,
    ) -> None:
        self.target, self.operators, self.sketch = target, operators, sketch
        self.shortlist, self.whole, self.keep = shortlist, whole, keep
        self.several = set() if several is None else several
        self.budget = budget
        self._scores: list[Tensor] = []  # (n,) of each record
        self._small: list[tuple[str, Record]] = []  # to be scored together
        self.sketches: Tensor | None = None  # (n, m)
        self.grams: dict[str, Tensor] = {}  # (n, n) of parameters whose Gram matrix is there already
        self.kept = 0  # bytes
        self.conflict = False  # a parameter was forgotten, and then used again
        self._seen: set[str] = set()

    def __call__(self, name: str, record: Record) -> Record | None:
        """Score a record; return what is to be kept of it."""
        if name in self._seen:
            self.several.add(name)
            self.conflict = self.conflict or not (self.keep or self.sketch)
            self.grams.pop(name, None)
        alone = name not in self.several
        self._seen.add(name)
        operator = self.operators[name]
        at_once = bool(self.shortlist) and self.whole and alone and not (self.keep or self.sketch)
        if not (at_once or self.sketch) and fits(record, operator):
            self._small.append((name, record))
            return self._keep(name, record)
        direction = operator.apply(self.target[name])  # M = P g_T
        plain = isinstance(operator, (Diagonal, Scale))
        if isinstance(record, OuterProduct):
            if self.keep and worth_writing(record):
                record = written(record)
            elif at_once and plain:
                score, self.grams[name] = _both(record, direction, operator)
                self._scores.append(score)
                return self._keep(name, record)
        self._scores.append(score_by(record, direction))
        if at_once:
            self.grams[name] = add_gram([record], operator)
        if self.sketch:
            more = add_sketches(name, [record], operator, self.sketch)
            self.sketches = more if self.sketches is None else self.sketches + more
        return self._keep(name, record)

    @property
    def scores(self) -> Tensor | None:
        """The scores (n,) of all records so far, None if there was none."""
        if self._small:
            names, records = zip(*self._small, strict=True)
            goal = [self.target[name] for name in names]
            operator = joined([self.operators[name] for name in names], goal)
            direction = operator.apply(torch.cat([g.reshape(-1) for g in goal]))  # (p,)
            self._scores.append(score_by(side_by_side(records), direction))
            self._small.clear()
        return torch.stack(self._scores).sum(0) if self._scores else None

    def _keep(self, name: str, record: Record) -> Record | None:
        size = bytes_of(record)
        if self.keep and self.budget is not None and self.kept + size > self.budget:
            self.keep = False
            own = self.whole and not self.sketch and name not in self.several and name not in self.grams
            if self.shortlist and own:
                self.grams[name] = add_gram([record], self.operators[name])
        if self.keep or (name in self.several and not self.sketch):
            self.kept += size
            return record
        return None


def worth_writing(record: OuterProduct, slack: float = 1.0) -> bool:
    """Return whether written-out gradients take less memory than their factors."""
    d_out, d_in = record.shape
    t = record.inputs.shape[1]
    factors = t * (d_in * record.inputs.dtype.itemsize + d_out * record.output_grads.dtype.itemsize)
    out: bool = d_out * d_in * max(record.output_grads.dtype.itemsize, 4) <= slack * factors
    return out


def written(record: OuterProduct) -> Dense:
    """Return the gradients written out, (n, d_out, d_in), in float32 or wider."""
    a: Any = record.inputs
    b: Any = record.output_grads
    return Dense(product(b.mT, a))


def score_by(record: Record, direction: Tensor) -> Tensor:
    """Return ``<G_i, M>`` (n,)."""
    if isinstance(record, Rows):  # M may be of 128 000 rows, of which few are looked up
        b: Any = record.output_grads
        rows = torch.nn.functional.embedding(record.indices, direction)  # type: ignore[arg-type]
        out: Tensor = (rows * b).sum((1, 2))
        return out
    if isinstance(record, Dense):
        g: Any = record.grads
        flat: Tensor = g.reshape(g.shape[0], -1).to(direction.dtype)
        return flat @ direction.reshape(-1)
    if isinstance(record, OuterProduct):
        return _by_factors(record.inputs, record.output_grads, direction)
    if isinstance(record, (Packed, PackedRows)):
        return _by_tokens(record, direction)
    parts = [score_by(part, direction) for part in record.parts]
    return torch.stack(parts).sum(0)


def _by_tokens(record: Packed | PackedRows, direction: Tensor) -> Tensor:
    """Return ``<G_i, M>`` (n,) of documents: one value a token, added up by document."""
    a: Any = record.inputs if isinstance(record, Packed) else None
    b: Any = record.output_grads
    samples: Any = record.samples
    if a is None:
        rows = torch.nn.functional.embedding(record.indices, direction)  # type: ignore[arg-type, union-attr]
        values = (rows * b).sum(1)  # (t,)
    else:
        values = _by_factors(a[:, None], b[:, None], direction)  # (t,): each token is a sample of one
    out: Tensor = values.new_zeros(record.size + 1)  # the last is that of tokens of no document
    out.index_add_(0, torch.where(samples < 0, record.size, samples), values)
    return out[:-1]


def _by_factors(a: Any, b: Any, m: Any) -> Tensor:
    """Return ``sum_t b_it' M a_it`` (n,): M meets the wider factor, some samples at a time that fit a cache."""
    if m.shape[1] > m.shape[0]:
        a, b, m = b, a, m.mT
    n, t, width = a.shape
    if a.is_cuda:
        if b.dtype == torch.bfloat16:  # as fast as the model itself
            z = product(b.flatten(0, 1), m.to(b.dtype))
        elif b.dtype.itemsize < 4:  # M is scaled so as to fit float16
            size = m.abs().amax().clamp_min(torch.finfo(m.dtype).tiny)
            z = product(b.flatten(0, 1), (m / size).to(b.dtype)) * size
        else:
            z = product(b.flatten(0, 1), m)  # (n t, d')
        scores: Tensor = torch.linalg.vecdot(z.view(n, -1), a.flatten(1).to(z.dtype))
        return scores
    step = max(1, BLOCK_TOKENS // max(t, 1))
    wide = promoted(m.dtype, promoted(a.dtype, b.dtype))
    m = m.to(wide)
    out: Tensor = m.new_empty(n)
    room = m.new_empty(min(step, n) * t, width)
    for i in range(0, n, step):
        part = slice(i, min(i + step, n))
        x, y = b[part].flatten(0, 1).to(wide), a[part].flatten(1).to(wide)  # (s t, d), (s, t d')
        z = torch.mm(x, m, out=room[: x.shape[0]])  # (s t, d')
        torch.linalg.vecdot(z.view(y.shape), y, out=out[part])
    return out


def _both(record: OuterProduct, direction: Tensor, operator: Operator) -> tuple[Tensor, Tensor]:
    """Return scores (n,) and Gram matrix (n, n) from blocks of rows of every G_i, each formed once and forgotten."""
    a: Any = record.inputs
    b: Any = record.output_grads
    n = a.shape[0]
    height, width = matrix_shape(record.shape)
    rows = max(1, block_bytes(a) // (n * width * max(b.element_size(), 4)))
    scores: Any = None
    gram: Any = None
    for start in range(0, height, rows):
        part = slice(start, min(start + rows, height))
        g = product(b[:, :, part].mT, a)  # (n, r, d_in)
        score = g.view(n, -1) @ direction[part].reshape(-1).to(g.dtype)
        flat = g.mul_(root_of(operator, part)).view(n, -1)  # (n, r d_in)
        scores = score if scores is None else scores + score
        gram = gram_of(flat) if gram is None else gram.add_(gram_of(flat))
    return scores, gram
