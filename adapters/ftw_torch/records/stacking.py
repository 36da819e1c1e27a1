"""From the firings of a planned pass to gradients held together: which parameters share a stack, and which do not."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ftw.gradients import Record
from ftw_torch.capture.replay import Firing, records_of

from .dtypes import promoted
from .join import merge
from .stacks import Held, Others, Stack, Vectors, launch_bound

__all__ = ["Part", "hold", "is_small"]


class Part(NamedTuple):
    """One use of one parameter, of all samples of a pass."""

    firing: Firing
    bias: bool


class _Pass:
    """The firings of one pass, sorted by parameter; each is let go once it is copied, for the next copy's memory."""

    def __init__(self, firings: list[Firing], samples: int) -> None:
        self.samples = samples
        self.parts: dict[str, list[Part]] = defaultdict(list)
        for firing in firings:
            if firing.site.weight is not None:
                self.parts[firing.site.weight].append(Part(firing, False))
            if firing.site.bias is not None:
                self.parts[firing.site.bias].append(Part(firing, True))

    def release(self, names: Sequence[str]) -> None:
        """Let the firings of parameters go."""
        for name in names:
            del self.parts[name]

    def grads(self, names: Sequence[str]) -> Tensor:
        """Return output gradients (L, n, t, d)."""
        return torch.stack([self._tokens(self.parts[name][0].firing.output_grads) for name in names])

    def inputs(self, names: Sequence[str]) -> Tensor:
        """Return inputs (L, n, t, d)."""
        return torch.stack([self._tokens(self.parts[name][0].firing.inputs) for name in names])

    def _tokens(self, x: Tensor) -> Tensor:
        return x if x.ndim == 3 else x.reshape(self.samples, -1, x.shape[-1])

    def record(self, name: str, samples: slice) -> Record | None:
        """Return the record of some samples for one parameter, None if it was not used."""
        found = [
            record
            for firing, _ in self.parts.get(name, ())
            for own, record in records_of(_cut(firing, samples))
            if own == name
        ]
        return merge(found) if found else None


def hold(
    parameters: Mapping[str, nn.Parameter],
    pool: tuple[list[Firing], int],
    target: tuple[list[Firing], int] | None,
    n: int,
    m: int,
) -> list[Held] | None:
    """Return the gradients of a pool of n and a target of m, None if a layer is not bound by its calls.

    Parameters
    ----------
    parameters : mapping of str to Parameter
    pool, target : (list of Firing, number of samples)
        Of two passes, emptied; the target is None if one pass held the pool and, behind it, the target.
    n, m : int
    """
    passes = [_Pass(*pool)] if target is None else [_Pass(*pool), _Pass(*target)]
    pool[0].clear()
    if target is not None:
        target[0].clear()
    groups = _groups(parameters, passes)
    if groups is None:
        return None
    stacks, vectors, rest = groups
    held: list[Held] = []
    for dtype in {dtype for dtype, *_ in vectors}:
        held.append(_vectors({key: names for key, names in vectors.items() if key[0] == dtype}, passes, n))
    held += [_stack(kind, names, passes, n) for (kind, *_), names in stacks.items()]
    if rest:
        held.append(_others({name: parameters[name] for name in rest}, passes, n, m))
    return held


def is_small(firing: Firing, samples: int) -> bool:
    """Return whether a layer that is held with others is bound by its calls, for so many samples."""
    site, x, g, _ = firing
    if site.kind not in ("linear", "right") or site.weight is None:
        return True
    return launch_bound(samples, math.prod(x.shape[1:-1]), (x.shape[-1], g.shape[-1]), x.device)


def _groups(
    parameters: Mapping[str, nn.Parameter], passes: list[_Pass]
) -> tuple[dict[Any, list[str]], dict[Any, list[str]], list[str]] | None:
    """Return the matrices and the vectors that may be held together, and all others; None if a layer is too large."""
    stacks: dict[Any, list[str]] = defaultdict(list)
    vectors: dict[Any, list[str]] = defaultdict(list)
    rest: list[str] = []
    for name in parameters:
        uses = [one.parts[name] for one in passes if name in one.parts]
        if not uses:
            continue
        firing, bias = uses[0][0]
        site, g = firing.site, firing.output_grads
        if len(uses) < len(passes) or any(len(found) > 1 for found in uses) or site.kind == "rows":
            rest.append(name)
            continue
        key = tuple((f.inputs.shape, f.output_grads.shape, f.output_grads.dtype) for ((f, _),) in uses)
        if bias:
            vectors[promoted(g.dtype), "bias", *key].append(name)
        elif site.kind == "norm":
            vectors[promoted(g.dtype), site.same, *key].append(name)
        else:
            if not is_small(firing, passes[0].samples):
                return None
            stacks[site.kind, *key].append(name)
    return stacks, vectors, rest


def _stack(kind: str, names: list[str], passes: list[_Pass], n: int) -> Stack:
    factors = [(one.inputs(names), one.grads(names)) for one in passes]
    for one in passes:
        one.release(names)
    if kind == "right":
        factors = [(b, a) for a, b in factors]
    pool, target = factors[0], factors[-1]
    if len(passes) == 1:
        (a, b) = factors[0]
        pool, target = (a[:, :n], b[:, :n]), (a[:, n:], b[:, n:])
    return Stack(names, pool, target, promoted(pool[1].dtype))


def _vectors(groups: Mapping[Any, list[str]], passes: list[_Pass], n: int) -> Vectors:
    rows: list[list[Tensor]] = [[] for _ in passes]  # of each pass: (n, d) of each parameter
    names: list[str] = []
    for (_, what, *_), group in groups.items():
        names += group
        for one, row in zip(passes, rows, strict=True):
            b = one.grads(group)  # (L, n, t, d)
            b = b.to(promoted(b.dtype))
            if what != "bias":
                a = one.inputs(group).to(b.dtype)
                b = b * one.parts[group[0]][0].firing.site.normalised(a)
            row += b.sum(2).unbind(0)
            one.release(group)
    sizes = [x.shape[1] for x in rows[0]]
    whole = [torch.cat(row, 1) for row in rows]
    if len(passes) == 1:
        return Vectors(names, whole[0][:n], whole[0][n:], sizes)
    return Vectors(names, whole[0], whole[1], sizes)


def _others(parameters: Mapping[str, nn.Parameter], passes: list[_Pass], n: int, m: int) -> Others:
    pool: dict[str, Record] = {}
    target: dict[str, Record] = {}
    joint = len(passes) == 1
    for name in parameters:
        for found, one, samples in (
            (pool, passes[0], slice(0, n)),
            (target, passes[-1], slice(n, n + m) if joint else slice(0, m)),
        ):
            record = one.record(name, samples)
            if record is not None:
                found[name] = record
    return Others(parameters, pool, target, n, m)


def _cut(firing: Firing, samples: slice) -> Firing:
    return firing._replace(inputs=firing.inputs[samples], output_grads=firing.output_grads[samples])
