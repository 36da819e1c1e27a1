"""A compiled solver of the weights, beside the reference that it is checked against.

``python -m ftw_compiled`` compiles it ahead of time; the adapters use it where that was done. Importing this package
does not load numba; the first look at ``solve_qp`` does.
"""

from typing import TYPE_CHECKING, Any

from .compilation import COMPILED, is_ready

if TYPE_CHECKING:
    from .ahead import compile_kernels
    from .qp import solve_qp

__all__ = ["COMPILED", "compile_kernels", "is_ready", "solve_qp"]


def __getattr__(name: str) -> Any:
    """Load what needs numba when it is asked for."""
    if name == "solve_qp":
        from .qp import solve_qp

        return solve_qp
    if name == "compile_kernels":
        from .ahead import compile_kernels

        return compile_kernels
    raise AttributeError(f"module 'ftw_compiled' has no attribute {name!r}")
