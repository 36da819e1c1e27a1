"""Namespaces of version 2023.12 of the array API standard, served like those of 2024.12.

The newer version lets ``where``, ``maximum`` and ``minimum`` take Python numbers beside an array, and adds
``take_along_axis`` and ``count_nonzero``; the core uses all of these.
"""

from __future__ import annotations

from typing import Any

import array_api_compat as compat

__all__ = ["served"]


def served(xp: Any) -> Any:
    """Return the namespace, with what version 2024.12 adds where it is older.

    Raises
    ------
    TypeError
        If it is older than 2023.12.
    """
    if compat.is_numpy_namespace(xp) or compat.is_torch_namespace(xp) or compat.is_jax_namespace(xp):
        return xp
    version = str(getattr(xp, "__array_api_version__", ""))
    if version >= "2024.12" or isinstance(xp, _Older):
        return xp
    if version < "2023.12":
        name = getattr(xp, "__name__", xp)
        raise TypeError(
            f"the namespace {name} has version {version or 'none'} of the array API standard; ftw needs 2023.12 or "
            "later"
        )
    return _wrapped.setdefault(xp, _Older(xp))


class _Older:
    """A namespace of version 2023.12; whatever is not here is its own."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._xp, name)

    def _alike(self, a: Any, b: Any) -> tuple[Any, Any]:
        """Return both as arrays; a Python number takes the dtype of the other."""
        if not hasattr(a, "dtype"):
            a = self._xp.asarray(a, dtype=b.dtype, device=compat.device(b))
        elif not hasattr(b, "dtype"):
            b = self._xp.asarray(b, dtype=a.dtype, device=compat.device(a))
        return a, b

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return self._xp.where(condition, *self._alike(a, b))

    def maximum(self, a: Any, b: Any) -> Any:
        return self._xp.maximum(*self._alike(a, b))

    def minimum(self, a: Any, b: Any) -> Any:
        return self._xp.minimum(*self._alike(a, b))

    def count_nonzero(self, x: Any, *, axis: Any = None) -> Any:
        return self._xp.sum(self._xp.astype(x != self._xp.zeros_like(x), self._xp.int64), axis=axis)

    def take_along_axis(self, x: Any, indices: Any, *, axis: int = -1) -> Any:
        """Return ``x[..., indices[..., k]]`` along the last axis, O(n k)."""
        assert axis == -1
        numbers = self._xp.arange(x.shape[-1], dtype=indices.dtype, device=compat.device(x))
        hit = indices[..., :, None] == numbers  # (..., k, n)
        return self._xp.sum(self.where(hit, x[..., None, :], 0), axis=-1)


_wrapped: dict[Any, _Older] = {}
