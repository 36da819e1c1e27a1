"""Steps of the PyTorch benchmark: plain training, ours, and every way of doing without us.

A step takes a pool and a target and ends with ``optimizer.step()``. Those that select compute the same thing: the
update of the ``keep`` candidates of the largest ``<g_i, P g_T>``, equally weighted; ``loop_default`` does the default
method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from ftw_torch import FilterThenWeight, geometry
from torch import Tensor, nn

import ftw
from ftw.geometry import Operator

__all__ = ["STEPS", "Setup", "limits", "ours"]

Loss = Callable[[nn.Module, Any], Tensor]
Step = Callable[[Tensor, Tensor], Any]


class Setup(NamedTuple):
    """What a step is made from."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    keep: int
    shortlist: int

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def plain(setup: Setup, *, keep: bool = False) -> Step:
    """Return an ordinary training step over the pool, or over its first ``keep`` samples."""

    def step(pool: Tensor, target: Tensor) -> None:
        setup.optimizer.zero_grad()
        torch.autograd.backward(setup.loss(setup.model, pool[: setup.keep] if keep else pool).mean())
        setup.optimizer.step()

    return step


def ours(setup: Setup, **options: Any) -> Step:
    """Return a step of `FilterThenWeight`."""
    # what is compared is the same arithmetic: the audit is for a first use, and runs in the warm-up
    selector = FilterThenWeight(
        setup.model, setup.optimizer, setup.loss, keep=setup.keep, shortlist=setup.shortlist, **options
    )

    def step(pool: Tensor, target: Tensor) -> Any:
        setup.optimizer.zero_grad()
        selection = selector.backward(pool, target)
        setup.optimizer.step()
        return selection

    step.selector = selector  # type: ignore[attr-defined]
    return step


def aim(setup: Setup, target: Tensor) -> tuple[dict[str, Tensor], dict[str, Operator]]:
    """Return g_T and P."""
    parameters = setup.parameters
    grads = torch.autograd.grad(setup.loss(setup.model, target).mean(), list(parameters.values()))
    g_t = dict(zip(parameters, grads, strict=True))
    return g_t, geometry(setup.optimizer, parameters, g_t)


def vmap_grad(setup: Setup) -> Step:
    """Return a step that takes per-sample gradients from ``vmap(grad)``."""

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        module: Any = lambda batch: torch.func.functional_call(setup.model, parameters, (batch,))  # noqa: E731
        return setup.loss(module, sample[None])[0]

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))

    def step(pool: Tensor, target: Tensor) -> None:
        setup.optimizer.zero_grad()
        g_t, operators = aim(setup, target)
        detached = {name: p.detach() for name, p in setup.parameters.items()}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            grads = per_sample(detached, pool)
        with torch.no_grad():
            parts = [g.flatten(1) @ operators[name].apply(g_t[name]).flatten().to(g.dtype) for name, g in grads.items()]
            chosen = torch.stack(parts).sum(0).topk(setup.keep).indices
            for name, p in setup.parameters.items():
                p.grad = grads[name][chosen].mean(0)
        setup.optimizer.step()

    return step


