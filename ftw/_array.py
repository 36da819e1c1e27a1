"""What differs between array namespaces, in one place (the other is ``_loops.py``).

Everything else in ``ftw`` is written against the Python array API standard. Here live: the lookup of the namespace,
with an error that names the arrays; the widening of 16-bit floats where sums are taken; sums over repeated indices,
which the standard lacks; and the registration of records as JAX pytrees, done without importing JAX.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import array_api_compat as compat

from . import _older
from ._modes import quiet, untracked
from ._pytrees import leaves, pytree, register_pytrees

__all__ = [
    "Array",
    "argsort_descending",
    "cast",
    "device",
    "integers",
    "is_floating",
    "is_free",
    "is_jax",
    "is_numpy",
    "is_positive",
    "is_traced",
    "known",
    "lean",
    "leaves",
    "namespace",
    "numpy_views",
    "outside",
    "over",
    "power_of_two",
    "put",
    "pytree",
    "quiet",
    "read",
    "register_pytrees",
    "scalar_like",
    "scatter",
    "segment_sum",
    "solve_positive",
    "submatrix",
    "torch_views",
    "true_indices",
    "untracked",
    "widen",
]


@runtime_checkable
class Array(Protocol):
    """An array of any namespace of the array API standard (numpy, torch, jax, array-api-strict ...)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    @property
    def T(self) -> Any: ...  # noqa: N802
    def __add__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __matmul__(self, other: Any, /) -> Any: ...
    def __neg__(self) -> Any: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def __pow__(self, other: Any, /) -> Any: ...


def namespace(*arrays: Any, what: str = "arguments") -> Any:
    """Return the one array namespace of ``arrays``; Python numbers and None are passed over.

    Raises
    ------
    TypeError
        If no argument is an array, or if they come from several namespaces.
    ValueError
        If they live on several devices.
    """
    found = [a for a in arrays if a is not None and not isinstance(a, (bool, int, float, complex))]
    if not found:  # arithmetic turns NumPy's 0-d arrays into scalars, and its float64 is a float by inheritance
        found = [sys.modules["numpy"].asarray(a) for a in arrays if hasattr(a, "dtype")]
    xp = _namespaces.get(type(found[0])) if found else None
    if xp is None or any(type(a) is not type(found[0]) for a in found):
        try:
            xp = compat.array_namespace(*found)
        except TypeError as error:
            kinds = sorted({f"{type(a).__module__.split('.')[0]}.{type(a).__name__}" for a in found})
            raise TypeError(
                f"{what}: expected arrays of one namespace, got {', '.join(kinds) or 'none'}; convert them to one first"
            ) from error
        if all(compat.is_numpy_array(a) or compat.is_torch_array(a) for a in found):
            _namespaces.update((type(a), xp) for a in found)
    xp = _older.served(xp)
    if len(found) > 1 and not compat.is_numpy_namespace(xp) and not any(is_traced(a) for a in found):
        first = compat.device(found[0])
        if any(compat.device(a) != first for a in found):
            devices = sorted({str(compat.device(a)) for a in found})
            raise ValueError(f"{what}: arrays on several devices {devices}; move them to one first")
    return xp


_namespaces: dict[type, Any] = {}  # of numpy's and torch's classes: looking them up takes longer than small products


def device(x: Any) -> Any:
    """Return where ``x`` lives, None where the namespace decides by itself (a traced array)."""
    return None if is_jax(x) else compat.device(x)


def is_jax(x: Any) -> bool:
    """Return whether ``x`` is a JAX array or tracer, without importing JAX."""
    return _is_of_jax(type(x).__module__)


@functools.cache
def _is_of_jax(module: str) -> bool:
    return module.partition(".")[0] in ("jax", "jaxlib")


