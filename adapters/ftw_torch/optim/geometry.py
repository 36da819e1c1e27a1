"""From a torch.optim optimizer to the geometry of its next step, one operator a parameter.

State is read, never written: ``optimizer.state.get(p)``, since ``state[p]`` would insert an entry that lands in
state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ftw import LinearUpdate
from ftw.geometry import Diagonal, Operator, Scale
from ftw_torch.capture.fsdp import gathered
from ftw_torch.records.join import seen

from . import third_party as outside
from . import torch_optim as readers
from .batched_adam import diagonals
from .torch_optim import Reader, number

__all__ = ["Reading", "geometry", "linear_update", "readings", "register_optimizer", "unwrap", "unwrapped"]

_registered: dict[type, Reader] = {}


def register_optimizer(kind: type, reader: Reader) -> None:
    """Teach the adapter an optimizer.

    Parameters
    ----------
    kind : type
        The optimizer's class, which replaces a reader that is there; subclasses are not covered, for they may step
        differently.
    reader : callable
        ``reader(parameter, state, group, *, lr, anticipate, damping) -> ftw.LinearUpdate``: the next change of the
        parameter as ``-(offset + operator(g))``. ``state`` is the optimizer's state of this parameter ({} before its
        first step), ``group`` its param group, ``anticipate`` a gradient to fold into the second moment, or None.
    """
    _registered[kind] = reader


def geometry(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, Tensor],
    anticipate: Mapping[str, Tensor] | None,
    *,
    damping: float = 0.1,
) -> dict[str, Operator]:
    """Return P of the optimizer's next step, with a gradient folded into the second moment.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer, or a sequence of them
    parameters : mapping of str to Parameter
        What is trained; each must belong to one of the optimizer's groups, and to one optimizer of several.
    anticipate : mapping of str to tensor, or None
        The gradient to fold in, the target's in this method.
    damping : float
        Added to Adam-like denominators, as a multiple of their root mean square over the parameter.

    Returns
    -------
    dict of str to operator
        The learning rates are the groups' own; if all are zero, as in the first step of a warm-up, those of
        ``initial_lr``, else 1.

    Raises
    ------
    TypeError
        If the optimizer is unknown; the message names the way to register it.
    ValueError
        If a parameter is in none of its groups.
    """
    found = readings(optimizer, parameters)
    out: dict[str, Operator] = {}
    for one in unwrapped(optimizer):
        own = {name: p for name, p in parameters.items() if found[name].optimizer is one}
        if own and found[next(iter(own))].read is readers.READERS.get(type(one)):
            groups = {name: found[name].group for name in own}
            rates = {found[name].group: found[name].lr for name in own}
            out |= diagonals(one, own, groups, rates, anticipate, damping)
        for name, p in own.items():
            if name in out:
                continue
            reading = found[name]
            a = None if anticipate is None else anticipate[name].reshape(p.shape)
            group = one.param_groups[reading.group]
            update = reading.read(*_whole(p, one), group, lr=reading.lr, anticipate=a, damping=damping)
            out[name] = _as_seen(name, update.operator, p)
    return {name: out[name] for name in parameters}


class Reading(NamedTuple):
    """Which reader takes a parameter's response from which optimizer."""

    read: Reader
    optimizer: torch.optim.Optimizer
    group: int  # the number of the parameter's group
    lr: Any

    def state(self, p: Tensor) -> Any:
        """Return the optimizer's state of a parameter, {} before its first step."""
        return self.optimizer.state.get(p, {})


def readings(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]
) -> dict[str, Reading]:
    """Return how the response of each parameter is read; errors are those of `geometry`."""
    optimizers = unwrapped(optimizer)
    rates, places = _rates(optimizers), _groups(optimizers, parameters)
    read = [_reader(one) for one in optimizers]
    return {name: Reading(read[k], optimizers[k], i, rates[k][i]) for name, (k, i) in places.items()}


