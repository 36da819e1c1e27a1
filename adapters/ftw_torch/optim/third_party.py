"""Optimizers of other packages, known by the path of their class, so that none of the packages is imported for it.

A factory gets the optimizer, for what is kept on it and not in its groups, and returns the reader (``torch_optim.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ftw.optimizers as updates
from ftw.geometry import Diagonal, Kronecker, Scale
from ftw.optimizers import LinearUpdate

from .torch_optim import Reader, number, zeros

__all__ = ["READERS"]


def _lion(optimizer: Any) -> Reader:
    """Lion of ``lion-pytorch``: the sign's surrogate of `ftw.optimizers.lion`."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        decay = group["weight_decay"] / (optimizer._init_lr if optimizer.decoupled_wd else 1.0)
        return updates.lion(
            state.get("exp_avg", zeros(p)),
            1 if state else 0,
            lr=lr,
            betas=group["betas"],
            weight_decay=decay,
            param=p.detach(),
            anticipate=anticipate,
            damping=damping,
        )

    return read


def _schedule_free_adamw(optimizer: Any) -> Reader:
    """AdamW of ``schedulefree`` in its training mode: the step of y, towards z and down the gradient."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        if not group["train_mode"]:
            raise RuntimeError("the schedule-free optimizer is in eval mode; call optimizer.train() first")
        (b1, b2), k, own = group["betas"], group["k"], group["lr"]
        warm = min(1.0, (k + 1) / group["warmup_steps"]) if group["warmup_steps"] else 1.0
        largest = max(own * warm, group["lr_max"])
        weight = (k + 1) ** group["r"] * largest ** group["weight_lr_power"]
        share = weight / (group["weight_sum"] + weight) if weight else 0.0  # of z in the average
        y, rate = p.detach(), lr * warm * (1 - b1 * (1 - share))
        v = state.get("exp_avg_sq", zeros(p))
        adam = updates.adam(
            zeros(p), v, k, lr=rate, betas=(0.0, b2), eps=group["eps"], anticipate=anticipate, damping=damping
        )
        offset = share * (y - state["z"]) if "z" in state else 0.0
        return LinearUpdate(offset + rate * group["weight_decay"] * y, adam.operator)

    return read


def _moment(p: Tensor, state: Any, i: int) -> Tensor:
    """Return a moment of ``bitsandbytes``, in 8 bits by blocks of 256, or in 32."""
    import bitsandbytes.functional as functional

    x: Tensor = state.get(f"state{i}", zeros(p))
    if x.dtype != torch.uint8:
        return x
    code, scale = state[f"qmap{i}"], state[f"absmax{i}"]
    wide: Tensor = functional.dequantize_blockwise(x, absmax=scale, code=code, blocksize=256)
    return wide.reshape(p.shape)


def _bits_lion(optimizer: Any) -> Reader:
    """Lion of ``bitsandbytes``."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        return updates.lion(
            _moment(p, state, 1),
            1 if state else 0,
            lr=lr,
            betas=group["betas"],
            weight_decay=group["weight_decay"],
            param=p.detach(),
            anticipate=anticipate,
            damping=damping,
        )

    return read


