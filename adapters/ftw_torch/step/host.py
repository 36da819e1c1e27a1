"""The choice on the host, in NumPy: its tensors are tiny and many, and a call of NumPy costs a third of torch's.

CPU tensors are viewed as arrays, without a copy. What a user's own filter, solver or bounds are given stays torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ftw
from ftw import Selection
from ftw.spi import Products, choose

from .solver import best_solver, compiled

__all__ = ["choose_on_host"]


def choose_on_host(scores: Tensor, products: Products, *, solver: Any, **options: Any) -> Selection:
    """Return `ftw.spi.choose` of tensors, made in NumPy where they are on the host and no option needs tensors.

    Parameters
    ----------
    scores : tensor (n,)
    products : Products
        Of tensors.
    solver : callable
    **options
        Of `ftw.spi.choose`.
    """
    if not _plain(scores, solver, options):
        return choose(scores, products, solver=solver, **options)
    in_arrays: Callable[..., Any] = compiled_arrays if solver is compiled else ftw.solve_qp
    found = choose(_array(scores), _in_numpy(products), solver=in_arrays, **options)
    values = {name: None if x is None else torch.as_tensor(np.asarray(x)) for name, x in found._asdict().items()}
    return Selection(**{**values, "scores": scores})


def _plain(scores: Tensor, solver: Any, options: Mapping[str, Any]) -> bool:
    """Return whether nothing but names and numbers comes from the user, and nothing but numbers is asked for."""
    constraint = options.get("constraint", ftw.Simplex())
    return (
        scores.device.type == "cpu"
        and scores.dtype in (torch.float32, torch.float64)
        and solver is best_solver()
        and not callable(options.get("filter"))
        and isinstance(constraint, (ftw.NonNegative, ftw.Simplex, ftw.CappedSimplex, ftw.Box))
        and not any(isinstance(x, Tensor) for x in (options.get("ridge"), *constraint))
        and all(options[name] == default for name, default in _ABSENT.items() if name in options)
    )


_ABSENT = {"quota": None, "fill": "raise", "explain": False}  # options whose answers hold more than numbers


def _in_numpy(products: Products) -> Products:
    """Return the same products, asked and answered in arrays."""
    mean = products.pool

    def gram(indices: Any) -> Any:
        return _array(products.gram(_tensor(indices)))

    def length(indices: Any, weights: Any) -> Any:
        return _array(products.length(_tensor(indices), _tensor(weights)))

    def pool(order: Any, short: Any) -> tuple[Any, Any]:
        assert mean is not None
        distance, means = mean(_tensor(order), _tensor(short))
        return _array(distance), _array(means)

    samples = None if products.samples is None else _array(products.samples)
    return Products(gram, length, _array(products.target), samples, None if mean is None else pool)


def _array(x: Tensor) -> Any:
    return (x.float() if x.dtype.itemsize < 4 and x.is_floating_point() else x).detach().numpy()


def _tensor(x: Any) -> Any:
    return None if x is None else torch.from_numpy(np.ascontiguousarray(x))


def compiled_arrays(
    gram: Any, linear: Any, constraint: Any, *, ridge: Any = 0.0, tol: Any = None, max_steps: int = 0, start: Any = None
) -> Any:
    """Solve one problem by ``ftw_compiled.solve_qp`` in float64; parameters and result as in `ftw.solve_qp`."""
    from ftw_compiled import solve_qp

    del tol  # exact
    wide, own = np.float64, linear.dtype
    found = solve_qp(
        np.asarray(gram, wide),
        np.asarray(linear, wide),
        constraint._replace(**{name: _wide(bound) for name, bound in constraint._asdict().items()}),
        ridge=float(ridge),
        max_steps=max_steps,
        start=None if start is None else np.asarray(start, wide),
    )
    return ftw.QPSolution(
        np.asarray(found.weights, own),
        np.asarray(found.objective, own),
        np.asarray(found.kkt, own),
        np.asarray(found.gap, own),
        np.asarray(found.steps, np.int32),
        np.asarray(int(found.status), np.int32),
    )


def _wide(bound: Any) -> Any:
    array = np.asarray(bound, np.float64)
    return array if array.ndim else float(array)