def loop(setup: Setup, *, default: bool = False) -> Step:
    """Return a step that takes per-sample gradients from one backward pass a sample, and keeps them all.

    With ``default`` it does the default method without the guard: the exact Gram of the shortlist, matching, weights.
    """

    def step(pool: Tensor, target: Tensor) -> None:
        setup.optimizer.zero_grad()
        g_t, operators = aim(setup, target)
        directions = {name: operators[name].apply(g_t[name]) for name in g_t}
        grads, scores = [], []
        for i in range(len(pool)):
            found = torch.autograd.grad(setup.loss(setup.model, pool[i : i + 1])[0], list(setup.parameters.values()))
            scores.append(sum((g * m).sum() for g, m in zip(found, directions.values(), strict=True)))
            grads.append(found)
        b = torch.stack(scores)
        with torch.no_grad():
            if default:
                short = b.topk(setup.shortlist).indices
                K = b.new_zeros(setup.shortlist, setup.shortlist)
                for j, name in enumerate(g_t):
                    halves = torch.stack([operators[name].sqrt(grads[i][j]).flatten() for i in short.tolist()])
                    K += halves @ halves.T
                picked = ftw.filters.matching(b[short], K, setup.keep).indices
                part = K[picked][:, picked]
                solution = ftw.solve_qp(part, b[short][picked], ftw.NonNegative(), ridge=0.05 * part.diagonal().mean())
                weights = (solution.weights / solution.weights.sum()).tolist()
                chosen = short[picked].tolist()
            else:
                chosen = b.topk(setup.keep).indices.tolist()
                weights = [1 / setup.keep] * setup.keep
            for j, p in enumerate(setup.parameters.values()):
                total = torch.zeros_like(p)
                for i, w in zip(chosen, weights, strict=True):
                    total.add_(grads[i][j], alpha=w)
                p.grad = total
        setup.optimizer.step()

    return step


TOP_K: dict[str, Any] = {"filter": "top_k", "weight": "uniform", "guard": 0}


def walked(setup: Setup, **options: Any) -> Step:
    """Return a step of ours that walks the pool in pieces of some 2048 tokens."""
    steps: dict[int, Step] = {}

    def step(pool: Tensor, target: Tensor) -> Any:
        size = max(1, 2048 // pool.shape[1])
        if size not in steps:
            steps[size] = ours(setup, micro_batch=size, **options)
        return steps[size](pool, target)

    return step


STEPS: dict[str, Callable[[Setup], Step]] = {
    "plain_pool": plain,
    "plain_k": lambda setup: plain(setup, keep=True),
    "top_k": lambda setup: ours(setup, capture="learned", **TOP_K),
    "top_k_pieces": lambda setup: walked(setup, **TOP_K),
    "default": lambda setup: ours(setup, capture="learned", guard=0),
    "default_pieces": lambda setup: walked(setup, guard=0),
    "default_guard": lambda setup: ours(setup, capture="learned"),
    "top_k_discovered": lambda setup: ours(setup, capture="discover", **TOP_K),
    "default_discovered": lambda setup: ours(setup, guard=0, capture="discover"),
    "default_guard_discovered": lambda setup: ours(setup, capture="discover"),
    "two_pass": lambda setup: ours(setup, mode="two_pass", **TOP_K),
    "two_pass_default": lambda setup: ours(setup, mode="two_pass", guard=0),
    "forward": lambda setup: ours(setup, score="forward", **TOP_K),
    "forward_default": lambda setup: ours(setup, score="forward"),
    "vmap_grad": vmap_grad,
    "loop": loop,
    "loop_default": lambda setup: loop(setup, default=True),
}


def limits(
    name: str, model: str, n: int, v: int, k: int, s: int, t: int, ratios: Mapping[str, float]
) -> tuple[float | None, float | None]:
    """Return the time and memory that are asked of a step, as ratios to the plain step over the pool.

    The floor is that of composing the update from factors, ``1 + V/N + k/3N``, and ``s/3N + s^2/3NT`` for the Gram
    matrix of a shortlist of s; the guard adds the lengths of the target's gradients, ``V/3N``. Scores by forward passes
    are two thirds of a plain step, and the k are trained by a plain one.
    """
    both = 1 + v / n
    if name == "forward":
        return 1.10 * (2 / 3 + v / n + k / n), None
    if "lora" in model:
        return (1.12 * both, 1.15 * both) if name.startswith(("top_k", "default")) else (None, None)
    floor, gram = both + k / (3 * n), (s + s * s / t) / (3 * n)
    if name.startswith("top_k"):
        return min(1.08 * floor, 0.92 * ratios.get("two_pass", 9.9)), 1.15 * both
    if name in ("default", "default_pieces"):
        return 1.10 * (floor + gram), 1.22 * both
    if name == "default_guard":
        return 1.10 * (floor + gram + v / (3 * n) + 1 / 24), 1.22 * both
    return None, None