def is_traced(x: Any) -> bool:
    """Return whether ``x`` is a JAX tracer: its values are not known yet."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def known(condition: Any, *, wait: bool = False) -> bool | None:
    """Return the truth of a 0-d array; None if it is traced or, unless ``wait``, if reading it costs a device sync."""
    if isinstance(condition, bool):
        return condition
    if is_traced(condition):
        return None
    if not wait and compat.is_torch_array(condition) and condition.device.type != "cpu":
        return None
    return bool(condition)


def is_free(x: Any) -> bool:
    """Return whether the value of a 0-d array can be read without waiting for a device, or a trace."""
    return bool(compat.is_numpy_array(x)) or bool(compat.is_torch_array(x) and x.device.type == "cpu")


def is_numpy(xp: Any) -> bool:
    """Return whether the namespace is NumPy, wrapped or not."""
    return bool(compat.is_numpy_namespace(xp))


def is_floating(xp: Any, x: Any) -> bool:
    """Return whether ``x`` has a real floating dtype."""
    return _is_real(xp, x.dtype)


@functools.cache
def _is_real(xp: Any, dtype: Any) -> bool:
    return bool(xp.isdtype(dtype, "real floating"))


def widen(xp: Any, x: Any) -> Any:
    """Return ``x`` in float32 if it is a 16-bit float, itself otherwise. Sums are taken in the result."""
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


def integers(x: Any) -> Any:
    """Return integers of any width in the namespace's default one, so that no product or offset of them wraps.

    What is no array of integers is returned as it is: JAX builds records of placeholders, and checks name the rest.
    """
    if not compat.is_array_api_obj(x):
        return x
    array: Any = x
    xp = namespace(array)
    if not xp.isdtype(array.dtype, "integral"):
        return array
    default = xp.__array_namespace_info__().default_dtypes()["integral"]
    return array if array.dtype == default else xp.astype(array, default)


def over(x: Any, like: Any) -> Any:
    """Return ``x`` with as many axes as ``like``, in its dtype: axes of length one come first, as broadcasting has it.

    JAX can refuse to add axes by itself (``jax_numpy_rank_promotion="raise"``).
    """
    x = cast(x, like)
    return x if x.ndim >= like.ndim else x[(None,) * (like.ndim - x.ndim) + (...,)]


def cast(x: Any, like: Any) -> Any:
    """Return ``x`` in the dtype of ``like``; nothing happens if it has it already."""
    if x.dtype == like.dtype:
        return x
    return compat.array_namespace(x).astype(x, like.dtype)


def together(xp: Any, *arrays: Any) -> list[Any]:
    """Return the arrays widened, and in the widest of their dtypes."""
    wide = [widen(xp, a) for a in arrays]
    dtype = xp.result_type(*wide)
    return [a if a.dtype == dtype else xp.astype(a, dtype) for a in wide]


def argsort_descending(xp: Any, x: Any) -> Any:
    """Return indices (n,) that sort ``x`` (n,) from large to small, ties by index, NaN last."""
    return xp.argsort(-x, stable=True)  # ascending: descending=True would put NaN first


def outside(indices: Any, size: int, *, least: int = 0) -> bool:
    """Return whether an integer is outside [least, size); False where reading them waits for a device, or a trace."""
    if is_traced(indices) or (compat.is_torch_array(indices) and indices.device.type != "cpu"):
        return False
    xp = namespace(indices)
    if xp.iinfo(indices.dtype).bits < 64 or compat.is_torch_array(indices):  # which does not compare unsigned ones
        indices = integers(indices)
    limits, wrong = xp.iinfo(indices.dtype), []
    if least > limits.min:
        wrong.append(indices < least)
    if size <= limits.max:
        wrong.append(indices >= size)
    return any(bool(known(xp.any(w))) for w in wrong)  # in a trace what is computed from constants is traced too


def put(xp: Any, x: Any, index: Any, value: Any) -> Any:
    """Return a copy of ``x`` (n,) with ``value`` at position ``index``, a 0-d integer array or an int."""
    positions = xp.arange(x.shape[0], device=device(x))  # (n,)
    return xp.where(positions == index, value, x)


def segment_sum(xp: Any, values: Any, segments: Any, count: int) -> Any:
    """Sum the rows of ``values`` (r, d) that share a segment number (r,); returns (count, d)."""
    if compat.is_torch_namespace(xp):
        out = xp.zeros((count, values.shape[1]), dtype=values.dtype, device=values.device)
        return out.index_add_(0, segments.reshape(-1).to(xp.int64), values)
    if compat.is_jax_namespace(xp):
        return xp.zeros((count, values.shape[1]), dtype=values.dtype).at[segments].add(values)
    if compat.is_numpy_namespace(xp):
        order = xp.argsort(segments, stable=True)
        ordered = segments[order]
        first = xp.flatnonzero(xp.concat([xp.ones(1, dtype=bool), ordered[1:] != ordered[:-1]]))
        out = xp.zeros((count, values.shape[1]), dtype=values.dtype)
        if ordered.shape[0]:
            out[ordered[first]] = xp.add.reduceat(values[order], first, axis=0)
        return out
    numbers = xp.arange(count, dtype=segments.dtype, device=device(values))  # (count,)
    hit = xp.astype(numbers[:, None] == segments[None, :], values.dtype)  # (count, r)
    bad = ~xp.isfinite(values)  # which a product would spread to all segments
    spoiled = hit @ xp.astype(bad, values.dtype) > 0  # (count, d)
    return xp.where(spoiled, xp.nan, hit @ xp.where(bad, 0.0, values))


def read(x: Any) -> Any:
    """Return an eager 0-d array as the Python number it holds (on a GPU at the cost of a sync); anything else as it is.

    Scalars that only steer a loop are kept so: arithmetic with Python numbers costs a tenth of that with 0-d arrays.
    """
    kind = type(x)  # a NumPy scalar is a float by inheritance, and slow
    if kind is float or kind is bool or kind is int or x.ndim or is_jax(x):
        return x
    if hasattr(x, "item"):
        return x.item()
    dtype = str(x.dtype)
    return bool(x) if "bool" in dtype else int(x) if "int" in dtype else float(x)


def power_of_two(e: Any) -> Any:
    """Return 2^e for a 0-d float array that holds an integer, exactly: a Python float, or a 0-d JAX array."""
    if is_jax(e):
        return sys.modules["jax"].numpy.ldexp(e * 0 + 1, e.astype("int32"))
    return math.ldexp(1.0, int(read(e)))


def pick(xp: Any, condition: Any, a: Any, b: Any) -> Any:
    """Return ``a`` where the condition holds, else ``b``; the condition is an array or a Python bool."""
    if isinstance(condition, bool):
        return a if condition else b
    return xp.where(condition, a, b)


def true_indices(xp: Any, mask: Any, count: int) -> Any:
    """Return the indices (count,) at which the eager mask (n,) is true, given how many there are."""
    if compat.is_array_api_strict_namespace(xp):  # where shapes must not depend on data
        return xp.argsort(xp.astype(~mask, xp.uint8), stable=True)[:count]
    return xp.nonzero(mask)[0]


def submatrix(xp: Any, A: Any, indices: Any) -> Any:
    """Return the rows and columns ``indices`` (k,) of A (n, n): (k, k)."""
    if compat.is_numpy_namespace(xp):
        return A[indices[:, None], indices]
    return xp.take(xp.take(A, indices, axis=0), indices, axis=1)


def scatter(xp: Any, values: Any, indices: Any, n: int) -> Any:
    """Return zeros (n,) with ``values`` (k,) at distinct ``indices`` (k,); eager."""
    if compat.is_numpy_namespace(xp):
        out = xp.zeros(n, dtype=values.dtype)
        out[indices] = values
        return out
    if compat.is_torch_namespace(xp):
        return values.new_zeros(n).index_copy_(0, indices, values)
    hit = xp.arange(n, device=device(values))[:, None] == indices[None, :]  # (n, k)
    return xp.astype(hit, values.dtype) @ values


def lean(xp: Any) -> Any:
    """Return NumPy itself in place of its wrapped namespace, if its own functions follow the standard: it is faster."""
    numpy = sys.modules.get("numpy")
    own = numpy is not None and compat.is_numpy_namespace(xp) and hasattr(numpy, "cumulative_sum")
    return numpy if own else xp


def numpy_views(values: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return values with PyTorch's CPU tensors as NumPy arrays over the same memory; None if that cannot be.

    Small problems take many small calls, and a call of PyTorch costs several times one of NumPy. It cannot be where
    something is no CPU tensor, or has a dtype that NumPy lacks.
    """
    tensors = [x for x in values if compat.is_torch_array(x)]
    if not tensors:
        return None
    torch = sys.modules["torch"]
    plain = (torch.float32, torch.float64)
    if any(
        x.device.type != "cpu" or x.dtype not in plain or type(x) not in (torch.Tensor, torch.nn.Parameter)
        for x in tensors
    ):
        return None
    return tuple(x.detach().numpy() if compat.is_torch_array(x) else x for x in values)


