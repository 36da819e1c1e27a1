"""The QP on the host: the solver of ``ftw_compiled`` where it was compiled ahead of time, the core's elsewhere.

The problems are tiny and many (one a pick), so that what counts is the cost of a call. Gram matrix and scores are on
the host at that point whatever the device: one transfer a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import ftw

__all__ = ["best_solver", "compiled"]

log = logging.getLogger("ftw_torch")


@cache
def best_solver() -> Callable[..., Any]:
    """Return `compiled` where ``python -m ftw_compiled`` was run, else `ftw.solve_qp`: a step never waits."""
    from ftw_compiled.compilation import COMPILED, is_ready

    if COMPILED and not is_ready():
        log.info("python -m ftw_compiled compiles a faster solver of the weights, once")
    return compiled if is_ready() else ftw.solve_qp


def compiled(
    gram: Tensor,
    linear: Tensor,
    constraint: Any,
    *,
    ridge: Any = 0.0,
    tol: float | None = None,
    max_steps: int = 0,
    start: Tensor | None = None,
) -> Any:
    """Solve one problem by ``ftw_compiled.solve_qp`` in float64; parameters and result as in `ftw.solve_qp`.

    float64 on the CPU is read in place, without a copy; anything else is converted first.
    """
    from ftw_compiled import solve_qp

    if gram.ndim != 2 or not gram.shape[0] or gram.requires_grad or isinstance(constraint, ftw.SourceShares):
        return ftw.solve_qp(gram, linear, constraint, ridge=ridge, start=start)
    bounds = constraint._replace(
        **{name: _host(bound) for name, bound in constraint._asdict().items() if isinstance(bound, Tensor)}
    )
    found = solve_qp(
        _host(gram),
        _host(linear),
        bounds,
        ridge=float(ridge),
        max_steps=max_steps,
        start=None if start is None else _host(start),
    )
    like: dict[str, Any] = {"dtype": linear.dtype, "device": linear.device}
    return ftw.QPSolution(
        torch.as_tensor(found.weights, **like),
        torch.tensor(found.objective, **like),
        torch.tensor(found.kkt, **like),
        torch.tensor(found.gap, **like),
        torch.tensor(int(found.steps), dtype=torch.int32, device=linear.device),
        torch.tensor(int(found.status), dtype=torch.int32, device=linear.device),
    )


def _host(x: Tensor) -> Any:
    array = x.detach().to("cpu", torch.float64).numpy()
    return array if array.ndim else float(array)