def _bits_adam(optimizer: Any) -> Reader:
    """Adam and AdamW of ``bitsandbytes``, both with decoupled decay."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        return updates.adamw(
            _moment(p, state, 1),
            _moment(p, state, 2),
            number(state.get("step", 0)),
            lr=lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            param=p.detach(),
            anticipate=anticipate,
            damping=damping,
        )

    return read


def _adafactor(optimizer: Any) -> Reader:
    """Adafactor of ``transformers``, its clip held at the anticipated gradient."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        t, value, a = state.get("step", 0) + 1, p.detach().float(), anticipate
        floor, least = group["eps"]
        if group["relative_step"]:
            lr = min(1e-6 * t if group["warmup_init"] else 1e-2, t**-0.5)
        if group["scale_parameter"]:
            lr = lr * value.square().mean().sqrt().clamp(min=least)
        offset, rate, share = lr * group["weight_decay"] * value, lr, t ** group["decay_rate"]
        if group["beta1"] is not None:
            offset, rate = offset + group["beta1"] * state.get("exp_avg", zeros(p)), lr * (1 - group["beta1"])
        if a is None and t == 1:
            return LinearUpdate(offset, Scale(rate))

        def inverse(name: str, axis: int | None) -> Tensor:
            """Return 1 / (root + damping) of a mean over an axis of the squares."""
            v = state.get(name, 0.0)
            if a is not None:
                square = a.float().square() + floor
                v = (1 - share) * v + share * (square if axis is None else square.mean(axis))
            v = v / v.mean(-1, keepdim=True) if axis == -1 else v
            root = v.sqrt()
            out: Tensor = 1 / (root + damping * v.mean().sqrt())
            return out

        if p.ndim == 2:
            operator: Any = Kronecker(rate * inverse("exp_avg_sq_row", -1), inverse("exp_avg_sq_col", -2))
        elif p.ndim < 2:
            operator = Diagonal(rate * inverse("exp_avg_sq", None))
        else:
            rows, columns = inverse("exp_avg_sq_row", -1), inverse("exp_avg_sq_col", -2)
            operator = Diagonal(rate * rows[..., None] * columns[..., None, :])
        if a is not None and rate:
            size = (operator.apply(a.float()) / rate).square().mean().sqrt() / group["clip_threshold"]
            clip = size.clamp(min=1.0)
            if p.ndim == 2:
                operator = Kronecker(operator.left / clip, operator.right)
            else:
                operator = Diagonal(operator.values / clip)
        return LinearUpdate(offset, operator)

    return read


def _soap(optimizer: Any) -> Reader:
    """SOAP of ``pytorch-optimizer``, whose first step only sets up the bases."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        if p.ndim > 2 or group["merge_dims"] or group["precondition_1d"] or group["normalize_gradient"]:
            raise TypeError(
                f"SOAP with a parameter {tuple(p.shape)}, merge_dims, precondition_1d or normalize_gradient has no "
                "rule; known is the rotation of matrices, with vectors as in Adam"
            )
        b1, b2 = group["betas"]
        t = max(1, group.get("step", 0))  # the first call of step() is not one
        root = math.sqrt(1 - b2**t)
        shrink = 1 - lr * group["weight_decay"]  # decay comes after the update, and applies to it
        rate = lr * shrink * (1.0 if group["correct_bias"] else (1 - b1**t) / root)
        bases: Any = (state.get("Q") or [[], []])[:2] if p.ndim == 2 else [[], []]
        left, right = (q if len(q) else None for q in bases)
        sign = -1.0 if optimizer.maximize else 1.0
        a = None if anticipate is None else sign * anticipate
        m, v = (state.get(name, zeros(p)) for name in ("exp_avg", "exp_avg_sq"))
        eps = group["eps"] / root
        common: dict[str, Any] = {"lr": rate, "betas": (b1, b2), "eps": eps, "anticipate": a, "damping": damping}
        common["param"], common["weight_decay"] = p.detach(), group["weight_decay"] * lr / rate if rate else 0.0
        if p.ndim < 2:
            return updates.adamw(m, v, t - 1, **common)
        m = m if left is None else left.T @ m
        return updates.soap(m if right is None else m @ right, v, left, right, t - 1, **common)

    return read


READERS: dict[str, Callable[[Any], Reader]] = {
    "lion_pytorch.lion_pytorch.Lion": _lion,
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _schedule_free_adamw,
    **{
        f"bitsandbytes.optim.{module}.{paged}{name}{bits}": reader
        for module, name, reader in (
            ("adam", "Adam", _bits_adam),
            ("adamw", "AdamW", _bits_adam),
            ("lion", "Lion", _bits_lion),
        )
        for paged in ("", "Paged")
        for bits in ("", "8bit", "32bit")
    },
    "transformers.optimization.Adafactor": _adafactor,
    "pytorch_optimizer.optimizer.soap.SOAP": _soap,
}
