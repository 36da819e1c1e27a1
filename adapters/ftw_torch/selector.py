"""FilterThenWeight: one line where ``loss.backward()`` stood.

One pass over the pool does the work:

1. the target's gradient g_T, and the optimizer's response P with g_T folded into its second moment;
2. the pool's forward, and a backward to activations only: as each layer's output gradient arrives, the layer's share of
   the scores is added up, and its factors or the gradients made of them are kept, whichever is less (``stream.py``);
3. the choice (`ftw.choice`) on the host, after one transfer, and the weighted gradient composed from what was kept.

With ``mode="two_pass"`` nothing is kept, and the gradient of those chosen comes from going back to them
(``step/pool_pass.py``).
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftw import Selection, Simplex, Status
from ftw.choice import check_options, choose
from ftw.geometry import Operator
from ftw.guard_watch import GuardWatch
from ftw.sketch import LARGEST

from . import batches
from .amp import Ambient, Overflow, overflowed
from .capture.backward import accumulate
from .capture.discovery import refuse_coupled_layers, trainable
from .capture.passes import Passes, uncompiled
from .fsdp import refuse_sharded
from .optim.geometry import geometry
from .step.audit import Audits, audit
from .step.pool_pass import Plan, Walk
from .step.products import PoolProducts
from .step.solver import best_solver
from .step.target import Target, refuse_nonfinite, refuse_target, target_of

__all__ = ["FilterThenWeight"]

log = logging.getLogger("ftw_torch")
_warn_once = functools.cache(log.warning)  # the same words once a process, whatever the number of selectors

Loss = Callable[[nn.Module, Any], Tensor]


class FilterThenWeight:
    """Chooses and weighs the samples of a pool so that the optimizer's next update serves a target.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained; nothing is installed on it.
    optimizer : torch.optim.Optimizer, or a sequence of them
        Read, never written. An unknown class raises and names `register_optimizer`. Several share the parameters (Muon
        for matrices, AdamW for the rest).
    per_sample_loss : callable
        ``per_sample_loss(model, batch) -> (n,)``: one loss a sample, not their mean.
    keep : int
        Samples to train on at each step.
    micro_batch : int, optional
        Walk a pool (and a target) in pieces of this many samples, to bound the memory of activations.
    on_nonfinite : {"raise", "drop"}
        What to do about a sample whose loss or gradient is NaN or infinite: raise and name it, or go on without it.
        In the target it always raises.
    damping : float
        Damping of the geometry, see `ftw.optimizers.adam`.
    shortlist : int, float or None
        How many go on to the Gram matrix, see `ftw.filter_then_weight`; half of the pool by default.
    scaler : torch.amp.GradScaler, optional
        The one whose ``step`` follows: losses are scaled by it, and so is what is added to ``.grad``. A gradient that
        overflows (without ``on_nonfinite="drop"``) is passed on as an infinity, for the scaler to skip the step; the
        selection's status is then NOT_FINITE and its weights are NaN.
    mode : {"auto", "one_pass", "two_pass"}
        One pass keeps the pool's records and composes the update from them. Two passes keep nothing but scores and
        Gram matrix, and go back to those chosen: less memory, ``keep/N`` of a plain step more. "auto" is one pass,
        and two from the step on at which the records exceed ``memory_budget``, and two for a model that checkpoints
        its activations; the log (``ftw_torch``) says so. With ``target=None`` records are kept in any mode.
    memory_budget : int, optional
        Bytes of records that one pass may keep.
    score_rank : int, optional
        Score by the best approximation of this rank of ``P g_T`` for each matrix: cheaper where layers are wide.
    gram_sketch : int, optional
        Take the Gram matrix from count sketches of this size (at most 32767, see `ftw.sketch`): entries are wrong by
        about ``|g_i| |g_j| / sqrt(size)``. For two passes over a pool in pieces (``micro_batch``), where the exact one
        has to capture the shortlist again.
    **options
        ``filter``, ``weight``, ``constraint``, ``ridge``, ``guard`` and ``solver`` of `ftw.filter_then_weight`. The
        default solver is the compiled one of ``ftw_reference`` where that is installed.

    Notes
    -----
    The arithmetic, in plain training steps over the pool of N with V targets: ``1 + V/N + keep/(3N)``,
    and ``shortlist/(3N)`` more for the exact Gram matrix; where sequences are longer than layers are wide, about ``1
    + V/N`` for both (``docs/cost.md`` has what was measured). Two extra buffers the size of the parameters (g_T and
    the diagonal of P), and the records of the pool: for each layer its inputs, which autograd keeps anyway, and
    output gradients, or else its per-sample gradients. On a GPU a step waits for the device once, to make the choice
    on the host (and once more where a sample is dropped, where a pool is walked in pieces, and for the length of an
    update without a Gram matrix, top-k with uniform weights); the selection's tensors are on the host.

    Examples
    --------
    >>> selector = FilterThenWeight(model, optimizer, per_sample_loss, keep=16)  # doctest: +SKIP
    >>> selection = selector.backward(pool, target)  # in place of loss.backward()  # doctest: +SKIP
    >>> optimizer.step()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        per_sample_loss: Loss,
        *,
        keep: int,
        micro_batch: int | None = None,
        on_nonfinite: str = "raise",
        damping: float = 0.1,
        shortlist: int | float | None = 0.5,
        scaler: torch.amp.GradScaler | None = None,
        mode: str = "auto",
        memory_budget: int | None = None,
        score_rank: int | None = None,
        gram_sketch: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; expected an nn.Module")
        if not callable(per_sample_loss):
            raise TypeError(f"per_sample_loss is a {type(per_sample_loss).__name__}; expected (model, batch) -> (n,)")
        if scaler is not None and not hasattr(scaler, "scale"):
            raise TypeError(f"scaler is a {type(scaler).__name__}; expected a torch.amp.GradScaler, or None")
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"keep={keep!r} must be an int >= 1")
        if on_nonfinite not in ("raise", "drop"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} must be 'raise' or 'drop'")
        if micro_batch is not None and (not isinstance(micro_batch, int) or micro_batch < 1):
            raise ValueError(f"micro_batch={micro_batch!r} must be an int >= 1 or None")
        if mode not in ("auto", "one_pass", "two_pass"):
            raise ValueError(f"mode={mode!r} must be 'auto', 'one_pass' or 'two_pass'")
        counts = {"memory_budget": memory_budget, "score_rank": score_rank, "gram_sketch": gram_sketch}
        for name, value in counts.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r} must be an int >= 1 or None")
        if gram_sketch is not None and gram_sketch > LARGEST:
            raise ValueError(f"gram_sketch={gram_sketch} must be at most {LARGEST}")
        if not isinstance(damping, (int, float)) or not 0.0 <= damping < math.inf:
            raise ValueError(f"damping={damping!r} must be a finite number >= 0")
        allowed = {"filter", "weight", "constraint", "ridge", "guard", "solver"}
        if set(options) - allowed:
            raise TypeError(f"unknown options {sorted(set(options) - allowed)}; known: {sorted(allowed)}")
        self.model = model
        self.optimizer = optimizer
        self.per_sample_loss = per_sample_loss
        self.keep = keep
        self.micro_batch = micro_batch
        self.on_nonfinite = on_nonfinite
        self.damping = damping
        self.shortlist = shortlist
        self.scaler = scaler
        self.options = options
        self.mode = mode
        self.memory_budget = memory_budget
        self.score_rank = score_rank
        self.gram_sketch = gram_sketch
        self._slow: dict[str, str] = {}  # parameters left to per-sample autograd, and why
        self._several: set[str] = set()  # parameters used more than once
        self._two_passes = mode == "two_pass"
        self._audits = Audits()  # of captured gradients against autograd's
        self._warned = False
        self.guard_watch = GuardWatch()

    # ------------------------------------------------------------------------------------------------------------------
    # What the user calls

    def backward(self, pool: Any, target: Any) -> Selection:
        """Add the gradient of the chosen, weighted samples to ``.grad``, as ``loss.backward()`` would.

        Parameters
        ----------
        pool, target : tensor, or nested mapping or tuple of tensors
            Samples on axis 0. A list or an array as long as there are samples (texts, lengths) is cut with them; what
            else there is goes along whole, tuples of numbers too. ``target=None`` takes the pool's own mean as the
            target.

        Returns
        -------
        ftw.Selection
            With ``losses`` (n,) and ``target_loss``, detached.

        Raises
        ------
        ValueError, TypeError
            If batches, losses or options do not fit; the message names the tensor, its shape and the remedy.
        FloatingPointError
            If a loss or gradient is not finite, naming the samples.
        RuntimeError
            If no answer was found (the selection's status is in the message), if all scores are exactly zero, or if the
            captured gradients disagree with autograd's, naming the parameters.

        Notes
        -----
        After an error ``.grad`` is as it was. Hooks that wait for ``.grad`` are run
        (`torch.Tensor.register_post_accumulate_grad_hook`); hooks of gradients (`torch.Tensor.register_hook`) are not,
        and one that changes a gradient is refused at the first use after it is registered.
        """
        try:
            selection, update, parameters = self._choose(pool, target, compose=True)
        except Overflow as overflow:
            first = next(iter(trainable(self.model).values()))
            first.grad = torch.full_like(first, math.inf)
            return overflow.selection
        for name, g in update.items():  # as in a plain backward, what was not used gets no gradient
            p = parameters[name]
            accumulate(p, g.reshape(p.shape).to(p.dtype))
        return selection

    def select(self, pool: Any, target: Any) -> Selection:
        """Return the choice and its weights; ``.grad`` stays untouched. Otherwise like `backward`."""
        try:
            return self._choose(pool, target, compose=False)[0]
        except Overflow as overflow:
            return overflow.selection

    # ------------------------------------------------------------------------------------------------------------------
    # The stages

    def _choose(
        self, pool: Any, target: Any, *, compose: bool
    ) -> tuple[Selection, dict[str, Tensor], dict[str, nn.Parameter]]:
        """Return the selection, the update if it is asked for, and the parameters."""
        n = batches.size(pool, "pool")
        if self.keep > n:
            raise ValueError(f"keep={self.keep} exceeds the pool of {n} samples; offer more candidates or keep fewer")
        if target is not None:
            batches.size(target, "target")
            places = [sorted(map(str, batches.devices(batch))) for batch in (pool, target)]
            if places[0] != places[1]:
                raise ValueError(f"the pool lives on {places[0]}, the target on {places[1]}; move one to the other")
        parameters = trainable(self.model)
        if not parameters:
            raise ValueError("no parameter of the model requires a gradient: there is nothing to train")
        refuse_sharded(parameters, "use ftw_torch.distributed.DistributedFilterThenWeight")
        refuse_coupled_layers(self.model)
        scale = None
        if self.scaler is not None and self.scaler.is_enabled():
            scale = self.scaler.scale(torch.ones((), device=next(iter(parameters.values())).device))
        ambient = Ambient()
        passes = Passes(self.model, self.per_sample_loss, self._slow, ambient, scale)
        with torch.no_grad(), uncompiled(), ambient.off():
            if self._audits.due(parameters):
                plain = Passes(self.model, self.per_sample_loss, self._slow, ambient)
                buffers = list(self.model.buffers())
                found = audit(plain.capture, plain.losses, parameters, self._slow, pool, target, buffers)
                self._audits.note(found)
                if plain.checkpointed and self.mode == "auto" and not self._two_passes:
                    self._two_passes = True
                    log.info("the model checkpoints its activations: two passes")
            goal = self._target(passes, parameters, pool, target)
            operators = geometry(self.optimizer, parameters, goal.mean, damping=self.damping)
            captured = None
            if target is None:  # the pool is its own target: its records are there
                assert goal.samples is not None
                captured, goal = (goal.losses, goal.samples), goal._replace(samples=None)
            plan = self._plan(n, guarded=goal.samples is not None)
            walk = Walk(passes, parameters, pool, goal.mean, operators, plan, self._several, captured)
            if plan.keep and not walk.kept:
                self._two_passes = True
            selection, update = self._decide(walk, goal, operators, compose=compose)
            return selection, update, parameters

    def _target(self, passes: Passes, parameters: dict[str, nn.Parameter], pool: Any, target: Any) -> Target:
        """Return the target's mean gradient, with its samples' records if the guard wants them."""
        if target is None:
            return target_of(passes, parameters, pool, self.micro_batch, samples=True, what="pool")
        guarded = self.options.get("guard", 0.3) != 0
        if guarded and batches.size(target, "target") == 1:
            guarded = False
            if not self._warned:
                self._warned = True
                warnings.warn("the guard cannot judge one target sample: give two or more, or guard=0", stacklevel=4)
        return target_of(passes, parameters, target, self.micro_batch, samples=guarded)

    def _plan(self, n: int, *, guarded: bool) -> Plan:
        """Return how to walk a pool of n."""
        keep = not self._two_passes
        budget = self.memory_budget if self.mode == "auto" else None
        asked = self._asks(n)
        if not asked and guarded and (not keep or budget is not None):
            asked = self._go_on(n)  # the guard's means come from the Gram matrix where no records are
        return Plan(asked, keep, self.micro_batch, self.score_rank, budget, self.gram_sketch)

    def _go_on(self, n: int) -> int:
        """Return the length of the shortlist, or raise what is wrong with the options."""
        o = self.options
        return check_options(
            n,
            self.keep,
            o.get("filter", "matching"),
            o.get("weight", "qp"),
            o.get("constraint", Simplex()),
            o.get("ridge", 0.05),
            self.shortlist,
            o.get("guard", 0.3),
        )

    def _asks(self, n: int) -> int:
        """Return how many of the best by score the choice will ask the Gram matrix of."""
        go_on = self._go_on(n)
        if self.options.get("filter", "matching") != "top_k":
            return go_on
        return self.keep if self.options.get("weight", "qp") == "qp" else 0

    def _decide(
        self, walk: Walk, goal: Target, operators: dict[str, Operator], *, compose: bool
    ) -> tuple[Selection, dict[str, Tensor]]:
        """Return the selection, made on the host, and its update; a status without weights becomes an exception."""
        n = len(walk.losses)
        pool = PoolProducts(walk, goal, operators, self._asks(n))
        refuse_nonfinite(pool.target_losses, None, "target")
        good = pool.good = self._good(pool.losses, pool.scores, goal)
        keep = self.keep if good is None else min(self.keep, len(good))
        options = {"solver": best_solver(), "shortlist": self.shortlist, **self.options}
        targets = 0 if goal.samples is None else goal.samples.samples
        scores = pool.scores if good is None else pool.scores[good]
        chosen = choose(scores, pool.products(), keep=keep, targets=targets, **options)
        status = Status(int(chosen.status))
        if status in (Status.NOT_FINITE, Status.INFEASIBLE, Status.NOT_PSD):
            raise RuntimeError(f"no weights for this pool: {status.message} ({status.name})")
        update = pool.update(chosen.indices, chosen.weights) if compose else {}
        self._note(chosen, targets)
        if good is not None:
            full = torch.full((n,), math.nan, dtype=scores.dtype).index_copy(0, good, scores)
            chosen = chosen._replace(indices=good[chosen.indices], scores=full)
        return chosen._replace(losses=pool.losses, target_loss=pool.target_losses.mean()), update

    def _note(self, chosen: Selection, targets: int) -> None:
        """Say what the guard's statistics have to say over the steps, if it had target samples to judge by."""
        if targets:
            for words in self.guard_watch.note(float(chosen.signal), targets):
                _warn_once(words)

    def _good(self, losses: Tensor, scores: Tensor, goal: Target) -> Tensor | None:
        """Return the samples that are finite if some are not and may be dropped, None for all; raise otherwise."""
        bad = ~(torch.isfinite(losses) & torch.isfinite(scores))  # (n,)
        if bool((scores == 0).all()):
            raise RuntimeError(
                "the scores of all candidates are exactly zero: the target's gradient does not reach any parameter "
                "that the pool trains, or the optimizer's response is zero"
            )
        if not bool(bad.any()):
            return None
        if bool(bad.all()) and (self.scaler is None or not self.scaler.is_enabled()):
            refuse_target(goal)
        if self.on_nonfinite == "raise" or bool(bad.all()):
            if self.scaler is not None and self.scaler.is_enabled() and bool(torch.isfinite(losses).all()):
                raise Overflow(overflowed(self.keep, scores, losses, goal.losses))
            refuse_nonfinite(losses, scores, "pool")
        return torch.nonzero(~bad)[:, 0]  # (n',)
