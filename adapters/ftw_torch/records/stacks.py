"""Gradients of many parameters at once: matrices of one shape on a common axis, vectors side by side, the rest alone.

A layer of little arithmetic costs what its calls cost. Stacked, the layers of one shape share them: L layers are one
product of batches. A copy of the factors is the price, which layers with much arithmetic do not get back
(`launch_bound`).

Each of the three kinds answers the same questions about a pool of n samples and m target samples whose factors it
holds: the target's mean, and once the operators are known scores, lengths, Gram matrix and update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ftw.geometry import Diagonal, Operator, Scale
from ftw.gradients import Record
from ftw_torch.step.stream import score_by

from .dtypes import promoted
from .pool import Pool, inner

__all__ = ["Held", "Others", "Selected", "Stack", "Vectors", "elementwise", "launch_bound"]

CALLS = 60  # calls that a layer of its own costs, by the counts of docs/cost.md, less its share of a stack's
SECONDS = {"cpu": 5e-6, "cuda": 1e-5}  # of a call that does nothing
FLOPS = {"cpu": 4e10, "cuda": 1e14}  # a second, on one thread; of a small product on a GPU
LARGEST = 2**22  # bytes of a layer's factors
WASTE = 0.5  # of a stacked layer's arithmetic: copies, blocks that miss the cache, nothing materialized


def launch_bound(n: int, t: int, shape: Sequence[int], device: torch.device) -> bool:
    """Return whether the calls of a layer cost more than stacking wastes of its ``6 n t d_out d_in`` FLOPs.

    Its factors must be small too: they are held for all layers until the backward is over.
    """
    if n * t * sum(shape) * 4 > LARGEST:
        return False
    kind = device.type if device.type in SECONDS else "cuda"
    rate = FLOPS[kind] * (torch.get_num_threads() if kind == "cpu" else 1)
    return WASTE * 6 * n * t * shape[0] * shape[1] / rate <= CALLS * SECONDS[kind]


class Selected(NamedTuple):
    """Selected samples and their weights, none zero, on the device."""

    indices: Tensor  # (k,)
    weights: Tensor  # (k,)
    pairs: list[tuple[int, float]]


class Held(Protocol):
    """Gradients of some parameters, for a pool and a target."""

    def mean(self, *, lengths: bool) -> dict[str, Tensor]:
        """Return g_T of each parameter; with ``lengths`` keep what `lengths` will need."""
        ...

    def respond(self, operators: Mapping[str, Operator]) -> None:
        """Take in P."""
        ...

    def scores(self, other: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``<g_i, P g_T>`` (n,), or ``<g_i, P other>``."""
        ...

    def square(self) -> Tensor:
        """Return ``<g_T, P g_T>`` ()."""
        ...

    def lengths(self, operators: Mapping[str, Operator] | None = None) -> Tensor:
        """Return ``<g_Tj, P g_Tj>`` (m,), for the step's P or another."""
        ...

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        ...

    def combine(self, selected: Selected) -> dict[str, Tensor]:
        """Return ``sum_i w_i g_i`` of each parameter."""
        ...

    def length(self, update: Mapping[str, Tensor]) -> Tensor:
        """Return ``<u, P u>`` () of what `combine` returned last."""
        ...


def elementwise(operators: Sequence[Operator], like: Tensor) -> Tensor:
    """Return the values of operators that are numbers or diagonals, (L, *shape), for ``like`` (L, *shape)."""
    if all(isinstance(operator, Diagonal) for operator in operators):
        return torch.stack([_values(operator) for operator in operators])
    parts = []
    for operator, x in zip(operators, like, strict=True):
        if isinstance(operator, Diagonal):
            values = _values(operator)
        elif isinstance(operator, Scale):
            values = (x.new_ones((), dtype=promoted(x.dtype)) * operator.value).expand(x.shape)
        else:
            raise TypeError(f"the optimizer's response is a {type(operator).__name__}, not elementwise")
        parts.append(values.reshape(x.shape))
    return torch.stack(parts)


def _values(operator: Operator) -> Tensor:
    values: Any = operator.values  # type: ignore[union-attr]
    found: Tensor = values
    return found


