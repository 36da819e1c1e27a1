"""A step in which each function of the model is seen: the target pass, the geometry, the pool pass.

The counterpart of `learned`, for models without a plan and for options that no plan serves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ftw.geometry import Operator
from ftw_torch import batches
from ftw_torch.capture.passes import Passes
from ftw_torch.options import Options

from .checks import is_guarded
from .forward_scores import ForwardPass
from .memory import Memory
from .pool_pass import PoolPass, PoolPlan
from .target import Target, target_of

__all__ = ["Response", "discovered"]

Response = Callable[[dict[str, Tensor]], dict[str, Operator]]


def discovered(
    options: Options,
    memory: Memory,
    passes: Passes,
    parameters: dict[str, nn.Parameter],
    pool: Any,
    target: Any,
    response: Response,
    keep: int,
) -> tuple[PoolPass, Target, dict[str, Operator]]:
    """Return the pool pass, run, with the target and the geometry that it is for.

    Parameters
    ----------
    options, memory
        Of the selector; the memory notes when records are too large to be kept.
    passes : Passes
    parameters : dict of str to Parameter
    pool, target : batch
        ``target=None`` takes the pool's own mean.
    response : callable
        ``response(g_T) -> {name: operator}``, the geometry with g_T anticipated.
    keep : int
        How many samples a selection has.
    """
    forward = options.score == "forward"
    aim = _target(options, memory, passes, parameters, pool, target)
    operators = response(aim.mean)
    captured = None
    if target is None and not forward:  # the pool is its own target: its records are there
        assert aim.samples is not None
        captured, aim = (aim.losses, aim.samples), aim._replace(samples=None)
    plan = _plan(options, memory, batches.size(pool, "pool"), keep, guarded=aim.samples is not None)
    kind = functools.partial(ForwardPass, options.score_step, aim.losses) if forward else PoolPass
    pool_pass = kind(passes, parameters, pool, aim.mean, operators, plan, memory.reused, captured)
    pool_pass.run()
    if plan.keep and not pool_pass.kept and not forward:
        memory.two_passes = True
    return pool_pass, aim, operators


def _target(
    options: Options, memory: Memory, passes: Passes, parameters: dict[str, nn.Parameter], pool: Any, target: Any
) -> Target:
    """Return the target's mean gradient, with its samples' records if the guard needs them."""
    micro_batch = options.micro_batch
    if options.score == "forward":
        batch, what = (pool, "pool") if target is None else (target, "target")
        return target_of(passes, parameters, batch, micro_batch, samples=False, what=what)
    if target is None:
        return target_of(passes, parameters, pool, micro_batch, samples=True, what="pool")
    return target_of(passes, parameters, target, micro_batch, samples=is_guarded(options, memory, target))


def _plan(options: Options, memory: Memory, n: int, keep: int, *, guarded: bool) -> PoolPlan:
    """Return how the pass over a pool of n is run."""
    kept = not memory.two_passes
    budget = options.memory_budget if options.mode == "auto" else None
    asked = options.gram_of(n, keep)
    if not asked and guarded and (not kept or budget is not None):
        asked = options.shortlist_of(n, keep)  # the guard's means come from the Gram matrix where no records are
    return PoolPlan(asked, kept, options.micro_batch, budget, options.gram_sketch)
