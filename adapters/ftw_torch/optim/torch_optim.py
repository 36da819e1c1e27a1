"""What each optimizer of ``torch.optim`` keeps where, handed to the rule of its update in `ftw.optimizers`.

A reader has the form ``reader(parameter, state, group, *, lr, anticipate, damping) -> LinearUpdate``. State that is
not there yet (before the first step, or a parameter that had no gradient so far) stands for zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ftw.optimizers as updates
from ftw.optimizers import LinearUpdate

__all__ = ["READERS", "REFUSED", "Reader", "number"]

Reader = Callable[..., LinearUpdate]


def number(x: Any) -> Any:
    """Return a number for what lives on the host; a tensor on a device stays there, reading it would wait for it."""
    return x.item() if isinstance(x, Tensor) and x.device.type == "cpu" else x


def zeros(p: Tensor) -> Tensor:
    """Return zeros shaped like a parameter, in the memory of one."""
    return p.detach().new_zeros(()).expand(p.shape)


def _given(p: Tensor, group: Any, anticipate: Tensor | None, *, coupled: bool = True) -> dict[str, Any]:
    """Return the arguments that most rules share.

    With ``maximize`` the optimizer negates the gradient before anything else; coupled decay is then added to it.
    """
    decay = number(group.get("weight_decay", 0.0))
    if anticipate is not None:
        anticipate = -anticipate if group.get("maximize") else anticipate
        if coupled and decay:
            anticipate = anticipate + decay * p.detach()
    return {"weight_decay": decay, "param": p.detach(), "anticipate": anticipate}


def _moments(p: Tensor, state: Any, group: Any) -> dict[str, Any]:
    return {
        "exp_avg": state.get("exp_avg", zeros(p)),
        "exp_avg_sq": state.get("exp_avg_sq", zeros(p)),
        "step": number(state.get("step", 0)),
        "betas": tuple(number(b) for b in group["betas"]),
        "eps": group["eps"],
    }


def _sgd(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    names = ("momentum", "dampening", "nesterov")
    more = {name: number(group[name]) for name in names}
    return updates.sgd(state.get("momentum_buffer"), lr=lr, **more, **_given(p, group, anticipate))


def _adam(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    decoupled = group.get("decoupled_weight_decay", False)
    update = updates.adamw if decoupled else updates.adam
    given = _given(p, group, anticipate, coupled=not decoupled)
    largest = state.get("max_exp_avg_sq") if group["amsgrad"] else None
    return update(**_moments(p, state, group), lr=lr, damping=damping, max_exp_avg_sq=largest, **given)


def _nadam(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    decoupled = group["decoupled_weight_decay"]
    return updates.nadam(
        **_moments(p, state, group),
        mu_product=number(state.get("mu_product", 1.0)),
        lr=lr,
        momentum_decay=group["momentum_decay"],
        decoupled_weight_decay=decoupled,
        damping=damping,
        **_given(p, group, anticipate, coupled=not decoupled),
    )


def _radam(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    decoupled = group["decoupled_weight_decay"]
    given = _given(p, group, anticipate, coupled=not decoupled)
    return updates.radam(**_moments(p, state, group), lr=lr, decoupled_weight_decay=decoupled, damping=damping, **given)


def _adamax(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    moments = _moments(p, state, group)
    del moments["exp_avg_sq"]
    inf = state.get("exp_inf", zeros(p))
    return updates.adamax(**moments, exp_inf=inf, lr=lr, damping=damping, **_given(p, group, anticipate))


def _adagrad(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    return updates.adagrad(
        state.get("sum", zeros(p)),
        number(state.get("step", 0)),
        lr=lr,
        lr_decay=group["lr_decay"],
        eps=group["eps"],
        damping=damping,
        **_given(p, group, anticipate),
    )


def _rmsprop(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    return updates.rmsprop(
        state.get("square_avg", zeros(p)),
        number(state.get("step", 0)),
        lr=lr,
        alpha=group["alpha"],
        eps=group["eps"],
        momentum=group["momentum"],
        centered=group["centered"],
        grad_avg=state.get("grad_avg", zeros(p)) if group["centered"] else None,
        momentum_buffer=state.get("momentum_buffer"),
        damping=damping,
        **_given(p, group, anticipate),
    )


def _adadelta(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    return updates.adadelta(
        state.get("square_avg", zeros(p)),
        state.get("acc_delta", zeros(p)),
        number(state.get("step", 0)),
        lr=lr,
        rho=group["rho"],
        eps=group["eps"],
        damping=damping,
        **_given(p, group, anticipate),
    )


def _asgd(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    given = _given(p, group, anticipate)
    return updates.asgd(lr=lr, eta=number(state.get("eta")), lambd=group["lambd"], damping=damping, **given)


def _adafactor(
    p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float
) -> LinearUpdate:
    like, given = p.detach(), _given(p, group, anticipate, coupled=False)
    matrix = p.ndim > 1
    row = state.get("row_var", like.new_zeros(*p.shape[:-1], 1) if matrix else None)
    column = state.get("col_var", like.new_zeros(*p.shape[:-2], 1, p.shape[-1]) if matrix else None)
    return updates.adafactor(
        row if matrix else None,
        column if matrix else None,
        None if matrix else state.get("variance", zeros(p)),
        number(state.get("step", 0)),
        lr=lr,
        beta2_decay=group["beta2_decay"],
        eps=group["eps"],
        d=group["d"],
        damping=damping,
        **given,
    )


def _muon(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
    return updates.muon(
        state.get("momentum_buffer"),
        lr=lr,
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        adjust_lr_fn=group["adjust_lr_fn"],
        ns_coefficients=group["ns_coefficients"],
        ns_steps=group["ns_steps"],
        damping=damping,
        **_given(p, group, anticipate, coupled=False),
    )


READERS: dict[type, Reader] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.NAdam: _nadam,
    torch.optim.RAdam: _radam,
    torch.optim.Adamax: _adamax,
    torch.optim.Adagrad: _adagrad,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adadelta: _adadelta,
    torch.optim.ASGD: _asgd,
    torch.optim.Adafactor: _adafactor,
}
if hasattr(torch.optim, "Muon"):
    READERS[torch.optim.Muon] = _muon

REFUSED: dict[type, str] = {
    torch.optim.LBFGS: "it evaluates the loss several times a step, and its direction comes from all parameters",
    torch.optim.Rprop: "it takes only the gradient's sign, and no derivative says how samples compare",
    torch.optim.SparseAdam: "it takes sparse gradients, and the composed one is dense; use Adam",
}
