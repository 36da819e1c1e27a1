"""Compile the loops of this package when numba is there, and leave them as plain Python when it is not.

``NUMBA_DISABLE_JIT=1`` or ``FTW_REFERENCE_JIT=0`` in the environment turn compilation off. A compiled function calls
only compiled functions of its own file: numba decides by the time stamp of that one file whether a cached result still
holds, so that this rule keeps the cache truthful.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["COMPILED", "jit"]

F = TypeVar("F", bound=Callable[..., Any])

COMPILED: bool = (
    os.environ.get("FTW_REFERENCE_JIT", "1") != "0"
    and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
    and importlib.util.find_spec("numba") is not None
    and importlib.util.find_spec("scipy") is not None
)


def jit(function: F) -> F:
    """Compile ``function`` as it stands; the arithmetic keeps its order."""
    if not COMPILED:
        return function
    import numba

    compiled: Any = numba.njit(cache=True)(function)
    return cast("F", compiled)
