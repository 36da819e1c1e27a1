"""Decorators that hold a framework's mode while a function runs: NumPy's warnings, PyTorch's history."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

__all__ = ["quiet", "untracked"]

_T = TypeVar("_T")
_P = ParamSpec("_P")


def quiet(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate: NumPy's warnings about NaN and infinity are off inside; a status reports them, or they show."""

    @functools.wraps(function)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return function(*args, **kwargs)
        with numpy.errstate(all="ignore"):
            return function(*args, **kwargs)

    return inner


def untracked(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate: PyTorch records no history inside. What sorts and branches on values has no derivative to follow."""

    @functools.wraps(function)
    def inner(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        torch = sys.modules.get("torch")
        if torch is None or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        with torch.no_grad():
            return function(*args, **kwargs)

    return inner
