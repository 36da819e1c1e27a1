"""Backward passes that leave ``.grad`` alone, under gradient checkpointing too.

A checkpointed region runs its forward again in the middle of the backward, and has to be seen again: the pass is
started below the functions that a `torch.overrides.TorchFunctionMode` would step out for. Reentrant checkpoints
refuse to be asked for particular gradients; for them the leaves' ``.grad`` is read and put back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

from .internals import run_backward

__all__ = ["accumulate", "gradients", "has_reentrant"]


def gradients(
    output: Tensor,
    leaves: Sequence[Tensor],
    grad: Tensor | None = None,
    *,
    retain: bool = False,
    reentrant: bool = False,
    others: Iterable[Tensor] = (),
) -> list[Tensor | None]:
    """Return the gradients of ``output`` (or of ``<output, grad>``) by the leaves; None where there is no path.

    Reentrant checkpoints may reach ``others`` too, whose ``.grad`` is put back.
    """
    if not leaves:
        return []
    grad = torch.ones_like(output) if grad is None else grad
    if not reentrant:
        found = run_backward(
            (output,), (grad,), retain, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False
        )
        return list(found)
    saved = [(leaf, leaf.grad) for leaf in (*leaves, *others)]
    try:
        for leaf, _ in saved:
            leaf.grad = None
        run_backward((output,), (grad,), retain, False, (), allow_unreachable=True, accumulate_grad=True)
        return [leaf.grad for leaf in leaves]
    finally:
        for leaf, old in saved:
            leaf.grad = old


def has_reentrant(outputs: Iterable[Tensor]) -> bool:
    """Return whether a reentrant checkpoint lies on the way back from the outputs."""
    stack: list[Node | None] = [output.grad_fn for output in outputs]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "CheckpointFunctionBackward":
            return True
        stack.extend(parent for parent, _ in node.next_functions)
    return False


def accumulate(p: Tensor, g: Tensor) -> None:
    """Add a gradient to ``.grad`` and run the hooks that wait for that, recording no history, as a backward would."""
    with torch.no_grad():
        p.grad = g if p.grad is None else p.grad.add_(g)
        for hook in list((p._post_accumulate_grad_hooks or {}).values()):
            hook(p)
