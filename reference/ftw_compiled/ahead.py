"""Compile the kernels ahead of time: once on a machine, so that no training step waits for a compiler."""

from __future__ import annotations

import numpy as np
from ftw_reference import CappedSimplex, NonNegative

from .compilation import COMPILED, mark
from .qp import solve_qp

__all__ = ["compile_kernels"]


def compile_kernels() -> None:
    """Compile the kernels, or load them from numba's cache, and leave the mark.

    Raises
    ------
    ImportError
        If numba or scipy is not installed.
    OSError
        If the mark cannot be written.
    """
    if not COMPILED:
        raise ImportError("the compiled solver needs numba and scipy: pip install 'filter-then-weight[reference]'")

    K, c = np.eye(3), np.ones(3)
    for constraint in (NonNegative(), CappedSimplex(0.5)):
        solve_qp(K, c, constraint)
        solve_qp(K, c, constraint, start=c)
        solve_qp(np.stack([K, K]), np.stack([c, c]), constraint)
    path = mark()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
