"""The geometry of an optax optimizer: its response to the next gradient, one operator a parameter.

Any object with ``init`` and ``update`` will do. What is affine in the gradient entry by entry once its nonlinear
factors are held (`ftw_jax._program` says how that is read off the update itself) gives `Scale` or `Diagonal`; Muon's
orthogonalisation gives `Polar`. That covers chains, masks, partitions, injected hyper-parameters, accumulation over
several steps, clipping and schedules, since all of them are part of the program that is read. What is left is refused
by name, or linearised if that is asked for and it acts on each entry by itself (``_linearised.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from ftw import Diagonal, LinearUpdate, Polar, Scale, optimizers
from ftw.geometry import Operator

from . import _names
from ._items import Held, Known, Live, Unreadable
from ._linearised import linearised
from ._program import run

__all__ = ["geometry", "linear_updates", "orthogonalised"]


def linear_updates(
    tx: Any,
    params: Any,
    opt_state: Any,
    *,
    anticipate: Any,
    damping: float = 0.0,
    extra_args: Mapping[str, Any] | None = None,
    linearise: bool = False,
) -> dict[str, LinearUpdate]:
    """Return the next change of each parameter as an affine function of the next gradient, ``-(offset + operator(g))``.

    Parameters
    ----------
    tx : GradientTransformation
        Anything with optax's ``update(grads, state, params)``.
    params, opt_state : pytree
        The parameters, of real floating dtypes, and the optimizer's state for them.
    anticipate : pytree like params
        The gradient a at which nonlinear factors are held: second moments (with a folded in), clipping norms, trust
        ratios. With ``damping=0`` the affine function is exact at g = a.
    damping : float
        Added to each second-moment denominator as a multiple of its root mean square over the parameter.
    extra_args : mapping, optional
        Further arguments of ``tx.update``.
    linearise : bool
        Where a parameter's update cannot be read, take its derivative at a, if it is smooth and acts on each entry by
        itself (a soft clip, a power). One that mixes entries or parameters, which only the values can show, gets an
        operator of -1, so that a selection ends as `ftw.Status.NOT_PSD`; a derivative that climbs does so too.

    Returns
    -------
    dict of str to LinearUpdate
        By keystr path. The operator is a `Scale`, `Diagonal` or `Polar`, zero for a parameter that the optimizer leaves
        alone and in steps in which it changes nothing (a learning rate of zero, accumulation).

    Raises
    ------
    TypeError
        If the update of a parameter mixes its entries, or those of several parameters, or is nonlinear in its gradient
        beyond factors that scale it, unless ``linearise``; the message names the parameter and the operation.

    Notes
    -----
    A few elementwise operations a parameter and one evaluation of the update. No matrix product, except a thin SVD for
    Muon.
    """
    return _read(tx, params, opt_state, anticipate, damping, extra_args, linearise, through_zero=False)


def geometry(
    tx: Any,
    params: Any,
    opt_state: Any,
    *,
    anticipate: Any,
    damping: float = 0.1,
    extra_args: Mapping[str, Any] | None = None,
    linearise: bool = False,
) -> dict[str, Operator]:
    """Return the operators of `linear_updates`, looking through a factor of zero that all parameters share.

    A selection does not depend on the overall length of the step, so that at a learning rate of zero (the first step of
    a warm-up) and in the steps between which gradients are accumulated it is made with the response of the step to
    come.

    Parameters and errors are those of `linear_updates`.
    """
    updates = _read(tx, params, opt_state, anticipate, damping, extra_args, linearise, through_zero=True)
    return {name: update.operator for name, update in updates.items()}


def _read(
    tx: Any,
    params: Any,
    opt_state: Any,
    anticipate: Any,
    damping: float,
    extra_args: Mapping[str, Any] | None,
    linearise: bool,
    *,
    through_zero: bool,
) -> dict[str, LinearUpdate]:
    leaves, treedef = _names.flatten(params, what="params")
    at = {name: jnp.asarray(a) for name, a in _names.like(anticipate, params, what="anticipate").items()}
    names = list(leaves)

    def update(g: Any, state: Any, p: Any) -> Any:
        changes, _ = tx.update(jax.tree.unflatten(treedef, g), state, p, **(extra_args or {}))
        return treedef.flatten_up_to(changes)

    try:
        program = jax.make_jaxpr(update)(list(at.values()), opt_state, params)
    except Exception as error:
        error.add_note(
            "geometry: raised by tx.update(gradients, opt_state, params): opt_state must be what tx.init(params) "
            "returns for this tx and these params, and what else update asks for be among extra_args"
        )
        raise
    inputs: list[Any] = []
    for leaf, a in enumerate(at.values()):
        wide = jnp.promote_types(a.dtype, jnp.float32)
        inputs.append(Live(a, leaf, jnp.ones((), wide), jnp.zeros((), bool)))
    inputs += [Known(x, x if jnp.ndim(x) == 0 else None) for x in jax.tree.leaves((opt_state, params))]
    found = orthogonalised(opt_state)
    muon = {i: found[name] for i, name in enumerate(names) if name in found}
    outs = run(program, inputs, damping, orthogonal=frozenset(muon))
    odd = [leaf for leaf, out in enumerate(outs) if not _readable(out, leaf, leaves[names[leaf]].shape)]
    if odd and not linearise:
        _refuse(names[odd[0]], outs[odd[0]], leaves[names[odd[0]]].shape, opt_state)
    smooth = linearised(lambda g: update(g, opt_state, params), list(at.values()), odd) if odd else {}
    zeros = [out.zero for out in outs if isinstance(out, Live)]
    nothing = jnp.all(jnp.stack(zeros)) if zeros and through_zero else jnp.asarray(False)
    every = zip(at.items(), outs, strict=True)
    return {
        name: smooth[i] if i in smooth else _update(out, a, nothing, damping, muon.get(i))
        for i, ((name, a), out) in enumerate(every)
    }


def _update(out: Any, a: Any, nothing: Any, damping: float, coefficients: Any) -> LinearUpdate:
    """Return the affine function that an output stands for; ``nothing`` (): look through its zero."""
    if isinstance(out, Known):
        return LinearUpdate(-out.value, Scale(0.0))
    scale = -out.scale  # ()
    if out.polar is not None:
        scale = jnp.where(out.zero, jnp.where(nothing, jnp.abs(scale), 0), scale)
        unit = optimizers.muon(
            None,
            lr=1.0,
            momentum=0.0,
            adjust_lr_fn="none",
            ns_coefficients=coefficients,
            anticipate=out.polar,
            damping=damping,
        ).operator  # of the matrix that is orthogonalised
        if isinstance(unit, Polar):
            operator: Operator = unit.scaled(scale)
        else:  # it is zero, and known to be
            operator = Scale(scale)
        return LinearUpdate(-out.value - operator.apply(a), operator)
    slope = scale if out.values is None else scale * out.values  # () or (*shape)
    slope = jnp.where(out.zero, jnp.where(nothing, jnp.abs(slope), 0), slope)
    operator = Scale(slope) if out.values is None else Diagonal(slope)
    return LinearUpdate(-out.value - operator.apply(a.astype(slope.dtype)), operator)


def _readable(out: Any, leaf: int, shape: tuple[int, ...]) -> bool:
    """Return whether an output is an affine function of the gradient of its own parameter."""
    own = isinstance(out, Live) and out.leaf == leaf and not out.swapped and out.value.shape == shape
    return own or isinstance(out, Known)


def _refuse(name: str, out: Any, shape: tuple[int, ...], opt_state: Any) -> NoReturn:
    """Raise for an output that is not an affine function of the gradient of its own parameter."""
    if isinstance(out, Unreadable):
        why = f"goes through {out.reason!r}, which is not a scaling of its entries"
    elif isinstance(out, Held):
        why = "is a nonlinear function of its gradient, with no part that a factor scales"
    elif out.value.shape != shape:
        why = f"is {out.value.shape}, the parameter {shape}, as if opt_state were that of other params"
    else:
        why = "depends on the gradient of another parameter, or on its own transposed"
    states = ", ".join(_state_types(opt_state)) or "empty"
    raise TypeError(
        f"geometry: the optimizer's update of {name} {why}; its states are {states}. "
        "Pass geometry=, a function (params, opt_state, gradient) -> {name: operator}, to state its response, or "
        "linearise=True if it is smooth and acts on each entry by itself"
    )


def _state_types(opt_state: Any) -> list[str]:
    """Return the names of the NamedTuples in a state that hold arrays, outermost first."""
    found: dict[str, None] = {}

    def visit(node: Any) -> None:
        if hasattr(node, "_fields"):
            found[type(node).__name__] = None
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, (tuple, list)) else ()
        for child in children:
            visit(child)

    visit(opt_state)
    return [n for n in found if n not in ("MaskedNode", "EmptyState", "MaskedState", "PartitionState")]


def orthogonalised(opt_state: Any) -> dict[str, Any]:
    """Return ``{path: coefficients}`` of the parameters for which a state of the type MuonState keeps a momentum."""
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if type(node).__name__ == "MuonState":
            leaves = jax.tree_util.tree_flatten_with_path(node.mu)[0]
            found.update((jax.tree_util.keystr(path), jnp.asarray(node.ns_coeffs)) for path, _ in leaves)
        children = node.values() if isinstance(node, Mapping) else node if isinstance(node, (tuple, list)) else ()
        for child in children:
            visit(child)

    visit(opt_state)
    return found
