"""How the kernels are compiled, and whether that was done on this machine.

Compiling takes 20 to 50 seconds, once: numba keeps the result on disk. ``python -m ftw_compiled`` does it and leaves a
mark beside numba's files, with a digest of everything the result depends on. A training step looks at the mark alone,
so that it never waits for a compiler.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

__all__ = ["COMPILED", "is_ready", "jit_fast", "mark"]

F = TypeVar("F", bound=Callable[..., Any])

COMPILED: bool = (
    os.environ.get("FTW_REFERENCE_JIT", "1") != "0"
    and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")
    and importlib.util.find_spec("numba") is not None
    and importlib.util.find_spec("scipy") is not None
)


def jit_fast(function: F) -> F:
    """Compile ``function`` and let sums be reordered into vector registers; NaN and infinity keep their meaning."""
    if not COMPILED:
        return function
    import numba

    flags = {"reassoc", "contract", "nsz", "arcp"}
    compiled: Any = numba.njit(cache=True, fastmath=flags, error_model="numpy")(function)
    return cast("F", compiled)


def is_ready() -> bool:
    """Return whether the kernels were compiled on this machine, without importing numba."""
    return COMPILED and mark().exists()


@functools.cache
def mark() -> Path:
    """Return the file that says that the kernels of this source, numba, Python and processor are in the cache."""
    here = Path(__file__)
    digest = hashlib.sha256(here.with_name("kernels.py").read_bytes())
    parts = (importlib.metadata.version("numba"), sys.version, platform.machine(), _processor())
    digest.update(repr(parts).encode())
    folder = os.environ.get("NUMBA_CACHE_DIR")
    return (Path(folder) if folder else here.parent / "__pycache__") / f"kernels-{digest.hexdigest()[:16]}.ready"


def _processor() -> str:
    """Return the processor's name and features where the system tells them: numba compiles for these."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")
