"""The rules of capture: which function, and which module of a user's own, is run by which rule.

A rule of a function is called as ``rule(capture, *arguments)`` in its place, and returns NotImplemented where it does
not apply. A rule of a module type is called as ``rule(capture, module, *inputs)`` in place of the module's forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any, TypeVar

from torch import nn

__all__ = ["Rule", "apply_rules", "every_rule", "recorded", "register_rule", "rule", "rule_of"]

Rule = Callable[..., Any]
R = TypeVar("R", bound=Rule)

_functions: dict[Any, Rule] = {}
_modules: dict[type[nn.Module], Rule] = {}


def rule(*functions: Any) -> Callable[[R], R]:
    """Register the decorated rule for some functions."""

    def register(handler: R) -> R:
        _functions.update(dict.fromkeys(functions, handler))
        return handler

    return register


def rule_of(function: Any) -> Rule | None:
    """Return the rule of a function, None if there is none."""
    return _functions.get(function)


def every_rule() -> dict[Any, Rule]:
    """Return the rules of functions."""
    return dict(_functions)


@contextmanager
def recorded() -> Iterator[set[Any]]:
    """Give a set to which the functions are added whose rules run, and apply, within the block."""
    applied: set[Any] = set()
    before = dict(_functions)

    def recording(function: Any, handler: Rule) -> Rule:
        @wraps(handler)
        def run(*args: Any, **kwargs: Any) -> Any:
            found = handler(*args, **kwargs)
            if found is not NotImplemented:
                applied.add(function)
            return found

        return run

    _functions.update({function: recording(function, handler) for function, handler in before.items()})
    try:
        yield applied
    finally:
        _functions.update(before)


def register_rule(kind: Any) -> Callable[[R], R]:
    """Register how a function or a module of your own is run while per-sample gradients are captured.

    A layer needs a rule where its parameters enter a function that capture cannot follow: a `torch.autograd.Function`,
    a kernel of your own. Without a rule such parameters are exact but slow, one backward pass a sample.

    Parameters
    ----------
    kind : callable, or subclass of nn.Module
        A function that `torch.overrides` can override, or the type of a layer; subclasses need rules of their own.

    Returns
    -------
    callable
        A decorator. It takes ``rule(capture, *arguments)`` for a function, ``rule(capture, module, *inputs)`` for a
        module. The rule returns the layer's output, computed by functions that have rules under ``with capture:``
        (for a module the block is open already), or NotImplemented where it does not apply.

    Raises
    ------
    TypeError
        If ``kind`` is neither.

    Notes
    -----
    The first use of a selector compares captured gradients with autograd's: a wrong rule is refused there, by the name
    of the parameter.

    Examples
    --------
    >>> @register_rule(ScaledLinear)  # doctest: +SKIP
    ... def scaled_linear(capture, module, x):
    ...     return F.linear(x, module.weight * module.scale)
    """
    if isinstance(kind, type) and issubclass(kind, nn.Module):

        def register(handler: R) -> R:
            _modules[kind] = handler
            return handler

        return register
    if not callable(kind):
        raise TypeError(f"register_rule: {kind!r} is neither a function nor a subclass of nn.Module")
    return rule(kind)


@contextmanager
def apply_rules(model: nn.Module, capture: Any) -> Iterator[None]:
    """Run modules that have a rule by it, for the length of a block."""
    with ExitStack() as stack:
        for module in model.modules() if _modules else ():
            handler = _modules.get(type(module))
            if handler is not None:
                stack.enter_context(_replaced(module, partial(_by_rule, handler, capture, module, module.forward)))
        yield


@contextmanager
def _replaced(module: nn.Module, forward: Rule) -> Iterator[None]:
    """Replace a module's forward for the length of a block."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def _by_rule(handler: Rule, capture: Any, module: nn.Module, forward: Rule, *args: Any, **kwargs: Any) -> Any:
    found = handler(capture, module, *args, **kwargs)
    return forward(*args, **kwargs) if found is NotImplemented else found
