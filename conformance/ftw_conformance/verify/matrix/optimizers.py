"""Every optimizer of PyTorch with every flag: the predicted next change against what its real ``step()`` does."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from ftw_torch import linear_update
from torch import Tensor

from ftw_conformance.verify.table import Expect

__all__ = ["dtype_of", "optimizers", "step"]

SHAPES = ((6, 9), (9, 6), (5,), (), (2, 3, 4))
STEPS = 3
BASE: dict[str, dict[str, Any]] = {"SGD": {"momentum": 0.9}}
VALUES: dict[str, tuple[Any, ...]] = {  # of every option of a constructor, the ones beside its default
    "alpha": (0.8,),
    "amsgrad": (True,),
    "betas": ((0.5, 0.6),),
    "beta2_decay": (-0.5,),
    "capturable": (),  # for CUDA graphs
    "centered": (True,),
    "d": (1.5,),
    "dampening": (0.3,),
    "decoupled_weight_decay": (True,),
    "differentiable": (),  # a graph through the step
    "eps": (1e-3,),
    "etas": (),
    "foreach": (True, False),
    "fused": (True,),
    "initial_accumulator_value": (0.3,),
    "lambd": (0.1,),
    "lr": (0.02, torch.tensor(0.02)),
    "lr_decay": (0.1,),
    "maximize": (True,),
    "momentum": (0.0, 0.5),
    "momentum_decay": (0.1,),
    "nesterov": (True,),
    "rho": (0.8,),
    "t0": (),  # of the average, which is no part of a step
    "weight_decay": (0.1,),
}
SPECIAL: dict[tuple[str, str], tuple[Any, ...]] = {
    ("Adafactor", "eps"): ((1e-3, 1e-2),),
    ("Adafactor", "lr"): (0.5,),
    ("Muon", "lr"): (),
}
FLOAT32 = ("ASGD", "NAdam")  # keep factors of the step in float32 whatever the parameter's dtype
EXACT_ELSEWHERE = ("Muon",)  # linear in direction only: tests/torch/test_optimizers.py


def optimizers() -> Iterator[tuple[str, type, dict[str, Any]]]:
    """Yield name, class and options of each row; an option that has no values here raises.

    Every option is alone, and together with weight decay and ``maximize``, which act on the gradient before the rest.
    """
    for name, kind in sorted(vars(torch.optim).items()):
        known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
        if not known or name in EXACT_ELSEWHERE or not _accepted(kind):
            continue
        options = [p for p in inspect.signature(kind).parameters if p not in ("params", "self")]
        base = BASE.get(name, {})
        yield f"{name}/default", kind, dict(base)
        for option in options:
            for value in SPECIAL.get((name, option), VALUES[option]):
                chosen = {**base, option: value}
                if option in ("fused", "foreach", "lr"):
                    yield f"{name}/{option}={_text(value)}", kind, chosen
                    continue
                yield f"{name}/{option}={_text(value)}", kind, chosen
                both = {k: v for k, v in (("weight_decay", 0.1), ("maximize", True)) if k in options}
                if both and option not in both:
                    yield f"{name}/{option}={_text(value)}, decay, maximize", kind, {**both, **chosen}


def _text(value: Any) -> str:
    return f"tensor {float(value):g}" if isinstance(value, Tensor) else str(value)


def _accepted(kind: Any) -> bool:
    """Return whether the adapter reads an optimizer; it says why it refuses the others."""
    p = torch.nn.Parameter(torch.ones(3))
    try:
        linear_update(kind([p], lr=0.1), p)
    except TypeError:
        return False
    return True


def dtype_of(name: str, options: dict[str, Any]) -> str:
    """Return the dtype to whose rounding a row is exact."""
    rough = name.split("/")[0] in FLOAT32 or isinstance(options.get("lr"), Tensor)
    return "float32" if rough else "float64"


def step(kind: Callable[..., Any], options: dict[str, Any], device: str = "cpu") -> dict[str, Expect]:
    """Return the changes of a few steps, predicted and real, parameter by parameter."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64, device=device)) for s in SHAPES]
    single = {"lr": 0.01, **options}
    if "fused" not in single and "foreach" in inspect.signature(kind).parameters:
        single.setdefault("foreach", False)
    optimizer = kind(parameters, **single)
    sign = -1.0 if options.get("maximize") else 1.0
    out = {}
    for k in range(STEPS):
        predicted, before = [], [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.randn_like(p) * (0.3 + k % 3)
        for p in parameters:
            assert p.grad is not None
            update = linear_update(optimizer, p, anticipate=p.grad.clone())
            predicted.append(-(update.offset + update.operator.apply(sign * p.grad)))
        optimizer.step()
        for i, (p, old, change) in enumerate(zip(parameters, before, predicted, strict=True)):
            real = (p.detach() - old).cpu().numpy()
            scale = np.linalg.norm(real) + 1e-3 * float(old.norm().cpu())  # what a change is read off
            got = torch.as_tensor(change).detach().expand(old.shape).cpu().numpy()
            out[f"step {k}, parameter {i}"] = Expect(real, "power", scale, 10, got=got)
    return out
