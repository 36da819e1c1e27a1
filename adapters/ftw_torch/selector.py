"""FilterThenWeight: one line where ``loss.backward()`` stood.

One pass over the pool does the work:

1. the target's gradient g_T, and the optimizer's response P with g_T folded into its second moment;
2. the pool's forward, and a backward to activations only: as each layer's output gradient arrives, the layer's share
   of the scores is added up and its factors are kept;
3. the choice (`ftw.filter_then_weight`), and the weighted gradient composed from the factors of those chosen.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import ftw
from ftw import Selection, Status
from ftw.geometry import Operator
from ftw.gradients import Record
from ftw.gram import squared_norms

from . import batches
from .audit import audit
from .backprop import gradients, has_reentrant
from .capture import Capture, Sink, refuse_coupled_layers, trainable
from .optimizers import geometry
from .precision import Ambient
from .records import is_empty, join, seen

__all__ = ["FilterThenWeight"]

Loss = Callable[[nn.Module, Any], Tensor]


class FilterThenWeight:
    """Chooses and weighs the samples of a pool so that the optimizer's next update serves a target.

    Parameters
    ----------
    model : nn.Module
        Its parameters that require a gradient are trained; nothing is installed on it.
    optimizer : torch.optim.Optimizer
        Read, never written. An unknown class raises and names `register_optimizer`.
    per_sample_loss : callable
        ``per_sample_loss(model, batch) -> (n,)``: one loss a sample, not their mean.
    keep : int
        Samples to train on at each step.
    micro_batch : int, optional
        Walk a pool (and a target) in pieces of this many samples, to bound the memory of activations.
    on_nonfinite : {"raise", "drop"}
        What to do about a sample whose loss or gradient is NaN or infinite: raise and name it, or go on without it. In
        the target it always raises.
    damping : float
        Damping of the geometry, see `ftw.optimizers.adam`.
    shortlist : int, float or None
        How many go on to the Gram matrix, see `ftw.filter_then_weight`; half of the pool by default.
    scaler : torch.amp.GradScaler, optional
        The one whose ``step`` follows: losses are scaled by it, and so is what is added to ``.grad``. A gradient that
        overflows (without ``on_nonfinite="drop"``) is passed on as an infinity, for the scaler to skip the step; the
        selection's status is then NOT_FINITE and its weights are NaN.
    **options
        ``filter``, ``weight``, ``constraint``, ``ridge``, ``guard`` and ``solver`` of `ftw.filter_then_weight`.

    Notes
    -----
    The arithmetic's floor, in plain training steps over the pool of N with V targets: ``1 + V/N + keep/(3N)``, and
    ``shortlist/(3N)`` more for the exact Gram matrix; what is added to it on a given machine has not been measured yet.
    Two extra buffers the size of the parameters (g_T and the diagonal of P), and the factors of the
    pool: each layer's inputs, which autograd keeps anyway, and output gradients.

    Examples
    --------
    >>> selector = FilterThenWeight(model, optimizer, per_sample_loss, keep=16)  # doctest: +SKIP
    >>> selection = selector.backward(pool, target)  # in place of loss.backward()  # doctest: +SKIP
    >>> optimizer.step()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        per_sample_loss: Loss,
        *,
        keep: int,
        micro_batch: int | None = None,
        on_nonfinite: str = "raise",
        damping: float = 0.1,
        shortlist: int | float | None = 0.5,
        scaler: torch.amp.GradScaler | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(keep, int) or isinstance(keep, bool) or keep < 1:
            raise ValueError(f"keep={keep!r} must be an int >= 1")
        if on_nonfinite not in ("raise", "drop"):
            raise ValueError(f"on_nonfinite={on_nonfinite!r} must be 'raise' or 'drop'")
        if micro_batch is not None and (not isinstance(micro_batch, int) or micro_batch < 1):
            raise ValueError(f"micro_batch={micro_batch!r} must be an int >= 1 or None")
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
        self._slow: dict[str, str] = {}  # parameters left to per-sample autograd, and why
        self._ambient = Ambient()
        self._audited = False
        self._warned = False

    # ------------------------------------------------------------------------------------------------------------------
    # What the user calls

    def backward(self, pool: Any, target: Any) -> Selection:
        """Add the gradient of the chosen, weighted samples to ``.grad``, as ``loss.backward()`` would.

        Parameters
        ----------
        pool, target : tensor, or nested mapping or tuple of tensors
            Samples on axis 0. ``target=None`` takes the pool's own mean as the target.

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
        After an error ``.grad`` is as it was.
        """
        try:
            with self._plain():
                return self._backward(pool, target)
        except _OverflowError as overflow:
            first = next(iter(trainable(self.model).values()))
            first.grad = torch.full_like(first, math.inf)
            return overflow.selection

    def _backward(self, pool: Any, target: Any) -> Selection:
        selection, candidates, parameters = self._choose(pool, target)
        chosen = ftw.take(candidates, selection.indices)
        update = ftw.combine(chosen, selection.weights)
        with torch.no_grad():
            for name, p in parameters.items():
                if not is_empty(candidates[name]):  # as in a plain backward, what was not used gets no gradient
                    g = update[name].reshape(p.shape).to(p.dtype)
                    p.grad = g if p.grad is None else p.grad.add_(g)
        return selection

    def select(self, pool: Any, target: Any) -> Selection:
        """Return the choice and its weights; ``.grad`` stays untouched. Otherwise like `backward`."""
        with self._plain():
            return self._choose(pool, target)[0]

    @contextmanager
    def _plain(self) -> Iterator[None]:
        """Keep the caller's autocast for the caller's losses."""
        self._ambient = Ambient()
        with self._ambient.off():
            yield

    # ------------------------------------------------------------------------------------------------------------------
    # The stages

    def _choose(self, pool: Any, target: Any) -> tuple[Selection, dict[str, Record], dict[str, nn.Parameter]]:
        """Return the selection, the records of the whole pool, and the parameters."""
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
        refuse_coupled_layers(self.model)
        with torch.no_grad(), uncompiled():
            if not self._audited:
                self._audited = audit(self._capture, self._losses, parameters, self._slow, pool, target)
            goal = None if target is None else self._target(parameters, target)
            operators = None if goal is None else self._geometry(parameters, goal.mean)
            pieces, losses, scores = [], [], []
            for piece in batches.split(pool, n, self.micro_batch):
                share = None if goal is None or operators is None else Scores(goal.mean, operators)
                found, records = self._capture(parameters, piece, "pool", sink=share)
                pieces.append(records)
                losses.append(found)
                scores.append(None if share is None else share.total)
            candidates = join(pieces, [len(x) for x in losses], parameters)
            every = torch.cat(losses)  # (n,)
            if goal is None or operators is None:  # the pool is its own target
                first = next(iter(parameters.values()))
                mean = ftw.combine(candidates, torch.full((n,), 1 / n, dtype=every.dtype, device=first.device))
                goal = Target(mean, None, every.mean())
                operators = self._geometry(parameters, goal.mean)
                b = ftw.scores(candidates, goal.mean, operators)
            else:
                b = torch.cat(
                    [x if x is not None else torch.zeros_like(y) for x, y in zip(scores, losses, strict=True)]
                )
            return self._decide(candidates, goal, operators, b, every), candidates, parameters

    def _target(self, parameters: dict[str, nn.Parameter], target: Any) -> Target:
        """Return the target's mean gradient, with its samples' records if the guard wants them."""
        m = batches.size(target, "target")
        pieces = list(batches.split(target, m, self.micro_batch))
        sizes = [batches.size(piece, "target") for piece in pieces]
        if self.options.get("guard", 0.3) == 0:
            total: dict[str, Tensor] = {}
            losses = []
            for piece, size in zip(pieces, sizes, strict=True):
                with torch.enable_grad():
                    found = self._losses(piece, size, "target")
                    share = found.sum() / m
                grads = gradients(share, list(parameters.values()), reentrant=has_reentrant([share]))
                for (name, p), g in zip(parameters.items(), grads, strict=True):
                    g = torch.zeros_like(p) if g is None else g
                    total[name] = total[name].add_(g) if name in total else g
                losses.append(found.detach())
            _refuse_nonfinite(torch.cat(losses), None, "target")
            shaped = {name: g.reshape(seen(g.shape)) for name, g in total.items()}
            return Target(shaped, None, torch.cat(losses).mean())
        if m == 1 and not self._warned:
            self._warned = True
            warnings.warn("the guard cannot judge one target sample: give two or more, or guard=0", stacklevel=4)
        captured = [self._capture(parameters, piece, "target") for piece in pieces]
        losses = [found for found, _ in captured]
        _refuse_nonfinite(torch.cat(losses), None, "target")
        samples = join([records for _, records in captured], sizes, parameters)
        weights = torch.full((m,), 1 / m, dtype=losses[0].dtype, device=losses[0].device)
        return Target(ftw.combine(samples, weights), samples, torch.cat(losses).mean())

    def _geometry(self, parameters: dict[str, nn.Parameter], anticipate: dict[str, Tensor]) -> dict[str, Operator]:
        scale = self._scale()
        if scale != 1.0:
            anticipate = {name: a / scale for name, a in anticipate.items()}
        return geometry(self.optimizer, parameters, anticipate, damping=self.damping)

    def _scale(self) -> float:
        return 1.0 if self.scaler is None or not self.scaler.is_enabled() else float(self.scaler.get_scale())

    def _decide(
        self,
        candidates: dict[str, Record],
        goal: Target,
        operators: dict[str, Operator],
        scores: Tensor,
        losses: Tensor,
    ) -> Selection:
        """Return the selection; a status that leaves no usable weights becomes an exception."""
        n, keep = len(losses), self.keep
        bad = ~(torch.isfinite(losses) & torch.isfinite(scores))  # (n,)
        some_bad, all_zero = torch.stack([bad.any(), (scores == 0).all()]).tolist()
        if all_zero:
            raise RuntimeError(
                "the scores of all candidates are exactly zero: the target's gradient does not reach any parameter "
                "that the pool trains, or the optimizer's response is zero"
            )
        good = None
        if some_bad:
            finite = bool(torch.isfinite(losses).all())
            if self._scale() != 1.0 and finite and (self.on_nonfinite == "raise" or bool(bad.all())):
                raise _OverflowError(self._skipped(losses, scores, goal))
            if bool(bad.all()):
                _refuse_target(goal)
            if self.on_nonfinite == "raise" or bool(bad.all()):
                _refuse_nonfinite(losses, scores, "pool")
            good = torch.nonzero(~bad)[:, 0]  # (n',)
            candidates, scores, keep = ftw.take(candidates, good), scores[good], min(keep, len(good))
        options = {"target_samples": goal.samples, "shortlist": self.shortlist, **self.options}
        chosen = ftw.filter_then_weight(candidates, goal.mean, operators, keep=keep, scores=scores, **options)
        status = Status(int(chosen.status))
        if status in (Status.NOT_FINITE, Status.INFEASIBLE, Status.NOT_PSD):
            raise RuntimeError(f"no weights for this pool: {status.message} ({status.name})")
        if good is not None:
            full = torch.full((n,), math.nan, dtype=scores.dtype, device=scores.device).index_copy(0, good, scores)
            chosen = chosen._replace(indices=good[chosen.indices], scores=full)
        scale = self._scale()
        return chosen._replace(losses=losses / scale, target_loss=goal.loss / scale)

    def _skipped(self, losses: Tensor, scores: Tensor, goal: Target) -> Selection:
        """Return the selection of a step that the gradient scaler is to skip."""
        nan, scale = scores.new_full((), math.nan), self._scale()
        return Selection(
            indices=torch.arange(self.keep, device=losses.device),
            weights=nan.expand(self.keep),
            scores=scores,
            match=nan,
            predicted_decrease=nan,
            effective_size=nan,
            shrinkage=nan,
            count=torch.zeros((), dtype=torch.int64, device=losses.device),
            status=torch.tensor(int(Status.NOT_FINITE), dtype=torch.int32, device=losses.device),
            losses=losses / scale,
            target_loss=goal.loss / scale,
            signal=nan,
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Passes

    def _losses(self, batch: Any, n: int, what: str) -> Tensor:
        """Return the per-sample losses (n,) of a batch, or raise what is wrong with them."""
        with self._ambient.on():
            losses = self.per_sample_loss(self.model, batch)
        if not isinstance(losses, Tensor) or tuple(losses.shape) != (n,):
            got = f"a tensor {tuple(losses.shape)}" if isinstance(losses, Tensor) else f"a {type(losses).__name__}"
            raise ValueError(
                f"per_sample_loss must return one loss for each of the {n} samples of the {what}, a tensor ({n},); "
                f"got {got}. A loss function's reduction='none', then a mean over tokens, gives that; a mean over "
                "samples does not"
            )
        if not losses.requires_grad:
            raise ValueError(
                f"the losses of the {what} do not depend on any parameter that requires a gradient; is something "
                "detached, or computed under torch.no_grad()?"
            )
        return losses if self.scaler is None else self.scaler.scale(losses)

    def _capture(
        self,
        parameters: Mapping[str, nn.Parameter],
        batch: Any,
        what: str,
        sink: Sink | None = None,
    ) -> tuple[Tensor, dict[str, Record]]:
        """Return the losses (n,) of a batch, detached, and its records."""
        n = batches.size(batch, what)
        tensors = [tensor for _, tensor in batches.leaves(batch)]
        with torch.enable_grad(), Capture(parameters, n, tensors, slow=self._slow, sink=sink) as capture:
            losses = self._losses(batch, n, what)
            records = capture.backward(losses)
        return losses.detach(), records


class _OverflowError(FloatingPointError):
    """A gradient overflowed in 16 bits under a gradient scaler."""

    def __init__(self, selection: Selection) -> None:
        super().__init__("a gradient is not finite at this scale of the gradient scaler; update it and go on")
        self.selection = selection


class Target(NamedTuple):
    """What the target says at this step."""

    mean: dict[str, Tensor]
    samples: dict[str, Record] | None
    loss: Tensor


class Scores:
    """Adds up ``<g_i, P g_T>`` (n,) while the records of a backward come in."""

    def __init__(self, target: Mapping[str, Tensor], operators: Mapping[str, Operator]) -> None:
        self.target, self.operators = target, operators
        self.total: Tensor | None = None

    def __call__(self, name: str, record: Record) -> Record:
        """Add one record's share; keep the record."""
        part = ftw.scores({name: record}, {name: self.target[name]}, {name: self.operators[name]})  # (n,)
        self.total = part if self.total is None else self.total + part
        return record


def _refuse_target(goal: Target) -> None:
    """Raise if the target's gradient is not finite, naming the samples if their records are there."""
    if goal.samples is not None:
        lengths = squared_norms(goal.samples, dict.fromkeys(goal.samples, ftw.Scale(1.0)))  # (m,)
        _refuse_nonfinite(torch.zeros_like(lengths), lengths, "target")
    broken = [name for name, g in goal.mean.items() if not bool(torch.isfinite(g).all())]
    if broken:
        raise FloatingPointError(f"the gradient of the target is not finite in {', '.join(map(repr, broken[:8]))}")


def _refuse_nonfinite(losses: Tensor, scores: Tensor | None, what: str) -> None:
    """Raise if a loss, or else a score, is NaN or infinite, naming the samples."""
    for kind, values in (("loss", losses), ("gradient", scores)):
        if values is None:
            continue
        bad = torch.nonzero(~torch.isfinite(values))[:, 0].tolist()
        if bad:
            named = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
            remedy = "; on_nonfinite='drop' goes on without them" if what == "pool" else ""
            raise FloatingPointError(f"the {kind} of {what} sample {named} is not finite{remedy}")


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled models eagerly: a compiled graph has the layers fused away that capture must see."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
