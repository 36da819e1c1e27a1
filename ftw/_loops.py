"""Control flow that a JAX trace can follow: a Python loop for eager arrays, ``jax.lax`` for JAX arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from . import _array

__all__ = ["compiled", "cond", "fori_loop", "while_loop"]

S = TypeVar("S")


def while_loop(keep_going: Callable[[S], Any], step: Callable[[S], S], state: S, *, check_every: int = 1) -> S:
    """Run ``step`` while ``keep_going(state)`` holds, testing once every ``check_every`` steps.

    ``state`` is a tuple of arrays of fixed shapes and dtypes; ``keep_going`` returns a 0-d boolean array. For JAX
    arrays this is ``jax.lax.while_loop`` (which tests after each block of ``check_every`` steps as well).
    """

    def block(s: S) -> S:
        for _ in range(check_every):
            s = step(s)
        return s

    if _uses_jax(state):
        result: S = sys.modules["jax"].lax.while_loop(keep_going, block, state)
        return result
    while bool(keep_going(state)):
        state = block(state)
    return state


def fori_loop(count: int, step: Callable[[Any, S], S], state: S) -> S:
    """Return ``state`` after ``step(i, state)`` for i = 0 .. count - 1."""
    if _uses_jax(state):
        result: S = sys.modules["jax"].lax.fori_loop(0, count, step, state)
        return result
    for i in range(count):
        state = step(i, state)
    return state


def cond(condition: Any, if_true: Callable[..., S], if_false: Callable[..., S], *operands: Any) -> S:
    """Return ``if_true(*operands)`` or ``if_false(*operands)``; eager backends run only the one that is needed."""
    if _uses_jax(condition):
        result: S = sys.modules["jax"].lax.cond(condition, if_true, if_false, *operands)
        return result
    return if_true(*operands) if bool(condition) else if_false(*operands)


def compiled(function: Callable[..., S], static: tuple[str, ...], like: Any) -> Callable[..., S]:
    """Return ``function``, compiled whole if ``like`` is a JAX array: a loop outside of jit compiles at every call."""
    if not _array.is_jax(like):
        return function
    if function not in _compiled:
        _compiled[function] = sys.modules["jax"].jit(function, static_argnames=static)
    result: Callable[..., S] = _compiled[function]
    return result


_compiled: dict[Any, Any] = {}


def _uses_jax(state: Any) -> bool:
    if "jax" not in sys.modules:
        return False
    while isinstance(state, tuple) and state and not isinstance(state[0], (bool, int, float)):
        state = state[0]  # the arrays of a state are of one namespace: the first will do
    return not isinstance(state, (bool, int, float)) and any(map(_array.is_jax, _array.leaves(state)))