def torch_views(values: Sequence[Any]) -> tuple[Any, ...]:
    """Return NumPy's arrays and scalars as PyTorch's tensors, the way back from `numpy_views`."""
    return tuple(map(sys.modules["torch"].as_tensor, values))


def solve_positive(xp: Any, A: Any, B: Any) -> Any:
    """Solve A X = B for positive definite A (..., n, n) and B (..., n, k); NaN, never an error, where that fails."""
    if compat.is_torch_namespace(xp):
        torch = sys.modules["torch"]
        factor, failed = torch.linalg.cholesky_ex(A)
        if failed.ndim or failed.item():
            factor = torch.where((failed > 0)[..., None, None], torch.nan, factor)
        return torch.cholesky_solve(B, factor)
    if compat.is_jax_namespace(xp):
        factor = xp.linalg.cholesky(A)
        return sys.modules["jax"].scipy.linalg.cho_solve((factor, True), B)
    try:
        return xp.linalg.solve(A, B)
    except Exception as error:
        if type(error).__name__ != "LinAlgError":
            raise
        return xp.full_like(B, xp.nan)


def is_positive(xp: Any, A: Any) -> Any:
    """Return which of the symmetric matrices (..., n, n) have a Cholesky factor; booleans (...)."""
    if compat.is_torch_namespace(xp):
        return sys.modules["torch"].linalg.cholesky_ex(A)[1] == 0
    try:
        factor = xp.linalg.cholesky(A)
        if A.ndim == 2 and compat.is_numpy_namespace(xp):
            return True
    except Exception as error:
        if type(error).__name__ != "LinAlgError":
            raise
        if A.ndim == 2:
            return xp.zeros((), dtype=xp.bool, device=device(A))
        flat = xp.reshape(A, (-1, *A.shape[-2:]))  # one bad matrix of a batch spoils the call: one by one
        each = [is_positive(xp, flat[i, ...]) for i in range(flat.shape[0])]
        return xp.reshape(xp.stack(each), A.shape[:-2])
    return xp.all(xp.isfinite(xp.linalg.diagonal(factor)), axis=-1)


def scalar_like(value: Any, x: Any) -> Any:
    """Return a number or 0-d array in the dtype of ``x``, so that it does not widen what it multiplies."""
    if isinstance(value, (bool, int, float)):
        return value if type(value) in (bool, int, float) else float(value)  # NumPy's float64 is a float that widens
    if not hasattr(value, "dtype"):
        return value
    if compat.is_torch_array(value) and compat.is_torch_array(x):
        return value.to(x)
    xp = namespace(x)
    return xp.astype(xp.asarray(value, device=device(x)), x.dtype)
