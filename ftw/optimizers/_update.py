"""What the update rules share: the result, the inverse root of a second moment, bias corrections, weight decay."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

from ftw import _array, _kinds
from ftw._array import scalar_like
from ftw.geometry import Diagonal, Operator, Scale

__all__ = [
    "LinearUpdate",
    "correction",
    "coupled",
    "decoupled",
    "inverse_root",
    "larger",
    "number",
    "pick",
    "rule",
    "smaller",
]

_P = ParamSpec("_P")

# arguments that are shaped like the parameter (in Adafactor's state, vectors apart, nothing is), and those that are
# numbers of which none is negative; the decay rates among them stay below one
SHAPED = {
    "acc_delta", "anticipate", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer",
    "param", "square_avg", "sum", "variance", "z",
}  # fmt: skip
NUMBERS = {
    "alpha", "betas", "clip_threshold", "damping", "eps", "eps_root", "eta", "lambd", "lr", "lr_decay", "momentum",
    "rho", "step", "warmup_steps", "weight_decay", "weight_sum",
}  # fmt: skip


class LinearUpdate(NamedTuple):
    """The next change of a parameter, ``-(offset + operator.apply(g))``.

    Attributes
    ----------
    offset : array shaped like the parameter, or 0.0
        What happens whatever is chosen: momentum and weight decay.
    operator : operator
        P, the response to the gradient.
    """

    offset: Any
    operator: Operator


def rule(function: Callable[_P, LinearUpdate]) -> Callable[_P, LinearUpdate]:
    """Decorate an update rule: shapes and ranges that do not fit raise; NumPy's warnings are off inside."""
    what, names = function.__name__, tuple(inspect.signature(function).parameters)
    quiet = _array.quiet(function)

    @functools.wraps(function)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> LinearUpdate:
        arrays: dict[str, Any] = {}
        given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        for name, x in given.items():
            if name in SHAPED and x is not None:
                _kinds.require(x, f"{what}: {name}")
                arrays[name] = x
            elif name in NUMBERS:
                _in_range(what, name, x)
        if len({x.shape for x in arrays.values()}) > 1:
            shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in arrays.items())
            raise ValueError(f"{what}: arrays shaped like the parameter disagree: {shapes}")
        for name, x in {x.dtype: (name, x) for name, x in arrays.items()}.values():  # one of each dtype
            if not _array.is_floating(_array.namespace(x), x):
                raise TypeError(f"{what}: {name} is {x.dtype}; it must be of a real floating dtype")
        return quiet(*args, **kwargs)

    return inner


def inverse_root(
    xp: Any,
    v: Any,
    numerator: Any,
    eps: float,
    damping: float,
    *,
    eps_root: float = 0.0,
    start: Any = False,
    at_start: Any = 0.0,
) -> Operator:
    """Return ``numerator / (sqrt(v + eps_root) + eps + damping * rms(sqrt v))``.

    It is ``Scale(0.0)`` where v is zero everywhere, an untouched parameter, and zero where the denominator is: there
    the optimizer divides by zero. ``start`` says that there is no v yet; P is then ``at_start`` times the identity.
    """
    if start is True:
        return Scale(at_start)
    total = xp.sum(v)
    touched = total != 0  # of a NaN too: it is to show
    if start is False and _array.known(touched) is False:
        return Scale(0.0)
    shift = eps + damping * xp.sqrt(total / max(math.prod(v.shape), 1)) if damping else eps
    denominator = (xp.sqrt(v + eps_root) if eps_root else xp.sqrt(v)) + shift  # the parameter's shape
    if eps >= float(xp.finfo(v.dtype).smallest_normal):  # nowhere zero
        values = xp.astype(touched, v.dtype) * scalar_like(numerator, v) / denominator
    else:
        zero = (denominator == 0) | ~touched
        values = xp.where(zero, 0.0, numerator / xp.where(zero, 1.0, denominator))
    if start is not False:
        values = xp.where(start, scalar_like(at_start, v) * xp.ones_like(v), values)
    return Diagonal(values)


def correction(beta: Any, t: Any) -> Any:
    """Return ``1 - beta^t``, without cancellation for beta near one where t is an array of few bits."""
    if isinstance(t, (int, float)) or not isinstance(beta, (int, float)):
        return 1 - beta**t
    xp = _array.namespace(t)
    return -xp.expm1(t * math.log(beta)) if beta > 0 else xp.ones_like(t) - xp.astype(t == 0, t.dtype)


def number(value: Any, like: Any) -> Any:
    """Return a count or a rate as a Python number where reading it is free, else as an array like ``like``."""
    if type(value) in (int, float):
        return value
    if _array.is_free(value):
        return value.item()
    return scalar_like(value, like)


def pick(xp: Any, condition: Any, a: Any, b: Any, like: Any) -> Any:
    """Return a or b; they become arrays of the dtype of ``like`` only if the condition is one."""
    if isinstance(condition, bool):
        return a if condition else b
    return xp.where(condition, _full(xp, a, like), _full(xp, b, like))


def smaller(xp: Any, a: Any, b: Any, like: Any) -> Any:
    """Return the smaller of two numbers, of which either may be an array."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return min(a, b)
    return pick(xp, scalar_like(a, like) < scalar_like(b, like), a, b, like)


def larger(xp: Any, a: Any, b: Any, like: Any) -> Any:
    """Return the larger of two numbers, of which either may be an array."""
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return max(a, b)
    return pick(xp, scalar_like(a, like) > scalar_like(b, like), a, b, like)


def coupled(offset: Any, operator: Operator, weight_decay: float, param: Any, what: str) -> Any:
    """Return the offset with the response to ``weight_decay * param``, which is added to the gradient."""
    if not weight_decay:
        return offset
    if param is None:
        raise ValueError(f"{what}: weight_decay={weight_decay} is coupled and needs param=, the parameter's value")
    return offset + operator.apply(weight_decay * param)


def decoupled(offset: Any, lr: Any, weight_decay: float, param: Any) -> Any:
    """Return the offset with ``lr * weight_decay * param``; without ``param`` the decay is left out."""
    if not weight_decay or param is None:
        return offset
    return offset + scalar_like(lr, param) * weight_decay * param


def _in_range(what: str, name: str, value: Any) -> None:
    """Raise if a number, or one of a tuple of them, is out of range; arrays are not read, and None is none."""
    above = 1.0 if name == "betas" else math.inf
    for x in value if isinstance(value, (tuple, list)) else (value,):
        if isinstance(x, (int, float)) and not 0 <= x < above:
            limit = "in [0, 1)" if name == "betas" else "finite and not negative"
            raise ValueError(f"{what}: {name}={value} must be {limit}")


def _full(xp: Any, x: Any, like: Any) -> Any:
    return xp.asarray(x, dtype=like.dtype, device=_array.device(like))
