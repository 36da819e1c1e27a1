"""What the core can compute with, and what is refused by name with the remedy: other kinds of arrays and dtypes."""

from __future__ import annotations

import functools
import sys
from typing import Any

import array_api_compat as compat

from ._pytrees import fields

__all__ = ["require", "require_leaves"]

_fine: set[tuple[type, Any]] = set()  # of NumPy's, whose values can always be read


def require(x: Any, what: str) -> None:
    """Raise a TypeError that names ``what`` and the remedy if ``x`` is no array that the core can compute with.

    None and Python numbers pass: whether they fit is for the caller to say.
    """
    kind = type(x)
    if x is None or kind in (float, int, bool, complex):
        return
    if (kind, getattr(x, "dtype", None)) in _fine:
        return
    remedy = ""
    if isinstance(x, (list, tuple)) or kind.__module__.partition(".")[0] in ("pandas", "polars", "pyarrow"):
        remedy = "convert it to an array, as numpy.asarray does"
    elif kind.__name__ == "matrix":
        remedy = "convert it with numpy.asarray: its * is a matrix product"
    elif not compat.is_array_api_obj(x):
        remedy = "expected an array of NumPy, PyTorch, JAX, or another namespace of the array API standard"
    elif kind.__name__ == "MaskedArray":
        remedy = "fill it first, x.filled(0): what a mask hides would take part"
    elif _is_batched(x):
        raise TypeError(
            f"{what} is a tensor inside torch.func.vmap, whose values cannot be read; call it outside, one problem "
            "after the other, or use jax.vmap"
        )
    if remedy:
        home = kind.__module__.partition(".")[0] + "."
        raise TypeError(f"{what} is a {'' if home == 'builtins.' else home}{kind.__name__}; {remedy}")
    dtype: Any = getattr(x, "dtype", None)
    cure = _cure(str(dtype), compat.is_numpy_array(x))
    if cure:
        raise TypeError(f"{what} is of dtype {dtype}; {cure}")
    if compat.is_numpy_array(x):
        _fine.add((kind, x.dtype))


def require_leaves(tree: Any, name: str, *, what: str) -> None:
    """`require` every array of a record or an operator of the parameter ``name``."""
    if type(tree) in fields:
        for field in fields[type(tree)][0]:
            x = getattr(tree, field)
            if isinstance(x, tuple):  # parts of a sum, gains
                for part in x:
                    require_leaves(part, name, what=what)
            else:
                require(x, f"{what}: {field} in the {type(tree).__name__} of {name!r}")
    else:
        require(tree, f"{what}: an array of {name!r}")


@functools.cache
def _cure(dtype: str, numpy: bool) -> str:
    """Return what to do about a dtype, nothing if it will do."""
    name = dtype.rpartition(".")[2]
    if name in ("float32", "float64", "float16", "bool", "complex64", "complex128") or name.lstrip("u") in _INTEGERS:
        return ""
    if name == "bfloat16":
        return "NumPy computes with it by way of ml_dtypes, without linear algebra: cast it to float32" if numpy else ""
    if name in ("float128", "float96", "longdouble"):
        return "no linear algebra has it: cast it to float64"
    if name.startswith(("float8", "float4", "float6", "int4", "uint4", "int2", "uint2")):
        return "it is for storage: cast it to float32 first, scales worked in"
    return "expected float16, bfloat16, float32, float64 or integers"


_INTEGERS = ("int8", "int16", "int32", "int64")


def _is_batched(x: Any) -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not compat.is_torch_array(x):
        return False
    inside = getattr(getattr(torch._C, "_functorch", None), "is_batchedtensor", None)
    return inside is not None and bool(inside(x))
