"""Every optimizer of optax with every option: the predicted next update against the real one."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import ftw_jax
import numpy as np

from ftw_conformance.verify.table import Expect

__all__ = ["step", "updates"]

REFUSED = ("lbfgs", "rprop", "scale_by_rprop")  # by the adapter, with the reason
OTHERS = ("noisy_sgd", "scale_by_learning_rate")  # draws noise; no optimizer
STEPS = 2
VALUES: dict[str, tuple[Any, ...]] = {  # of every option of a constructor, the ones beside its default
    "alpha": (0.3,),
    "b1": (0.5,),
    "b2": (0.6,),
    "b3": (0.7,),
    "beta": (0.5,),
    "bias_correction": (True,),
    "bias_correction_mu": (False,),
    "bias_correction_nu": (False,),
    "centered": (True,),
    "clipping_threshold": (None, 0.1),
    "decay": (0.8,),
    "decay_offset": (1,),
    "decay_rate": (0.5,),
    "eps": (1e-3,),
    "eps_in_sqrt": (False,),
    "eps_root": (1e-3,),
    "factored": (False,),
    "initial_accumulator_value": (0.3,),
    "initial_scale": (0.3,),
    "learning_rate": (0.01, 0.3),
    "min_dim_size_to_factor": (2,),
    "min_norm": (0.1,),
    "momentum": (0.5,),
    "multiply_by_parameter_scale": (False,),
    "nesterov": (True,),
    "optimism": (0.3,),
    "rho": (0.8,),
    "threshold": (2.0,),
    "trust_coefficient": (0.1,),
    "weight_decay": (0.1,),
    "weight_decay_rate": (0.1,),
    **dict.fromkeys(
        ("accumulator_dtype", "dtype_momentum", "mask", "mu_dtype", "trust_ratio_mask", "weight_decay_mask"), ()
    ),
}
BASE = {"sgd": {"momentum": 0.9}, "rmsprop": {"momentum": 0.9}, "lars": {"momentum": 0.9}}


def updates() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """Yield name, constructor and options of each row; an option that has no values here raises."""
    optax: Any = importlib.import_module("optax")
    for name in sorted(vars(optax)):
        make = getattr(optax, name)
        if not inspect.isfunction(make) or name.startswith("_") or name in REFUSED + OTHERS:
            continue
        options = list(inspect.signature(make).parameters)
        if "learning_rate" not in options:
            continue
        for option in options:
            for value in VALUES[option]:
                yield f"{name}/{option}={value}", make, {"learning_rate": 0.01, **BASE.get(name, {}), option: value}


def step(make: Callable[..., Any], options: dict[str, Any], device: str = "cpu") -> dict[str, Expect]:
    """Return the updates of a few steps, predicted at the gradient that comes and real, parameter by parameter."""
    jax: Any = importlib.import_module("jax")
    jax.config.update("jax_enable_x64", True)
    rng, place = np.random.default_rng(0), jax.devices(device)[0]

    def put(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, place), tree)

    params = put({name: rng.normal(size=shape) for name, shape in (("b", (4,)), ("w", (6, 4)))})
    tx = make(**options)
    state, out = tx.init(params), {}
    for k in range(STEPS):
        g = put({name: rng.normal(size=p.shape) * (0.3 + k) for name, p in params.items()})
        predicted = ftw_jax.linear_updates(tx, params, state, anticipate=g)
        real, state = tx.update(g, state, params)
        for name, update in real.items():
            u = predicted[f"[{name!r}]"]
            got = np.broadcast_to(np.asarray(-(u.offset + u.operator.apply(g[name]))), update.shape)
            value = np.asarray(update)
            out[f"step {k}, {name}"] = Expect(value, "power", np.linalg.norm(value), 10, got=got)
        params = jax.tree.map(lambda p, u: p + u, params, real)
    return out