def _as_seen(name: str, operator: Operator, p: Tensor) -> Operator:
    """Return the operator in the shape of the parameter's records, which is that of a matrix."""
    shape = seen(p.shape)
    if isinstance(operator, Diagonal):
        return Diagonal(operator.values.reshape(shape))  # type: ignore[attr-defined]
    if isinstance(operator, Scale) or operator.shape == shape:
        return operator
    raise TypeError(
        f"the optimizer's response to {name!r} {tuple(p.shape)} is a {type(operator).__name__} of shape "
        f"{operator.shape}; that of a parameter with more than two axes must be a Scale or a Diagonal"
    )


def linear_update(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    *,
    anticipate: Tensor | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Return the next change of one parameter as ``-(offset + operator(g))``, with the group's own learning rate.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        Read, never written.
    parameter : Parameter
        In one of its groups.
    anticipate : tensor, optional
        The gradient to fold into the second moment, as it stands in ``.grad``.
    damping : float
        As in `geometry`.

    Notes
    -----
    With ``maximize`` the g to apply is the negated one.
    """
    optimizer = unwrap(optimizer)
    _, i = _groups([optimizer], {"the parameter": parameter})["the parameter"]
    group = optimizer.param_groups[i]
    return _reader(optimizer)(
        *_whole(parameter, optimizer),
        group,
        lr=number(group["lr"]),
        anticipate=gathered(anticipate),
        damping=damping,
    )


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside wrappers that only forward to it (Accelerate's, Lightning's, Fabric's)."""
    while type(optimizer).__module__.split(".")[0] in ("accelerate", "lightning", "pytorch_lightning"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def unwrapped(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizer, or those of a sequence, without their wrappers."""
    return [unwrap(one) for one in (optimizer if isinstance(optimizer, (tuple, list)) else (optimizer,))]


def _whole(p: Tensor, optimizer: torch.optim.Optimizer) -> tuple[Tensor, Any]:
    """Return a parameter and its state; where they lie in parts on several processes, the whole of them."""
    state = optimizer.state.get(p, {})
    return (gathered(p), gathered(state)) if hasattr(p, "placements") else (p, state)


def _reader(optimizer: torch.optim.Optimizer) -> Reader:
    kind = type(optimizer)
    path = f"{kind.__module__}.{kind.__qualname__}"
    reader = _registered.get(kind) or readers.READERS.get(kind)
    if reader is not None:
        return reader
    if path in outside.READERS:
        return outside.READERS[path](optimizer)
    way = f"Teach it with ftw_torch.register_optimizer({kind.__name__}, reader)"
    if kind in readers.REFUSED:
        raise TypeError(f"the optimizer {path} has no linearised step: {readers.REFUSED[kind]}. {way}")
    known = ", ".join(sorted([k.__name__ for k in (*readers.READERS, *_registered)] + list(outside.READERS)))
    raise TypeError(f"the optimizer {path} is not known; the known ones are {known}. {way}")


def _groups(
    optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, Tensor]
) -> dict[str, tuple[int, int]]:
    """Return the optimizer and the group that each parameter is in."""
    where: dict[int, tuple[int, int]] = {}
    twice = set()
    for k, optimizer in enumerate(optimizers):
        for i, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if where.setdefault(id(p), (k, i))[0] != k:
                    twice.add(id(p))
    several = [name for name, p in parameters.items() if id(p) in twice]
    if several:
        raise ValueError(
            f"these parameters are in several of the optimizers: {', '.join(several)}; give the one to step"
        )
    missing = [name for name, p in parameters.items() if id(p) not in where]
    if missing:
        raise ValueError(
            f"these parameters require a gradient but are in none of the optimizer's groups: {', '.join(missing)}; "
            "freeze them with requires_grad_(False), give them to the optimizer, or give all optimizers as a tuple"
        )
    return {name: where[id(p)] for name, p in parameters.items()}


def _rates(optimizers: Sequence[torch.optim.Optimizer]) -> list[list[Any]]:
    rates = [[number(group["lr"]) for group in one.param_groups] for one in optimizers]
    if _any(rates):
        return rates
    rates = [[number(group.get("initial_lr", 0.0)) for group in one.param_groups] for one in optimizers]
    return rates if _any(rates) else [[1.0] * len(row) for row in rates]


def _any(rates: list[list[Any]]) -> bool:
    return any(isinstance(rate, Tensor) or rate != 0 for row in rates for rate in row)
