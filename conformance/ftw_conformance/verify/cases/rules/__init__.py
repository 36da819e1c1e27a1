"""Update rules written out from their papers and from ``torch.optim``, in float64 NumPy, one step at a time.

Each returns the *next change of the parameter* as a function of the next gradient g, with the second moment frozen
where the selection freezes it: at the anticipated gradient a, or as the last step left it. The change is affine in g,
so that two calls give both the offset and the response, whatever way the core arrives at them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .first_order import asgd, lion, schedule_free_adamw, schedule_free_sgd, sgd
from .matrices import adafactor, hf_adafactor, muon, soap
from .moments import adadelta, adagrad, adam, adamax, nadam, radam, rmsprop

__all__ = ["RULES", "Rule"]

Rule = Callable[..., Any]
"""``rule(g, state, step, a, damping, **options) -> change``; ``step`` counts the steps taken, ``a`` may be None."""

RULES: dict[str, Rule] = {
    "adadelta": adadelta,
    "adafactor": adafactor,
    "adagrad": adagrad,
    "adam": adam,
    "adamax": adamax,
    "adamw": lambda *args, weight_decay=1e-2, **options: adam(
        *args, weight_decay=weight_decay, decoupled=True, **options
    ),
    "asgd": asgd,
    "hf_adafactor": hf_adafactor,
    "lion": lion,
    "muon": muon,
    "nadam": nadam,
    "radam": radam,
    "rmsprop": rmsprop,
    "schedule_free_adamw": schedule_free_adamw,
    "schedule_free_sgd": schedule_free_sgd,
    "sgd": sgd,
    "soap": soap,
}