class Stack:
    """Matrices of one shape: factors with a layer's axis in front.

    Parameters
    ----------
    names : sequence of str
        L parameters.
    pool, target : (tensor (L, n, t, d_in), tensor (L, n, t, d_out)), with m samples for the target
    """

    def __init__(
        self, names: Sequence[str], pool: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor], wide: torch.dtype
    ) -> None:
        self.names = list(names)
        self.inputs, self.grads = (x.to(wide) for x in pool)
        self.target = tuple(x.to(wide) for x in target)
        self._each: Tensor | None = None  # (L, m, d_out, d_in)

    def mean(self, *, lengths: bool) -> dict[str, Tensor]:
        """Return g_T."""
        a, b = self.target  # (L, m, t, d_in), (L, m, t, d_out)
        layers, m, t, _ = a.shape
        if lengths:
            self._each = torch.matmul(b.mT, a)
            self.target_mean = self._each.mean(1)  # (L, d_out, d_in)
        else:
            self.target_mean = torch.bmm(b.reshape(layers, m * t, -1).mT, a.reshape(layers, m * t, -1)).div_(m)
        return dict(zip(self.names, self.target_mean.unbind(0), strict=True))

    def respond(self, operators: Mapping[str, Operator]) -> None:
        """Take in P."""
        self.values = self._values(operators)  # (L, d_out, d_in)
        self.direction = self.values * self.target_mean

    def scores(self, other: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``<g_i, P g_T>`` (n,)."""
        m = self.direction
        if other is not None:
            m = self.values * torch.stack([other[name] for name in self.names])
        a, b = self.inputs, self.grads
        if m.shape[1] > m.shape[2]:
            a, b, m = b, a, m.mT
        layers, n, t, _ = a.shape
        z = torch.bmm(b.reshape(layers, n * t, -1), m)  # (L, n t, d)
        found: Tensor = torch.linalg.vecdot(z.view(layers, n, -1), a.reshape(layers, n, -1)).sum(0)
        return found

    def square(self) -> Tensor:
        """Return ``<g_T, P g_T>`` ()."""
        return torch.dot(self.direction.reshape(-1), self.target_mean.reshape(-1))

    def lengths(self, operators: Mapping[str, Operator] | None = None) -> Tensor:
        """Return ``<g_Tj, P g_Tj>`` (m,)."""
        assert self._each is not None
        values = self.values if operators is None else self._values(operators)
        return (self._each.square() * values[:, None]).sum((0, 2, 3))

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        a, b = self.inputs.index_select(1, indices), self.grads.index_select(1, indices)  # (L, s, t, d)
        g = torch.matmul(b.mT, a).mul_(self.values.sqrt()[:, None]).flatten(2)  # (L, s, d_out d_in)
        return torch.bmm(g, g.mT).sum(0)

    def combine(self, selected: Selected) -> dict[str, Tensor]:
        """Return the update."""
        a = self.inputs.index_select(1, selected.indices).flatten(1, 2)  # (L, k t, d_in)
        b = self.grads.index_select(1, selected.indices) * selected.weights.to(self.grads.dtype)[:, None, None]
        self.update = torch.bmm(b.flatten(1, 2).mT, a)  # (L, d_out, d_in)
        return dict(zip(self.names, self.update.unbind(0), strict=True))

    def length(self, update: Mapping[str, Tensor]) -> Tensor:
        """Return ``<u, P u>`` ()."""
        del update
        return torch.dot((self.values * self.update).reshape(-1), self.update.reshape(-1))

    def _values(self, operators: Mapping[str, Operator]) -> Tensor:
        return elementwise([operators[name] for name in self.names], self.target_mean)


class Vectors:
    """Gains and shifts side by side.

    Parameters
    ----------
    names : sequence of str
    pool : tensor (n, p)
    target : tensor (m, p)
    sizes : sequence of int
        Their sum is p.
    """

    def __init__(self, names: Sequence[str], pool: Tensor, target: Tensor, sizes: Sequence[int]) -> None:
        self.names, self.grads, self.target, self.sizes = list(names), pool, target, list(sizes)

    def mean(self, *, lengths: bool) -> dict[str, Tensor]:
        """Return g_T."""
        del lengths
        self.target_mean = self.target.mean(0)  # (p,)
        return self._split(self.target_mean)

    def respond(self, operators: Mapping[str, Operator]) -> None:
        """Take in P."""
        self.values = self._values(operators)  # (p,)
        self.direction = self.values * self.target_mean

    def scores(self, other: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``<g_i, P g_T>`` (n,)."""
        if other is None:
            return self.grads @ self.direction
        return self.grads @ (self.values * torch.cat([other[name] for name in self.names]))

    def square(self) -> Tensor:
        """Return ``<g_T, P g_T>`` ()."""
        return torch.dot(self.direction, self.target_mean)

    def lengths(self, operators: Mapping[str, Operator] | None = None) -> Tensor:
        """Return ``<g_Tj, P g_Tj>`` (m,)."""
        return self.target.square() @ (self.values if operators is None else self._values(operators))

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        x = self.grads.index_select(0, indices) * self.values.sqrt()  # (s, p)
        return x @ x.T

    def combine(self, selected: Selected) -> dict[str, Tensor]:
        """Return the update."""
        self.update = selected.weights.to(self.grads.dtype) @ self.grads.index_select(0, selected.indices)  # (p,)
        return self._split(self.update)

    def length(self, update: Mapping[str, Tensor]) -> Tensor:
        """Return ``<u, P u>`` ()."""
        del update
        return torch.dot(self.values * self.update, self.update)

    def _values(self, operators: Mapping[str, Operator]) -> Tensor:
        own = [operators[name] for name in self.names]
        if all(isinstance(operator, Diagonal) for operator in own):
            return torch.cat([_values(operator) for operator in own])
        pieces = zip(own, torch.split_with_sizes(self.target_mean, self.sizes), strict=True)
        return torch.cat([elementwise([operator], x[None])[0] for operator, x in pieces])

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, torch.split_with_sizes(x, self.sizes), strict=True))


