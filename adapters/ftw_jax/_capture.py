"""Per-sample gradients of a loss, as factors where that is smaller and materialized where it is not.

The loss's own program is run once more for each example, by the plan of ``_sites.py``: at a site the parameter is a
constant, a zero is added to what comes out, and what went in is returned besides the loss. The gradient of that zero is
the output gradient, so the backward pass goes to activations only, and no matrix's gradient is formed that is kept as
factors. The model needs no change, and the framework it is written in does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from ftw import Dense, OuterProduct, Rows, Sum
from ftw.gradients import Record

from . import _jaxprs, _names, _sites
from ._layout import View, share
from ._sites import Lookup, Plan, Product, Ref

__all__ = ["Captured", "per_sample", "routes", "sharing", "trace"]

Loss = Callable[[Any, Any], Any]


class Traced(NamedTuple):
    """A loss of one example, traced, and what it offers."""

    program: Any  # ClosedJaxpr: (*leaves, *example) -> loss
    plan: Plan
    views: list[View]  # how each parameter appears among the records


class Captured(NamedTuple):
    """Per-sample gradients: records by name, the view of each parameter, and the losses (n,)."""

    records: dict[str, Record]
    losses: Any


def trace(loss: Loss, params: Any, batch: Any, *, only: frozenset[int] | None = None, program: Any = None) -> Traced:
    """Trace the loss of one example of a batch and find the sites of its parameters, or of some of them."""
    if program is None:
        program = jax.make_jaxpr(loss)(params, _names.example(batch))
    leaves, others = len(jax.tree.leaves(params)), len(program.jaxpr.invars)
    refs = [Ref(i) if only is None or i in only else None for i in range(leaves)]
    plan = _sites.make(program.jaxpr, [*refs, *[None] * (others - leaves)])
    bad = _inconsistent(plan)
    if bad:
        keep = frozenset(r.leaf for r in refs if r is not None) - bad
        return trace(loss, params, batch, only=keep, program=program)
    if only is not None:
        plan.rest |= set(range(leaves)) - only
    sites = {s.leaf: s for s in plan.sites}
    views = [
        View(name, p.shape, sites[i].stack, sites[i].matrix) if i in sites else View(name, p.shape)
        for i, (name, p) in enumerate(_names.flatten(params, what="params")[0].items())
    ]
    return Traced(program, plan, views)


def sharing(traced: Traced, params: Any, *, apart: frozenset[str]) -> Traced:
    """Return a trace in which small parameters without a site share a record, those named in ``apart`` not."""
    sites = {s.leaf for s in traced.plan.sites}
    leaves = [i for i, v in enumerate(traced.views) if i not in sites and v.name not in apart]
    return traced._replace(views=share(traced.views, [p.dtype for p in jax.tree.leaves(params)], leaves))


def _inconsistent(plan: Plan) -> frozenset[int]:
    """Return the parameters whose sites see different matrices in them."""
    seen: dict[int, set[Any]] = {}
    for site in plan.sites:
        seen.setdefault(site.leaf, set()).add((site.stack, site.matrix))
    return frozenset(leaf for leaf, kinds in seen.items() if len(kinds) > 1)


def routes(traced: list[Traced], params: Any, capture: str) -> tuple[frozenset[int], dict[str, tuple[str, int]]]:
    """Choose which parameters are kept as factors, by the memory of one example, which is stated.

    Returns
    -------
    frozenset of int
        The numbers of those parameters.
    dict
        ``{name: (route, bytes)}`` with "factors" or "dense", and bytes for one example of the largest kind.
    """
    leaves, _ = _names.flatten(params, what="params")
    chosen, stated = set(), {}
    for leaf, (name, p) in enumerate(leaves.items()):
        dense = math.prod(p.shape) * p.dtype.itemsize
        options = []
        for t in traced:
            sites = [s for s in t.plan.sites if s.leaf == leaf]
            extra = dense if leaf in t.plan.rest else 0
            options.append(sum(s.elements * s.out.dtype.itemsize for s in sites) + extra if sites else None)
        factors = None if None in options else max(o for o in options if o is not None)
        by_factors = factors is not None and (capture == "factors" or (capture == "auto" and factors < dense))
        if by_factors:
            chosen.add(leaf)
        stated[name] = ("factors", factors) if by_factors else ("dense", dense)
    return frozenset(chosen), stated  # type: ignore[return-value]


def per_sample(traced: Traced, params: Any, batch: Any, micro_batch: int | None = None) -> Captured:
    """Return the gradients of n samples by name of the views' records, and their losses.

    Notes
    -----
    A forward pass and a backward pass to activations for each sample, and the gradients of what is left over; for all
    samples at once, or for ``micro_batch`` at a time.
    """
    leaves = jax.tree.leaves(params)
    rest = sorted(traced.plan.rest)
    shared: dict[str, list[int]] = {}
    for leaf, view in enumerate(traced.views):
        if view.shared is not None:
            shared.setdefault(view.shared, []).append(leaf)

    def loss_of(zeros: Any, live: Any, example: Any) -> Any:
        values = list(leaves)
        for leaf, value in zip(rest, live, strict=True):
            values[leaf] = value
        inputs = [*values, *jax.tree.leaves(example)]
        frozen = [*leaves, *[None] * (len(inputs) - len(leaves))]
        outs, seen = _run(traced.program.jaxpr, traced.program.consts, traced.plan, inputs, frozen, zeros)
        return outs[0], seen

    def one(example: Any) -> Any:
        zeros = [jnp.zeros((*s.lengths, *s.out.shape), s.out.dtype) for s in traced.plan.sites]
        live = [leaves[i] for i in rest]
        (value, seen), (output_grads, grads) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(
            zeros, live, example
        )
        found = dict(zip(rest, grads, strict=True))
        flat = {}
        for name, members in shared.items():
            parts = [found.pop(i) if i in found else jnp.zeros_like(leaves[i]) for i in members]
            flat[name] = jnp.concatenate([jnp.reshape(g, (-1,)) for g in parts])
        return value, seen, output_grads, found, flat

    n = jax.tree.leaves(batch)[0].shape[0]
    every = jax.vmap(one) if micro_batch is None or micro_batch >= n else _in_micro_batches(one, micro_batch)
    losses, seen, output_grads, found, flat = every(batch)
    parts: list[list[list[Any]]] = [[] for _ in leaves]  # of each parameter: its uses, each a list by layer
    for site, x, b in zip(traced.plan.sites, seen, output_grads, strict=True):
        parts[site.leaf].append(_records(site, x, b))
    for leaf, g in found.items():
        view = traced.views[leaf]
        if view.matrix is None:
            parts[leaf].append([Dense(g)])
        else:
            stack = jnp.reshape(g, (g.shape[0], -1, *view.matrix))  # (n, layers, rows, columns)
            parts[leaf].append([Dense(stack[:, i]) for i in range(stack.shape[1])])
    records: dict[str, Record] = {name: Dense(g) for name, g in flat.items()}
    for leaf, view in enumerate(traced.views):
        if view.shared is not None:
            continue
        if not parts[leaf]:  # the loss does not depend on it
            parts[leaf] = [[Dense(jnp.zeros((n, *view.shape), leaves[leaf].dtype))]]
        for name, uses in zip(view.names, zip(*parts[leaf], strict=True), strict=True):
            records[name] = uses[0] if len(uses) == 1 else Sum(tuple(uses))
    return Captured(records, losses)


def _in_micro_batches(one: Any, size: int) -> Any:
    """Return a map over the samples, a micro-batch at a time; one at a time, nothing is vmapped."""
    return lambda batch: jax.lax.map(one, batch, batch_size=None if size == 1 else size)


def _run(
    jaxpr: Any, consts: Any, plan: Plan, inputs: list[Any], frozen: list[Any], zeros: list[Any]
) -> tuple[list[Any], list[Any]]:
    """Evaluate a jaxpr by its plan; returns its outputs and what each site saw.

    ``frozen`` are the parameters as constants, None for other inputs; ``inputs`` the same to be differentiated.
    """
    env: dict[Any, Any] = {}
    constant: dict[Any, Any] = {v: f for v, f in zip(jaxpr.invars, frozen, strict=True) if f is not None}
    env.update(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))
    seen: list[Any] = []

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else env[atom]

    def held(atom: Any) -> Any:
        return None if isinstance(atom, Literal) else constant.get(atom)

    for number, eqn in enumerate(jaxpr.eqns):
        values, action = [read(v) for v in eqn.invars], plan.actions.get(number)
        if isinstance(action, Product):
            place = action.parameter
            values[place] = held(eqn.invars[place])
            seen.append(_tokens(values[1 - place], action))
            outs = [_jaxprs.bind(eqn, values)[0] + zeros[len(seen) - 1]]
        elif isinstance(action, Lookup):
            values[0] = held(eqn.invars[0])
            seen.append(values[1][..., 0])
            outs = [_jaxprs.bind(eqn, values)[0] + zeros[len(seen) - 1]]
        elif isinstance(action, Plan):
            mine = zeros[len(seen) : len(seen) + len(action.sites)]
            outs, new = _body(eqn, action, values, [held(v) for v in eqn.invars], mine)
            seen += new
        else:
            outs = _jaxprs.bind(eqn, values)
            if action == "alias" and held(eqn.invars[0]) is not None:
                constant[eqn.outvars[0]] = _jaxprs.bind(eqn, [held(eqn.invars[0])])[0]
        env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars], seen


def _body(eqn: Any, plan: Plan, values: list[Any], frozen: list[Any], zeros: list[Any]) -> tuple[list[Any], list[Any]]:
    """Run the body of a call, a rematerialised function or a scan by its plan."""
    jaxpr, consts = _jaxprs.body(eqn)
    if eqn.primitive.name in _sites.REMATERIALISED:

        def again(v: Any, f: Any, z: Any) -> Any:
            return _run(jaxpr, consts, plan, v, f, z)

        options = {k: eqn.params[k] for k in ("prevent_cse", "policy")}
        result: tuple[list[Any], list[Any]] = jax.checkpoint(again, **options)(values, frozen, zeros)
        return result
    if eqn.primitive.name != "scan":
        return _run(jaxpr, consts, plan, values, frozen, zeros)
    first, carried = eqn.params["num_consts"], eqn.params["num_carry"]
    last = first + carried

    def step(carry: Any, xs: Any) -> Any:
        sliced, held, z = xs
        outs, seen = _run(
            jaxpr, consts, plan, [*values[:first], *carry, *sliced], [*frozen[:first], *[None] * carried, *held], z
        )
        return outs[:carried], (outs[carried:], seen)

    options = {k: eqn.params[k] for k in ("length", "reverse", "unroll")}
    carry, (ys, seen) = jax.lax.scan(step, values[first:last], (values[last:], frozen[last:], zeros), **options)
    return [*carry, *ys], seen


def _tokens(x: Any, site: Product) -> Any:
    """Return what went into a product as (tokens, contracted)."""
    free = [d for d in range(x.ndim) if d not in site.contracted]
    x = jnp.transpose(x, (*free, *site.contracted))
    width = math.prod(x.shape[len(free) :])
    return jnp.reshape(x, (-1, width))


def _records(site: Product | Lookup, x: Any, b: Any) -> list[Any]:
    """Return the records of a site, one a layer, from what it saw and the gradients of what it gave."""
    depth = len(site.lengths)
    lead = b.ndim - len(site.out.shape)  # samples and scans
    if isinstance(site, Lookup):
        ids = jnp.reshape(x.astype(int), (*x.shape[: 1 + depth], -1))  # (n, *scans, tokens), no longer narrow
        b = jnp.reshape(b, (*b.shape[:lead], -1, site.shape[1]))  # (n, *scans, tokens, d)
        if site.drops:
            b = jnp.where(((ids >= 0) & (ids < site.shape[0]))[..., None], b, 0)
        ids = _by_layer(jnp.clip(ids, 0, site.shape[0] - 1)[..., None], site)[..., 0]  # (layers, n, t)
        return [Rows(i, g, site.shape[0]) for i, g in zip(ids, _by_layer(b, site), strict=True)]
    if site.parameter == 0:  # its axes come first in the result
        axes = range(lead, b.ndim)
        b = jnp.transpose(b, (*range(lead), *axes[site.free :], *axes[: site.free]))
    rows, columns = site.matrix
    b = jnp.reshape(b, (*b.shape[:lead], -1, columns if site.leading else rows))  # (n, *scans, tokens, free)
    pairs = zip(_by_layer(x, site), _by_layer(b, site), strict=True)
    return [OuterProduct(g, a) if site.leading else OuterProduct(a, g) for a, g in pairs]


def _by_layer(x: Any, site: Product | Lookup) -> Any:
    """Bring (n, *scans, tokens, width) to (layers, n, all tokens, width)."""
    sliced = [1 + i for i, s in enumerate(site.levels) if s]
    shared = [1 + i for i, s in enumerate(site.levels) if not s]
    last = x.ndim - 2
    x = jnp.transpose(x, (*sliced, 0, *shared, last, last + 1))
    n, width = x.shape[len(sliced)], x.shape[-1]
    return jnp.reshape(x, (math.prod(site.stack), n, -1, width))
