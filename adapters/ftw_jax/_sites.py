"""Where in a loss the gradient of a parameter is an outer product: found in its program, before anything is computed.

The loss of one example is traced into a jaxpr. A product of activations with a parameter (`Product`), or the look-up of
its rows (`Lookup`), is a *site*: there the gradient is made of what went in and of the gradient of what came out. Sites
are found through casts, transposes, jitted functions, rematerialised ones and scans; a parameter that a scan walks over
layer by layer (``levels`` True) is a stack of matrices, one that it uses at every step (False) has more tokens. Every
other use of a parameter (a bias, a norm, a convolution) is left to plain differentiation: ``Plan.rest``.

This is a static account: shapes only. ``_capture.py`` runs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from . import _jaxprs, _names

__all__ = ["Lookup", "Plan", "Product", "Ref", "Site", "make"]

CALLS = {"jit", "pjit", "closed_call", "core_call"}
REMATERIALISED = {"checkpoint", "remat", "remat2"}


@dataclass(frozen=True)
class Ref:
    """A parameter under another name: cast, transposed, or one layer of it."""

    leaf: int
    swapped: bool = False
    levels: tuple[bool, ...] = ()  # of the scans around, outermost first: does it slice the parameter?


@dataclass(frozen=True)
class Site:
    """One use of a parameter whose gradient is made of two factors."""

    leaf: int
    levels: tuple[bool, ...]
    lengths: tuple[int, ...]  # of the scans around
    shape: tuple[int, ...]  # of the parameter, or of one layer of it
    split: int  # the first so many axes are the rows of the matrix
    out: Any  # ShapeDtypeStruct of what comes out

    @property
    def stack(self) -> tuple[int, ...]:
        """The axes of layers in front of the matrix."""
        return tuple(n for n, sliced in zip(self.lengths, self.levels, strict=True) if sliced)

    @property
    def matrix(self) -> tuple[int, int]:
        """The shape of the matrix."""
        return math.prod(self.shape[: self.split]), math.prod(self.shape[self.split :])


@dataclass(frozen=True)
class Product(Site):
    """``x`` contracted with the first axes of the parameter (``leading``), or with the last."""

    leading: bool
    parameter: int  # which operand it is: 0 or 1
    contracted: tuple[int, ...]  # axes of x, in the order of the parameter's

    @property
    def free(self) -> int:
        """How many axes of the result come from the parameter."""
        return len(self.shape) - len(self.contracted)

    @property
    def tokens(self) -> int:
        """Tokens of one example."""
        own: int = math.prod(self.out.shape) // max(1, self.matrix[1 if self.leading else 0])
        return own * math.prod(n for n, sliced in zip(self.lengths, self.levels, strict=True) if not sliced)

    @property
    def elements(self) -> int:
        """Numbers kept for one example."""
        return self.tokens * sum(self.matrix) * math.prod(self.stack)


@dataclass(frozen=True)
class Lookup(Site):
    """Rows of the parameter picked by index; ``drops``: an index out of range gives nothing (else it is clipped)."""

    drops: bool

    @property
    def elements(self) -> int:
        """Numbers kept for one example."""
        numbers: int = math.prod(self.out.shape) * math.prod(self.lengths)
        return numbers


@dataclass
class Plan:
    """What to do at which equation of a jaxpr: a Site, a Plan of the body, or "alias"."""

    actions: dict[int, Any] = field(default_factory=dict)
    sites: list[Product | Lookup] = field(default_factory=list)  # in the order of the equations, bodies included
    rest: set[int] = field(default_factory=set)  # parameters with other uses


def make(jaxpr: Any, refs: list[Ref | None], lengths: tuple[int, ...] = ()) -> Plan:
    """Return the plan of a jaxpr whose inputs are the parameters named in ``refs``."""
    plan = Plan()
    env = {v: r for v, r in zip(jaxpr.invars, refs, strict=True) if r is not None}

    def ref(atom: Any) -> Ref | None:
        return None if isinstance(atom, Literal) else env.get(atom)

    for number, eqn in enumerate(jaxpr.eqns):
        found = [ref(v) for v in eqn.invars]
        if not any(found):
            continue
        name = eqn.primitive.name
        alias = _alias(name, eqn, found[0])
        site = _site(name, eqn, found, lengths)
        if alias is not None:
            env[eqn.outvars[0]] = alias
            plan.actions[number] = "alias"
        elif site is not None:
            plan.actions[number] = site
            plan.sites.append(site)
        elif name in CALLS or name in REMATERIALISED or name == "scan":
            inner, kept = _body_plan(name, eqn, found, lengths)
            plan.rest |= inner.rest | kept
            if inner.sites:
                plan.actions[number] = inner
                plan.sites += inner.sites
        else:
            plan.rest |= {r.leaf for r in found if r is not None}
    plan.rest |= {r.leaf for r in map(ref, jaxpr.outvars) if r is not None}
    return plan


def _body_plan(name: str, eqn: Any, found: list[Ref | None], lengths: tuple[int, ...]) -> tuple[Plan, set[int]]:
    """Return the plan of an equation's body, and the parameters whose use as a whole is not followed into it."""
    jaxpr, _ = _jaxprs.body(eqn)
    if name != "scan":
        return make(jaxpr, found, lengths), set()
    consts, carry = eqn.params["num_consts"], eqn.params["num_carry"]
    inner: list[Ref | None] = []
    kept = set()
    for place, r in enumerate(found):
        if r is None:
            inner.append(None)
        elif place < consts:
            inner.append(Ref(r.leaf, r.swapped, (*r.levels, False)))
        elif place < consts + carry or r.swapped:
            kept.add(r.leaf)
            inner.append(None)
        else:
            inner.append(Ref(r.leaf, False, (*r.levels, True)))
    return make(jaxpr, inner, (*lengths, eqn.params["length"])), kept


