"""P of Adam and AdamW for all parameters together: the formula of `ftw.optimizers.adam`, many tensors to a kernel.

The offset, which a choice does not ask for, is left out. One tensor at a time, a model of many small ones would spend
longer on starting kernels than on its own step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ftw.geometry import Diagonal, Operator
from ftw.spi import correction
from ftw_torch.capture.internals import foreach
from ftw_torch.records.dtypes import promoted
from ftw_torch.records.join import seen

from .torch_optim import number

__all__ = ["diagonals"]


def diagonals(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, Tensor],
    groups: Mapping[str, int],
    rates: Mapping[int, Any],
    anticipate: Mapping[str, Tensor] | None,
    damping: float,
) -> dict[str, Operator]:
    """Return the operators of those parameters that fit the plain formula: a state, a gradient to fold in, no AMSGrad.

    Parameters
    ----------
    optimizer : torch.optim.Adam or torch.optim.AdamW
    parameters : mapping of str to Parameter
    groups : mapping of str to int
        The number of each parameter's group.
    rates : mapping of int to float or tensor ()
        Learning rates of the groups.
    anticipate : mapping of str to tensor, or None
        Under the shapes of records.
    damping : float
    """
    if anticipate is None or type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return {}
    states = {name: optimizer.state.get(p, {}) for name, p in parameters.items()}
    steps = _steps({name: state.get("step") for name, state in states.items()})
    fine = {i: not optimizer.param_groups[i]["amsgrad"] for i in set(groups.values())}
    together: dict[Any, list[str]] = defaultdict(list)
    for name, p in parameters.items():
        v, i, wide = states[name].get("exp_avg_sq"), groups[name], promoted(p.dtype)
        tiny = optimizer.param_groups[i]["eps"] < _smallest(wide)  # where denominators may be zero
        apart = hasattr(p, "placements")  # in parts on several processes: gathered one at a time
        if v is not None and v.numel() and fine[i] and not tiny and not apart:
            together[i, p.device, wide, steps[name]].append(name)
    out: dict[str, Operator] = {}
    for (i, _, wide, step), names in together.items():
        own = [states[name] for name in names]
        counts = torch.stack([state["step"].to(wide) for state in own]) if step is None else step  # (c,) or ()
        gradients = [anticipate[name].to(wide) for name in names]
        group = optimizer.param_groups[i]
        decay = number(group["weight_decay"])
        if decay and not group.get("decoupled_weight_decay"):  # of g, or of -g to the same square
            held = [parameters[name].detach().to(wide).reshape(seen(parameters[name].shape)) for name in names]
            gradients = list(foreach._foreach_add(gradients, held, alpha=-decay if group["maximize"] else decay))
        second = [_alike(state["exp_avg_sq"].to(wide), a) for state, a in zip(own, gradients, strict=True)]
        values = _values(second, gradients, counts, rates[i], group, damping)
        out.update(zip(names, map(Diagonal, values), strict=True))
    return out


def _values(v: list[Tensor], a: list[Tensor], step: Any, lr: Any, group: Any, damping: float) -> list[Tensor]:
    """Return ``lr (1 - b1) / (1 - b1^t) / (sqrt(vhat) + eps + damping * rms(sqrt(vhat)))`` for each second moment."""
    b1, b2 = (number(b) for b in group["betas"])
    own = correction(b2, step + 1)
    old, new = b2 / own, (1 - b2) / own
    if isinstance(own, Tensor):  # counted on the device
        vhat = list(foreach._foreach_mul(v, _each(old)))
        foreach._foreach_addcmul_(vhat, a, foreach._foreach_mul(a, _each(new)))
    else:
        vhat = list(foreach._foreach_mul(v, float(old)))
        foreach._foreach_addcmul_(vhat, a, a, value=float(new))
    foreach._foreach_sqrt_(vhat)
    lengths = torch.stack(foreach._foreach_norm(vhat))  # (c,)
    roots = torch.tensor([x.numel() ** 0.5 for x in vhat], dtype=lengths.dtype)
    shift = group["eps"] + damping * lengths / roots.to(lengths.device, non_blocking=True)  # (c,)
    foreach._foreach_add_(vhat, _each(shift))
    foreach._foreach_reciprocal_(vhat)
    touched = (lengths != 0).to(lengths.dtype)  # (c,)
    foreach._foreach_mul_(vhat, _each(touched * (lr * (1 - b1) / correction(b1, step + 1))))
    return vhat


@cache
def _smallest(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal


def _steps(counts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the steps taken, read at once from the host; None for those counted on a device."""
    found = {name: None if isinstance(step, Tensor) else step for name, step in counts.items()}
    here = [name for name, step in counts.items() if isinstance(step, Tensor) and step.device.type == "cpu"]
    if here:
        found |= zip(here, torch.stack([counts[name] for name in here]).tolist(), strict=True)
    return found


def _alike(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape == like.shape else x.reshape(like.shape)


def _each(x: Tensor) -> list[Tensor]:
    return list(x.unbind())
