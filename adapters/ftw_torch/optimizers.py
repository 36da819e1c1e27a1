"""From a torch.optim optimizer to the geometry of its next step, one operator a parameter.

State is read, never written: ``optimizer.state.get(p)``, since ``state[p]`` would insert an entry that lands in state_dict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import ftw.optimizers as updates
from ftw import LinearUpdate
from ftw.geometry import Diagonal, Operator, Scale

from .records import seen

__all__ = ["geometry", "linear_update", "register_optimizer"]

Reader = Callable[..., LinearUpdate]
"""``(parameter, state, group, lr=, anticipate=, damping=) -> LinearUpdate``"""

_readers: dict[type, Reader] = {}


def register_optimizer(kind: type, reader: Reader) -> None:
    """Teach the adapter an optimizer.

    Parameters
    ----------
    kind : type
        The optimizer's class; subclasses are not covered, for they may step differently.
    reader : callable
        ``reader(parameter, state, group, *, lr, anticipate, damping) -> ftw.LinearUpdate``: the next change of the
        parameter as ``-(offset + operator(g))``. ``state`` is the optimizer's state of this parameter ({} before its first
        step), ``group`` its param group, ``anticipate`` a gradient to fold into the second moment, or None.
    """
    _readers[kind] = reader


def geometry(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    anticipate: Mapping[str, Tensor] | None,
    *,
    damping: float = 0.1,
) -> dict[str, Operator]:
    """Return P of the optimizer's next step, with a gradient folded into the second moment.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    parameters : mapping of str to Parameter
        What is trained; each must belong to one of the optimizer's groups.
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
    optimizer = unwrap(optimizer)
    rates = _rates(optimizer)
    found = _groups(optimizer, parameters)
    read = _reader(optimizer)
    out = {}
    for name, p in parameters.items():
        i = found[name]
        group = optimizer.param_groups[i]
        a = None if anticipate is None else anticipate[name].reshape(p.shape)
        update = read(p, optimizer.state.get(p, {}), group, lr=rates[i], anticipate=a, damping=damping)
        out[name] = _as_seen(name, update.operator, p)
    return out


def _as_seen(name: str, operator: Operator, p: Tensor) -> Operator:
    """Return the operator in the shape of the parameter's records, which is that of a matrix."""
    shape = seen(p.shape)
    if isinstance(operator, Diagonal):
        return Diagonal(operator.values.reshape(shape))  # type: ignore[attr-defined]
    if isinstance(operator, Scale) or operator.shape == shape:
        return operator
    raise TypeError(
        f"the optimizer's response to {name!r} {tuple(p.shape)} is a {type(operator).__name__} of shape {operator.shape}; "
        f"that of a parameter with more than two axes must be a Scale or a Diagonal"
    )


def linear_update(
    optimizer: torch.optim.Optimizer,
    parameter: Tensor,
    *,
    anticipate: Tensor | None = None,
    damping: float = 0.0,
) -> LinearUpdate:
    """Return the next change of one parameter as ``-(offset + operator(g))``, with the group's own learning rate."""
    optimizer = unwrap(optimizer)
    i = _groups(optimizer, {"the parameter": parameter})["the parameter"]
    group = optimizer.param_groups[i]
    return _reader(optimizer)(
        parameter,
        optimizer.state.get(parameter, {}),
        group,
        lr=_number(group["lr"]),
        anticipate=anticipate,
        damping=damping,
    )


def unwrap(optimizer: Any) -> torch.optim.Optimizer:
    """Return the optimizer inside wrappers that only forward to it (Accelerate's)."""
    while type(optimizer).__name__ == "AcceleratedOptimizer":
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    return optimizer


def _reader(optimizer: torch.optim.Optimizer) -> Reader:
    reader = _readers.get(type(optimizer))
    if reader is None:
        known = ", ".join(sorted(kind.__name__ for kind in _readers))
        kind = type(optimizer)
        raise TypeError(
            f"the optimizer {kind.__module__}.{kind.__qualname__} is not known; the known ones are {known}. Teach it with "
            f"ftw_torch.register_optimizer({kind.__name__}, reader)"
        )
    return reader


def _groups(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    missing = [name for name, p in parameters.items() if id(p) not in where]
    if missing:
        raise ValueError(
            f"these parameters require a gradient but are in none of the optimizer's groups: {', '.join(missing)}; "
            "freeze them with requires_grad_(False) or give them to the optimizer"
        )
    return {name: where[id(p)] for name, p in parameters.items()}


def _rates(optimizer: torch.optim.Optimizer) -> list[Any]:
    rates = [_number(group["lr"]) for group in optimizer.param_groups]
    if any(isinstance(rate, Tensor) or rate != 0 for rate in rates):
        return rates
    rates = [_number(group.get("initial_lr", 0.0)) for group in optimizer.param_groups]
    return rates if any(isinstance(rate, Tensor) or rate != 0 for rate in rates) else [1.0] * len(rates)


def _number(x: Any) -> Any:
    """Return a number for what lives on the host; a tensor on a device stays there, reading it would wait for it."""
    return x.item() if isinstance(x, Tensor) and x.device.type == "cpu" else x


# ---------------------------------------------------------------------------------------------------------------------
# Readers


def _sgd(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    del anticipate, damping  # no second moment
    return updates.sgd(
        state.get("momentum_buffer"),
        lr=lr,
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        weight_decay=_decay(group),
        param=p.detach(),
    )


def _adam(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    decoupled = group.get("decoupled_weight_decay", False)
    nothing = p.detach().new_zeros(()).expand(p.shape)
    decay = group["weight_decay"]
    if anticipate is not None and decay and not decoupled:
        anticipate = anticipate + _decay(group) * p.detach()
    update = updates.adamw if decoupled else updates.adam
    return update(
        state.get("exp_avg", nothing),
        state.get("exp_avg_sq", nothing),
        _number(state.get("step", 0)),
        lr=lr,
        betas=tuple(_number(b) for b in group["betas"]),
        eps=group["eps"],
        anticipate=anticipate,
        damping=damping,
        weight_decay=decay if decoupled else _decay(group),
        param=p.detach(),
        max_exp_avg_sq=state.get("max_exp_avg_sq"),
    )


def _decay(group: Any) -> float:
    """Return the coupled decay; with maximize the gradient changes its sign before the decay is added."""
    decay: float = group["weight_decay"]
    return -decay if group.get("maximize") else decay


register_optimizer(torch.optim.SGD, _sgd)
register_optimizer(torch.optim.Adam, _adam)
register_optimizer(torch.optim.AdamW, _adam)
