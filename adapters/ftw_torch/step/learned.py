"""What a selector learns of its model, and the step that goes by it: one forward and backward over pool and target.

A step that the plan does not describe (`Departure`) leaves random generators as they were and goes back to discovery,
in the same step.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ftw.geometry import Diagonal, Operator, Scale
from ftw_torch import batches
from ftw_torch.capture.passes import Passes, Randomness
from ftw_torch.capture.plan import Plan, learn
from ftw_torch.capture.replay import Departure, Firing, fire, pattern, replayed
from ftw_torch.errors import PlanWarning
from ftw_torch.options import Options
from ftw_torch.records.join import seen
from ftw_torch.records.stacking import hold, is_small
from ftw_torch.records.stacks import Held, Stack, Vectors

from .audit import MAX_SAMPLES, agrees
from .planned import Lengths, PlannedPass
from .target import Target
from .together import Together

__all__ = ["Learned", "may_plan"]

log = logging.getLogger("ftw_torch")

TOO_FEW = "a batch is no larger than what is compared"  # an axis of that length by chance would not show

Geometry = Callable[[dict[str, Tensor]], dict[str, Operator]]


class Learned:
    """What a selector learned about its model, if that can be a plan.

    Attributes
    ----------
    plan : Plan or None
    reason : str or None
        Why there is none.
    steps : int
        How many steps went by the plan.
    together : Together
        Whether pool and target go through the model as one batch.
    """

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.reason: str | None = None
        self.steps = 0
        self.departed = False  # a plan was given up: discovery is to be compared with autograd anew
        self._uses = 0
        self._again = False  # the model has changed: learn at the next use
        self._rest = False  # this step is for discovery
        self.together = Together()
        self._failure: str | None = None  # of this step, by the plan; words, since an error holds on to memory
        self._given_up = False
        self._largest: int | None = None  # elements of a pool at which layers are no longer bound by their calls

    def parameters(self) -> dict[str, nn.Parameter] | None:
        """Return the trained parameters if the model is as it was learned; None, and no plan, if it is not."""
        if self.plan is not None and self.plan.fits():
            return self.plan.parameters
        if self.plan is not None:
            self._forget("modules, modes, hooks or what is frozen have changed")
            self._again = True
            self._rest = True
        return None

    def step(
        self,
        passes: Passes,
        parameters: Mapping[str, nn.Parameter],
        pool: Any,
        target: Any,
        geometry: Geometry,
        *,
        guarded: bool,
    ) -> tuple[PlannedPass, Target, dict[str, Operator]] | None:
        """Return a step by the plan as pool pass, target and operators; None for discovery.

        A plan is made at uses that are powers of two. There, and whenever a pass calls other modules than those
        compared before, the records of a few samples are compared with autograd's gradients.
        """
        self._failure = None
        if self._given_up:
            return None
        self._uses += 1
        power = self._uses & (self._uses - 1) == 0
        if self._rest:  # what has changed is discovered first
            self._rest = False
            return None
        if self._largest is not None and _elements(pool) >= self._largest:
            return None
        if self.plan is None:
            if not (power or self._again):
                return None
            learned = learn(passes.model, parameters)
            self._again = False
            if isinstance(learned, str):
                self._forget(learned)
                return None
            self.plan, self.together = learned, Together()
            torch.empty(1 << 24, dtype=torch.uint8)  # freed at once: malloc keeps at hand twice the largest block freed
        randomness, found = Randomness(parameters), None
        try:
            found = self._run(self.plan, passes, parameters, pool, target, geometry, guarded, power)
        except Departure as departure:
            self._forget(str(departure))
        except Exception as error:  # the batch's fault, then discovery raises it too, or the plan's: see `settle`
            self._failure = f"{type(error).__name__}: {error}"
            self._forget(self._failure)
        if found is None:
            randomness.rewind()
        else:
            self.steps += 1
        return found

    def settle(self) -> None:
        """Warn if the plan failed in a step that discovery has made, and make no other."""
        failure, self._failure = self._failure, None
        if failure is not None:
            self._given_up = True
            warnings.warn(
                "a step by the learned plan of the model failed; discovery makes this one and all others, exact but "
                f"slower: {failure}",
                PlanWarning,
                stacklevel=4,
            )

    def _forget(self, reason: str) -> None:
        self.departed = self.departed or self.plan is not None
        if reason != self.reason:
            log.info("no plan of the model, its layers are discovered at each step: %s", reason)
        self.plan, self.reason = None, reason

    def _run(
        self,
        plan: Plan,
        passes: Passes,
        parameters: Mapping[str, nn.Parameter],
        pool: Any,
        target: Any,
        geometry: Geometry,
        guarded: bool,
        power: bool,
    ) -> tuple[PlannedPass, Target, dict[str, Operator]] | None:
        n = batches.size(pool, "pool")
        m = n if target is None else batches.size(target, "target")
        if (power or not plan.patterns) and not self._compare(plan, passes, pool, target, (n, m)):
            self._note_largest(pool)
            return None
        both = None
        if target is not None:
            both = self.together.batch(passes, parameters, plan.buffers(), pool, target, (n, m), due=power)
        if both is None and {min(n, MAX_SAMPLES), min(m, MAX_SAMPLES)} & {n, m}:
            raise Departure(TOO_FEW)
        randomness, joint = Randomness(parameters), None
        if both is not None:
            joint = self._joint(plan, passes, both, n + m)
            randomness.mark()
            if joint is not None and randomness.used:
                self.together.apart("random numbers are drawn in the forward")
                joint = None
        first: list[Firing]
        second: list[Firing] | None
        if joint is not None:
            every, first = joint
            losses, aims, second = every[:n], every[n:], None
        elif target is None:
            losses, first = fire(plan, passes, pool, n, "pool")
            aims, second = losses, first
        else:  # random numbers are drawn for the target first, in either route
            randomness.rewind()
            aims, second = fire(plan, passes, target, m, "target")
            losses, first = fire(plan, passes, pool, n, "pool")
        found = {pattern(firings) for firings in (first, second) if firings is not None}
        if not found <= plan.patterns:
            self._compare(plan, passes, pool, target, (n, m))
            if not found <= plan.patterns:
                raise Departure("other modules are called than for a few samples")
        held = hold(
            parameters, (first, n if second is not None else n + m), None if second is None else (second, m), n, m
        )
        if held is None:
            self._note_largest(pool)
            return None
        mean: dict[str, Tensor] = {}
        for part in held:
            mean.update(part.mean(lengths=guarded))
        for name, p in parameters.items():
            if name not in mean:
                mean[name] = p.detach().new_zeros(seen(p.shape))
        operators = geometry(mean)
        _require_elementwise(held, operators)
        for part in held:
            part.respond(operators)
        planned = PlannedPass(parameters, held, losses, mean, operators)
        lengths = Lengths(held, operators, m)
        return planned, Target(mean, aims, lengths if guarded else None), operators  # type: ignore[arg-type]

    def _joint(self, plan: Plan, passes: Passes, both: Any, samples: int) -> tuple[Tensor, list[Firing]] | None:
        """Return losses and firings of pool and target as one batch, None if that fails as two may not."""
        try:
            return fire(plan, passes, both, samples, "pool and target")
        except Departure:
            raise
        except Exception as error:  # too large for the device, perhaps
            self.together.apart(f"{type(error).__name__}: {error}")
            return None

    def _note_largest(self, pool: Any) -> None:
        self._largest = min(_elements(pool), self._largest or _elements(pool))

    def _compare(self, plan: Plan, passes: Passes, pool: Any, target: Any, sizes: tuple[int, int]) -> bool:
        """Compare the records of a few samples with autograd's gradients; add the patterns seen.

        False if a layer is not bound by its calls, for a pool and a target of these sizes.
        """
        found, bound = set(), True

        def capture(parameters: Any, few: Any, what: str) -> Any:
            del parameters
            nonlocal bound
            losses, records, firings = replayed(plan, passes, few, what)
            if len(losses) == sum(sizes):
                raise Departure(TOO_FEW)
            found.add(pattern(firings))
            bound = bound and all(is_small(firing, sum(sizes)) for firing in firings)
            return losses, records

        if not agrees(capture, passes.losses, plan.parameters, pool, target, plan.buffers()):
            raise Departure("the records disagree with autograd's gradients")
        plan.patterns |= found
        return bound


def _require_elementwise(held: Sequence[Held], operators: Mapping[str, Operator]) -> None:
    """Depart if the optimizer's response to a parameter held with others mixes its entries, as Muon's does."""
    for part in held:
        for name in part.names if isinstance(part, (Stack, Vectors)) else ():
            if not isinstance(operators[name], (Diagonal, Scale)):
                kind = type(operators[name]).__name__
                raise Departure(f"the optimizer's response of {name!r} is a {kind}, not elementwise")


def may_plan(options: Options, passes: Passes) -> bool:
    """Return whether a step with these options, and in this autocast, may go by a plan."""
    bounded = options.micro_batch, options.memory_budget, options.gram_sketch, passes.scale
    exact = options.capture == "learned" and options.score == "exact" and not options.train_on_target
    return exact and not (any(x is not None for x in bounded) or passes.slow or passes.ambient.states)


def _elements(batch: Any) -> int:
    return sum(x.numel() for _, x in batches.leaves(batch))
