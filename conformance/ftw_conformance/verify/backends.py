"""Backends: where the table's cases run, and how arrays get there and back.

The built-in ones are loaded when they are asked for. Others are registered with `register_backend`; see
docs/conformance.md.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Backend", "UnavailableError", "load", "names", "register_backend"]


class UnavailableError(Exception):
    """A backend that is not installed, or lacks the device or dtype asked for."""


class Backend(NamedTuple):
    """A namespace, with conversions from and to NumPy.

    Attributes
    ----------
    name : str
    from_numpy : callable
        ``from_numpy(x, dtype) -> array``; ``dtype`` is a name such as "float32", "int64" or "bool".
    to_numpy : callable
        ``to_numpy(array) -> numpy.ndarray``, 16-bit floats widened to float32.
    dtypes : tuple of str
        Floating dtypes that it has.
    wrap : callable
        What is done to a function before it is called: ``jax.jit``, or nothing.
    compiles : bool
        Whether each new shape costs a compilation; heavy cases are then left to ``--full``.
    traces : bool
        Whether ``wrap`` hides the values from the function.
    quick : tuple of str
        Patterns of the cases that are run without ``--full``, where even the others would take too long.
    """

    name: str
    from_numpy: Callable[[Any, str], Any]
    to_numpy: Callable[[Any], Any]
    dtypes: tuple[str, ...] = ("float64", "float32")
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function
    compiles: bool = False
    traces: bool = False
    quick: tuple[str, ...] = ("*",)


# Compiling takes nearly all of JAX's time here; without the compiler's last stage the arithmetic is the same.
COMPILE_FASTER = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

Factory = Callable[[str], Backend]
_factories: dict[str, Factory] = {}


def register_backend(
    name: str,
    *,
    from_numpy: Callable[[Any, str], Any] | None = None,
    to_numpy: Callable[[Any], Any] | None = None,
    factory: Factory | None = None,
    **options: Any,
) -> None:
    """Add a backend to the table.

    Parameters
    ----------
    name : str
        How ``--backend`` calls it.
    from_numpy, to_numpy : callable
        ``from_numpy(x, dtype_name) -> array`` and ``to_numpy(array) -> numpy.ndarray``.
    factory : callable, optional
        ``factory(device) -> Backend`` instead of the two, for backends with devices or a slow import.
    **options
        ``dtypes``, ``wrap``, ``compiles``, ``traces`` and ``quick`` of `Backend`.
    """
    if factory is None:
        if from_numpy is None or to_numpy is None:
            raise ValueError(f"register_backend: {name!r} needs from_numpy= and to_numpy=, or factory=")
        made = Backend(name, from_numpy, to_numpy, **options)

        def always(device: str) -> Backend:
            return made

        factory = always
    _factories[name] = factory


def names() -> list[str]:
    """Return the names of the backends, the built-in ones first."""
    return list(_factories)


def load(name: str, device: str = "cpu") -> Backend:
    """Return a backend, or raise `UnavailableError` with the reason."""
    if name not in _factories:
        raise UnavailableError(f"unknown; there are {', '.join(_factories)}, and --plugin registers others")
    try:
        return _factories[name](device)
    except ImportError as error:
        raise UnavailableError(f"not installed ({error.name or error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# The built-in ones


def _on_cpu(name: str, device: str) -> None:
    if device != "cpu":
        raise UnavailableError(f"{name} has no device {device!r}")


def _numpy(device: str) -> Backend:
    _on_cpu("numpy", device)

    def from_numpy(x: Any, dtype: str) -> Any:
        x = np.array(x, dtype=dtype)
        x.flags.writeable = False  # the core must not write into its inputs
        return x

    return Backend("numpy", from_numpy, np.asarray, ("float64", "float32", "float16"))


def _strict(name: str, device: str, **flags: Any) -> Backend:
    """Return array-api-strict: only what the standard has, on a device that is not the default one."""
    _on_cpu(name, device)
    xp = importlib.import_module("array_api_strict")
    xp.set_array_api_strict_flags(boolean_indexing=False, data_dependent_shapes=False, **flags)
    place = xp.Device("device1")

    def to_numpy(x: Any) -> Any:
        if not isinstance(x, xp.asarray(0).__class__):
            return np.asarray(x)
        if x.device != place:
            raise AssertionError(f"a result is on {x.device}, the inputs are on {place}")
        return np.asarray(x.to_device(xp.Device("CPU_DEVICE")))

    quick = EAGER_JAX if flags else ("*",)
    return Backend(name, lambda x, dtype: xp.asarray(np.array(x, dtype=dtype), device=place), to_numpy, quick=quick)


def _torch(device: str) -> Backend:
    torch = importlib.import_module("torch")
    if device != "cpu" and not (device.startswith("cuda") and torch.cuda.is_available()):
        raise UnavailableError(f"torch finds no device {device!r}")

    def from_numpy(x: Any, dtype: str) -> Any:
        return torch.as_tensor(np.array(x)).to(getattr(torch, dtype)).to(device)

    def to_numpy(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return np.asarray(x)
        if x.device.type != torch.device(device).type:
            raise AssertionError(f"a result is on {x.device}, the inputs are on {device}")
        x = x.detach().cpu()
        return (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x).numpy()

    return Backend("torch", from_numpy, to_numpy, ("float64", "float32", "bfloat16", "float16"))


# Eager JAX compiles every operation for every shape, and is what jit is traced from: where it differs is control flow.
EAGER_JAX = (
    "products/model/0", "combine/wide", "combine/tied*", "take/rows", "operators/polar/*", "operators/kronecker/*",
    "qp/capped/all kinds, a batch", "qp/a batch with one bad problem", "project/capped/random", "filters/top_k/*",
    "filters/matching/random/*", "filters/greedy_utility/ties/*", "filters/threshold/*", "filters/boltzmann/1.0/*",
    "resample/*", "guard/*", "optimizers/*", "selection/shortlist 0.5, memorised", "refuses/*",
    "sketch/hash",
)  # fmt: skip


def _jax(name: str, device: str) -> Backend:
    if device == "cpu":
        os.environ.setdefault("XLA_FLAGS", COMPILE_FASTER)  # read when jax first uses its device
    jax = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        place = jax.devices(device)[0]
    except RuntimeError as error:
        raise UnavailableError(f"jax finds no device {device!r}") from error

    def from_numpy(x: Any, dtype: str) -> Any:
        x = np.asarray(x)
        return jax.device_put(jax.numpy.asarray(x, dtype=dtype), place)

    def to_numpy(x: Any) -> Any:
        x = np.asarray(x)
        return x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind in "fV" else x

    def jit(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled: Callable[..., Any] = jax.jit(function)
        return compiled

    dtypes = ("float64", "float32", "bfloat16", "float16")
    if name == "jit":
        return Backend(name, from_numpy, to_numpy, dtypes, jit, compiles=True, traces=True)
    return Backend(name, from_numpy, to_numpy, dtypes, compiles=True, quick=EAGER_JAX)


register_backend("numpy", factory=_numpy)
register_backend("strict", factory=lambda device: _strict("strict", device))
register_backend("2023.12", factory=lambda device: _strict("2023.12", device, api_version="2023.12"))
register_backend("torch", factory=_torch)
register_backend("jax", factory=lambda device: _jax("jax", device))
register_backend("jit", factory=lambda device: _jax("jit", device))
