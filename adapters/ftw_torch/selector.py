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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ftw import Quota, Selection, Simplex
from ftw.geometry import Operator
from ftw.spi import Constraint, Filter

from . import batches
from .capture.amp import Ambient, Overflow
from .capture.backward import accumulate
from .capture.discovery import trainable
from .capture.passes import Passes, uncompiled
from .optim.geometry import geometry
from .options import CaptureName, Fill, FilterName, Mode, OnNonfinite, Options, Score, Weight, check_count
from .step.audit import audit
from .step.checks import check_keep, check_parts, is_guarded, refuse_other_device, trained
from .step.decide import decide_batches
from .step.discovered import Response, discovered
from .step.invariance import warn_of_batching
from .step.learned import may_plan
from .step.memory import Memory
from .step.planned import PlannedPass
from .step.products import pool_products
from .step.selected import weighted_loss
from .step.solver import best_solver
from .step.target import Target, refuse_nonfinite, refuse_nonfinite_update

__all__ = ["FilterThenWeight"]

log = logging.getLogger("ftw_torch")

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
    filter, weight, constraint, ridge, guard
        See `ftw.filter_then_weight`.
    shortlist : int, float or None
        How many go on to the Gram matrix, see `ftw.filter_then_weight`; half of the pool by default.
    solver : callable, optional
        Like `ftw.solve_qp`. The default is that of ``ftw_compiled`` where ``python -m ftw_compiled`` was run.
    damping : float
        Damping of the geometry, see `ftw.optimizers.adam`.
    micro_batch : int, optional
        Run the passes over pool and target in micro-batches of this many samples, to bound the memory of activations.
    on_nonfinite : {"raise", "drop"}
        What to do about a sample whose loss or gradient is NaN or infinite: raise and name it, or go on without it.
        In the target it always raises.
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
    gram_sketch : int, optional
        Take the Gram matrix from count sketches of this size (at most 32767, see `ftw.sketch`): entries are wrong by
        about ``|g_i| |g_j| / sqrt(size)``. For two passes in micro-batches, where the exact one
        has to capture the shortlist again.
    score : {"exact", "forward"}
        "forward" takes the scores from two forward passes over the pool, ``(loss_i(theta) - loss_i(theta - s P g_T)) /
        s``: any layer, compiled models too, at two thirds of a plain step. What the filter and the weights need beyond
        scores comes from the shortlist alone, captured exactly; top-k with uniform weights needs nothing, and its
        picks are trained by an ordinary backward, which draws dropout masks of its own. The guard is off: it would
        capture the target's samples, and the pool.
    score_step : float, optional
        The s of ``score="forward"``; by default it is chosen by `ftw.forward_step`.
    train_on_target : float
        The share a of the target's own gradient in the update, ``(1 - a) sum_i w_i g_i + a g_T``, with g_T as it is
        without the guard.
    sources : str, optional
        The column of the pool that holds the source of each sample, for a quota or shares that name none themselves:
        integers, or texts where their bounds are mappings by name.
    quota : ftw.Quota, optional
        How many of the kept samples come from each source: ``ftw.Quota("domain", at_least={"wiki": 0.25}, at_most=
        {"code": 8})``. Bounds that this pool cannot fill raise a `SelectionError` that names the source. A
        `ftw.SourceShares` as ``constraint`` takes its sources and bounds in the same forms.
    fill : {"raise", "relax"}
        Whether bounds on sources that cannot be obeyed raise, or give way; ``selection.relaxed`` counts those.
    explain : bool
        Whether the selection has ``reasons``, one a candidate.
    capture : {"discover", "learned"}
        Whether layers are discovered at each step, or (experimental) learned at the first: a model whose trained
        parameters all belong to linear layers, embeddings and norms, and whose layers cost less than their calls, then
        makes one pass over pool and target by module hooks. Each step is checked against the graph of autograd; one
        that is not as it was learned goes by discovery.

    Notes
    -----
    The arithmetic, in plain training steps over the pool of N with V targets: ``1 + V/N + keep/(3N)``,
    and ``shortlist/(3N)`` more for the exact Gram matrix; where sequences are longer than layers are wide, about ``1
    + V/N`` for both (``docs/cost.md`` has what was measured). Two extra buffers the size of the parameters (g_T and
    the diagonal of P), and the records of the pool: for each layer its inputs, which autograd keeps anyway, and
    output gradients, or else its per-sample gradients. On a GPU a step waits for the device once, to make the choice
    on the host (and once more where a sample is dropped, with ``micro_batch``, and for the length of an
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
        filter: FilterName | Filter = "matching",
        weight: Weight = "qp",
        constraint: Constraint = Simplex(1.0),  # noqa: B008
        ridge: float = 0.05,
        shortlist: int | float | None = 0.5,
        solver: Callable[..., Any] | None = None,
        guard: float = 0.3,
        damping: float = 0.1,
        micro_batch: int | None = None,
        on_nonfinite: OnNonfinite = "raise",
        scaler: torch.amp.GradScaler | None = None,
        mode: Mode = "auto",
        memory_budget: int | None = None,
        gram_sketch: int | None = None,
        score: Score = "exact",
        score_step: float | None = None,
        train_on_target: float = 0.0,
        sources: str | None = None,
        quota: Quota | None = None,
        fill: Fill = "raise",
        explain: bool = False,
        capture: CaptureName = "discover",
    ) -> None:
        check_parts(model, per_sample_loss)
        if scaler is not None and not hasattr(scaler, "scale"):
            raise TypeError(f"scaler is a {type(scaler).__name__}; expected a torch.amp.GradScaler, or None")
        self.options = Options(
            keep=keep,
            filter=filter,
            weight=weight,
            constraint=constraint,
            ridge=ridge,
            shortlist=shortlist,
            solver=solver,
            guard=guard,
            damping=damping,
            micro_batch=micro_batch,
            on_nonfinite=on_nonfinite,
            mode=mode,
            memory_budget=memory_budget,
            gram_sketch=gram_sketch,
            score=score,
            score_step=score_step,
            train_on_target=train_on_target,
            sources=sources,
            quota=quota,
            fill=fill,
            explain=explain,
            capture=capture,
        )
        self.model, self.optimizer, self.per_sample_loss, self.scaler = model, optimizer, per_sample_loss, scaler
        self.memory = Memory(two_passes=mode == "two_pass")

    # ------------------------------------------------------------------------------------------------------------------
    # What the user calls

    def backward(self, pool: Any, target: Any, *, keep: int | None = None) -> Selection[Tensor]:
        """Add the gradient of the chosen, weighted samples to ``.grad``, as ``loss.backward()`` would.

        Parameters
        ----------
        pool, target : tensor, or nested mapping or tuple of tensors
            Samples on axis 0. A list or an array as long as there are samples (texts, lengths) is cut with them; what
            else there is goes along whole, tuples of numbers too. ``target=None`` takes the pool's own mean as the
            target.
        keep : int, optional
            How many samples to train on in this step, in place of the selector's ``keep``.

        Returns
        -------
        ftw.Selection
            With ``losses`` (n,) and ``target_loss``, detached.

        Raises
        ------
        ValueError, TypeError
            If batches, losses or options do not fit; the message names the tensor, its shape and the remedy.
        SelectionError
            If no answer was found (its ``status`` says why), if all scores are exactly zero, or if the captured
            gradients disagree with autograd's, naming the ``parameters``. Of a loss or gradient that is not finite it
            is a FloatingPointError too, naming the ``samples``.

        Notes
        -----
        After an error ``.grad`` is as it was. Hooks that wait for ``.grad`` are run
        (`torch.Tensor.register_post_accumulate_grad_hook`); hooks of gradients (`torch.Tensor.register_hook`) are not,
        and one that changes a gradient is refused at the first use after it is registered.
        """
        try:
            (selection,), update, parameters = self._choose(pool, target, keep, compose=True)
        except Overflow as overflow:
            first = next(iter(trainable(self.model).values()))
            first.grad = torch.full_like(first, math.inf)
            return overflow.selection
        for name, g in update.items():  # as in a plain backward, what was not used gets no gradient
            p = parameters[name]
            accumulate(p, (g if g.shape == p.shape else g.reshape(p.shape)).to(p.dtype))
        return selection

    def select(self, pool: Any, target: Any, *, keep: int | None = None) -> Selection[Tensor]:
        """Return the choice and its weights; ``.grad`` stays untouched. Otherwise like `backward`."""
        try:
            return self._choose(pool, target, keep, compose=False)[0][0]
        except Overflow as overflow:
            return overflow.selection

    def batches(self, pool: Any, target: Any, *, steps: int, keep: int | None = None) -> list[Selection[Tensor]]:
        """Return ``steps`` disjoint selections of one scored pool, each for a plain weighted backward of its own.

        Each is the choice from what the ones before left over: the next best by score for top-k, and a match of the
        same g_T by the samples not yet used for the others. All are made now, at the present parameters, and nothing
        of the pool is kept.

        Parameters
        ----------
        pool, target, keep
            As in `backward`; ``keep`` samples for each selection.
        steps : int
            Number R of selections; ``R * keep`` samples must be in the pool. Fewer come back only if
            ``on_nonfinite="drop"`` leaves too few samples, and the last may then be shorter than ``keep``.

        Returns
        -------
        list of ftw.Selection
            Without a Gram matrix (top-k with uniform weights) ``match`` and ``predicted_decrease`` are NaN: the updates
            are not composed. After an overflow under a GradScaler all are NOT_FINITE, with weights of NaN.

        Examples
        --------
        >>> for selection in selector.batches(pool, target, steps=4):  # doctest: +SKIP
        ...     optimizer.zero_grad()
        ...     selector.weighted_loss(pool, selection, target).backward()
        ...     optimizer.step()
        """
        check_count(steps, "steps")
        try:
            return self._choose(pool, target, keep, compose=False, steps=steps)[0]
        except Overflow as overflow:
            return [overflow.selection] * steps

    def weighted_loss(self, pool: Any, selection: Selection, target: Any = None) -> Tensor:
        """Return the loss () whose gradient is the selection's update, at the present parameters.

        ``sum_i w_i loss_i`` over the samples of the pool with a weight; with ``train_on_target=a`` it is ``(1 - a)``
        times that and ``a`` times the target's mean loss, and the target is required. An ordinary forward, under the
        autocast that is on; call ``backward()`` of it, or of what a GradScaler makes of it.
        """
        return weighted_loss(self.model, self.per_sample_loss, pool, selection, target, self.options.train_on_target)

    # ------------------------------------------------------------------------------------------------------------------
    # The stages

    def _choose(
        self, pool: Any, target: Any, keep: int | None, *, compose: bool, steps: int | None = None
    ) -> tuple[list[Selection], dict[str, Tensor], dict[str, nn.Parameter]]:
        """Return the selections, the update of the first if it is asked for, and the parameters."""
        n = batches.size(pool, "pool")
        measured, steps = steps is None, 1 if steps is None else steps
        keep = check_keep(self.options.keep if keep is None else keep, n, steps)
        if target is not None:
            batches.size(target, "target")
            refuse_other_device(pool, target)
        grouped = self.options.grouped(pool, n)
        parameters = self.memory.learned.parameters() or trained(self.model)
        scale = None
        scaled = self.scaler is not None and self.scaler.is_enabled()
        if self.scaler is not None and scaled:
            scale = self.scaler.scale(torch.ones((), device=next(iter(parameters.values())).device))
        memory, options, ambient = self.memory, self.options, Ambient()
        passes = Passes(self.model, self.per_sample_loss, memory.slow, ambient, scale)
        forward, asked = options.score == "forward", options.gram_of(n, keep)
        asked = min(n, asked + (steps - 1) * keep) if asked else 0  # covers the shortlists of later selections
        captures = asked > 0 or not forward
        with torch.no_grad(), ambient.off(), uncompiled() if not forward else nullcontext():
            audited = captures and memory.learned.plan is None  # a plan is compared with autograd by itself
            if audited:
                self._audit(ambient, parameters, pool, target)
            response = functools.partial(geometry, self.optimizer, parameters, damping=options.damping)
            planned = self._planned(passes, parameters, pool, target, response)
            if memory.learned.departed:
                memory.learned.departed, audited = False, False
                memory.audits.compared.clear()
            if captures and planned is None and not audited:
                self._audit(ambient, parameters, pool, target)
            pool_pass, aim, operators = planned or discovered(
                options, memory, passes, parameters, pool, target, response, keep
            )
            memory.learned.settle()
            order = None if grouped is None else functools.partial(grouped.order, keep)
            products = pool_products(pool_pass, aim, operators, asked, order)
            refuse_nonfinite(products.target_losses, None, "target")
            solver = best_solver() if options.solver is None else options.solver
            products.measured = measured
            selections = decide_batches(products, options, keep, solver, steps, scaled=scaled, grouped=grouped)
            memory.note_guard(selections[0], products.targets)
            update = products.update(selections[0].indices, selections[0].weights) if compose else {}
            if compose and options.train_on_target:
                update = aim.blended(update, options.train_on_target, scale)
            if compose and forward and not scaled:
                refuse_nonfinite_update(update)
            return selections, update, parameters

    def _planned(
        self, passes: Passes, parameters: dict[str, nn.Parameter], pool: Any, target: Any, response: Response
    ) -> tuple[PlannedPass, Target, dict[str, Operator]] | None:
        """Return the step by the learned plan; None where there is none, or where the step is not as it says."""
        if not may_plan(self.options, passes) or self.memory.two_passes:
            return None
        guarded = target is not None and is_guarded(self.options, self.memory, target)
        return self.memory.learned.step(passes, parameters, pool, target, response, guarded=guarded)

    def _audit(self, ambient: Ambient, parameters: dict[str, nn.Parameter], pool: Any, target: Any) -> None:
        """Compare captured gradients with autograd's where that is due."""
        memory = self.memory
        if not memory.audits.due(parameters, pool, target):
            return
        plain = Passes(self.model, self.per_sample_loss, memory.slow, ambient)
        buffers = list(self.model.buffers())
        modules = list(self.model.modules())
        with uncompiled():
            conclusive = audit(plain.capture, plain.losses, parameters, memory.slow, pool, target, buffers, modules)
            memory.audits.note(conclusive)
            if memory.audits.uses == 1:
                warn_of_batching(plain.losses, parameters, pool, target, buffers)
        if plain.checkpointed and self.options.mode == "auto" and not memory.two_passes:
            memory.two_passes = True
            log.info("the model checkpoints its activations: two passes")