def _alias(name: str, eqn: Any, r: Ref | None) -> Ref | None:
    """Return the parameter that the result still is, if it is one."""
    if r is None:
        return None
    out = eqn.outvars[0].aval
    if name in ("copy", "copy_p") or (name == "convert_element_type" and jnp.issubdtype(out.dtype, jnp.floating)):
        return r
    if name == "transpose" and tuple(eqn.params["permutation"]) == (1, 0):
        return Ref(r.leaf, not r.swapped, r.levels)
    return None


def _site(name: str, eqn: Any, found: list[Ref | None], lengths: tuple[int, ...]) -> Product | Lookup | None:
    if name == "dot_general" and sum(r is not None for r in found) == 1:
        return _product(eqn, found, lengths)
    if name == "gather" and found[0] is not None and found[1] is None:
        return _lookup(eqn, found[0], lengths)
    return None


def _product(eqn: Any, found: list[Ref | None], lengths: tuple[int, ...]) -> Product | None:
    contract, batch = eqn.params["dimension_numbers"]
    place = 0 if found[0] is not None else 1
    r = found[place]
    assert r is not None
    shape = eqn.invars[place].aval.shape
    out = eqn.outvars[0].aval
    if batch[0] or len(shape) < 2 or not jnp.issubdtype(out.dtype, jnp.floating):
        return None
    own, other = [int(d) for d in contract[place]], [int(d) for d in contract[1 - place]]
    if r.swapped:
        shape, own = shape[::-1], [1 - d for d in own]
    pairs = sorted(zip(own, other, strict=True))
    own, other = [p[0] for p in pairs], [p[1] for p in pairs]
    rank, count = len(shape), len(own)
    if not 0 < count < rank:
        return None
    leading, trailing = own == list(range(count)), own == list(range(rank - count, rank))
    if not (leading or trailing):
        return None
    split = count if leading else rank - count
    return Product(
        r.leaf,
        r.levels,
        lengths,
        tuple(shape),
        split,
        _names.struct(out.shape, out.dtype),
        leading,
        place,
        tuple(other),
    )


def _lookup(eqn: Any, r: Ref, lengths: tuple[int, ...]) -> Lookup | None:
    numbers, shape, out = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape, eqn.outvars[0].aval
    if r.swapped or len(shape) != 2 or tuple(eqn.params["slice_sizes"]) != (1, shape[1]):
        return None
    drops = eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP
    layout = tuple(numbers.offset_dims), tuple(numbers.collapsed_slice_dims), tuple(numbers.start_index_map)
    whole_rows = layout == ((out.ndim - 1,), (0,), (0,))
    sliced = (
        layout == ((out.ndim - 2, out.ndim - 1), (), (0, 1)) and not drops
    )  # table[i] under vmap: the column is clipped to 0
    if not (whole_rows or sliced) or tuple(numbers.operand_batching_dims):
        return None
    return Lookup(r.leaf, r.levels, lengths, tuple(shape), 1, _names.struct(out.shape, out.dtype), drops)