class Others:
    """Parameters by themselves: embeddings, those used several times, those of much arithmetic.

    Parameters
    ----------
    parameters : mapping of str to Parameter
    pool, target : mapping of str to record
        A parameter that was not used may be missing.
    n, m : int
        Samples of both.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        pool: Mapping[str, Record],
        target: Mapping[str, Record],
        n: int,
        m: int,
    ) -> None:
        self.records, self.n, self.m = pool, n, m
        self.pool, self.target = Pool(parameters, [pool], [n]), Pool(parameters, [target], [m])
        self.parameters = parameters

    def mean(self, *, lengths: bool) -> dict[str, Tensor]:
        """Return g_T of those that the target used."""
        del lengths
        self.target_mean = self.target.combine(range(self.m), [1 / self.m] * self.m)
        return self.target_mean

    def respond(self, operators: Mapping[str, Operator]) -> None:
        """Take in P."""
        self.operators = {name: operators[name] for name in self.parameters}

    def scores(self, other: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return ``<g_i, P g_T>`` (n,)."""
        other = self.target_mean if other is None else other
        some = [name for name in self.records if name in other]
        parts = [score_by(self.records[name], self.operators[name].apply(other[name])) for name in some]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def square(self) -> Tensor:
        """Return ``<g_T, P g_T>`` ()."""
        return _total([inner(g, self.operators[name], g) for name, g in self.target_mean.items()])

    def lengths(self, operators: Mapping[str, Operator] | None = None) -> Tensor:
        """Return ``<g_Tj, P g_Tj>`` (m,)."""
        return self.target.lengths(self.operators if operators is None else operators)

    def gram(self, indices: Tensor) -> Tensor:
        """Return ``<g_i, P g_j>`` (s, s)."""
        return self.pool.gram(self.operators, indices)

    def combine(self, selected: Selected) -> dict[str, Tensor]:
        """Return the update."""
        places, weights = zip(*selected.pairs, strict=True)
        return self.pool.combine(places, weights)

    def length(self, update: Mapping[str, Tensor]) -> Tensor:
        """Return ``<u, P u>`` ()."""
        own = {name: update[name] for name in self.parameters if name in update}
        return _total([inner(g, self.operators[name], g) for name, g in own.items()])


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]
