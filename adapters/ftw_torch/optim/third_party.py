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


def _schedule_free(optimizer: Any) -> Reader:
    """Schedule-free AdamW and SGD of ``schedulefree`` in their training mode."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        if not group["train_mode"]:
            raise RuntimeError("the schedule-free optimizer is in eval mode; call optimizer.train() first")
        y = p.detach()
        names = ("weight_decay", "warmup_steps", "weight_sum", "lr_max", "r", "weight_lr_power")
        common: dict[str, Any] = {name: group[name] for name in names}
        common |= {"lr": lr, "param": y, "anticipate": anticipate, "damping": damping}
        z, k = state.get("z", y), group["k"]
        if "momentum" in group:
            return updates.schedule_free_sgd(z, k, momentum=group["momentum"], **common)
        v = state.get("exp_avg_sq", zeros(p))
        return updates.schedule_free_adamw(z, v, k, betas=group["betas"], eps=group["eps"], **common)

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
    """Adafactor of ``transformers``."""

    def read(p: Tensor, state: Any, group: Any, *, lr: Any, anticipate: Tensor | None, damping: float) -> LinearUpdate:
        value, matrix = p.detach(), p.ndim > 1
        names = ("beta1", "decay_rate", "eps", "clip_threshold", "weight_decay", "scale_parameter", "relative_step")
        return updates.hf_adafactor(
            state.get("exp_avg_sq_row", value.new_zeros(p.shape[:-1])) if matrix else None,
            state.get("exp_avg_sq_col", value.new_zeros(p.shape[:-2] + p.shape[-1:])) if matrix else None,
            None if matrix else state.get("exp_avg_sq", zeros(p)),
            state.get("step", 0),
            lr=lr,
            param=value,
            exp_avg=state.get("exp_avg"),
            warmup_init=group["warmup_init"],
            anticipate=anticipate,
            damping=damping,
            **{name: group[name] for name in names},
        )

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
    "schedulefree.adamw_schedulefree.AdamWScheduleFree": _schedule_free,
    "schedulefree.sgd_schedulefree.SGDScheduleFree": _schedule_free,
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
