"""Capture: per-sample gradient factors of every trainable parameter, in one forward and one backward to activations.

While a `Capture` is active it sees each function of PyTorch that a trainable parameter enters, whoever calls it: a module,
a functional call with a tied weight, a wrapper such as LoRA. Functions with a rule (``layers.py``) are replaced by ones that
do the same forward, skip the weight's gradient in the backward, and hand over the layer's input and output gradient instead.
A parameter that enters a function without a rule is left to autograd, one sample at a time: slow, exact, and said once.

Nothing is installed on the model: leaving the ``with`` block, by an exception too, leaves it as it was.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from ftw import Dense
from ftw.gradients import Record
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .records import merge

__all__ = ["Capture", "refuse_coupled_layers", "trainable"]

Sink = Callable[[str, Record], None]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, under their first names."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def refuse_coupled_layers(model: nn.Module) -> None:
    """Raise if a layer makes one sample's loss depend on the others: it has no per-sample gradient."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise ValueError(
                f"{type(module).__name__} {name!r} in training mode couples the samples of a batch, so that a sample has "
                "no gradient of its own; call .eval() on it or replace it, by GroupNorm for example"
            )


class Capture(TorchFunctionMode):
    """Collects ``{parameter name: records}`` of one batch.

    Parameters
    ----------
    parameters : mapping of str to Parameter
        What to capture.
    samples : int
        Number n of samples in the batch.
    batch : sequence of tensor
        The batch's tensors: what is computed from them belongs to samples; what is not (position numbers) is shared by all
        and is repeated for each before it meets a parameter.
    slow : dict of str to str
        Parameters left to per-sample autograd, with the function to blame; grows by those that enter one without a rule.
    sink : callable, optional
        Told each ``(name, record)`` as its output gradient arrives.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        samples: int,
        batch: Sequence[Tensor],
        *,
        slow: dict[str, str] | None = None,
        sink: Sink | None = None,
    ) -> None:
        super().__init__()
        from . import layers

        self.parameters = dict(parameters)
        self.samples = samples
        self.slow = {} if slow is None else slow
        self.sink = sink
        self.parts: dict[str, list[Record]] = defaultdict(list)
        self.anchor = torch.zeros((), requires_grad=True)  # makes every layer's output part of the graph
        self.open = False
        self._names = {id(p): name for name, p in self.parameters.items()}
        self._rules = layers.RULES
        self._leaves: list[tuple[str, Tensor]] = []  # per-sample copies of small parameters
        self._entered: dict[str, str] = {}  # what entered a function without a rule
        self._mine = {id(x) for x in batch}
        self._batch = list(batch)  # keeps the ids alive

    # ------------------------------------------------------------------------------------------------------------------
    # Forward

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch, by its rule if a captured parameter enters it."""
        kwargs = kwargs or {}
        rule = self._rules.get(func)
        if rule is not None and torch.is_grad_enabled():
            out = rule(self, *args, **kwargs)
            if out is not NotImplemented:
                out._ftw_samples = True
                return out
        out = func(*args, **kwargs)
        named, sampled = self._look(args, kwargs)
        for name in named:
            if _requires_grad(out):
                self._entered.setdefault(name, getattr(func, "__name__", str(func)))
        if sampled:
            _mark(out)
        return out

    def name(self, x: Any) -> str | None:
        """Return the name of a captured parameter that a rule may handle, None for anything else."""
        name = self._names.get(id(x))
        return None if name in self.slow else name

    def sampled(self, x: Tensor) -> bool:
        """Tell whether a tensor was computed from the batch."""
        return x.requires_grad or id(x) in self._mine or getattr(x, "_ftw_samples", False)

    def per_sample(self, x: Tensor) -> Tensor | None:
        """Return ``x`` with the samples on axis 0, repeated if it is shared by all; None if its axes are not known."""
        n, sampled = self.samples, self.sampled(x)
        if x.ndim and x.shape[0] == n and (sampled or x.ndim > 1 or x.is_floating_point()):
            return x
        if x.ndim > 1 and x.shape[0] == 1:
            return x.expand(n, *x.shape[1:])
        return None if sampled else x.expand(n, *x.shape)

    def expand(self, name: str, parameter: Tensor, ndim: int) -> Tensor:
        """Return a copy of a parameter for each sample (n, 1 ..., *shape): its gradient is the per-sample gradient."""
        shape = (self.samples, *[1] * (ndim - 1 - parameter.ndim), *parameter.shape)
        leaf = parameter.detach().expand(self.samples, *parameter.shape).reshape(shape).requires_grad_()
        self._leaves.append((name, leaf))
        return leaf

    def deliver(self, name: str, record: Record) -> None:
        """Take in a record as a layer's output gradient arrives, unless the backward is for somebody else."""
        if self.open:
            self._keep(name, record)

    def _keep(self, name: str, record: Record) -> None:
        self.parts[name].append(record)
        if self.sink is not None:
            self.sink(name, record)

    def _look(self, args: Any, kwargs: dict[str, Any]) -> tuple[list[str], bool]:
        """Return the captured parameters among the arguments, and whether one belongs to samples."""
        named, sampled = [], False
        stack = [*args, *kwargs.values()]
        while stack:
            x = stack.pop()
            if isinstance(x, Tensor):
                if id(x) in self._names:
                    named.append(self._names[id(x)])
                else:
                    sampled = sampled or id(x) in self._mine or getattr(x, "_ftw_samples", False)
            elif isinstance(x, (tuple, list)):
                stack.extend(x)
        return named, sampled

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the block; nothing stays installed."""
        super().__exit__(exc_type, exc, traceback)
        if exc_type is not None:
            self._leaves.clear()

    # ------------------------------------------------------------------------------------------------------------------
    # Backward

    def backward(self, losses: Tensor) -> dict[str, Record]:
        """Return the records of the samples whose ``losses`` (n,) were computed in this block."""
        for name, function in self._entered.items():
            if name not in self.slow:
                self.slow[name] = function
                warnings.warn(
                    f"{name!r} enters {function}, for which there is no rule: its per-sample gradients come from one "
                    "backward pass a sample, exact but slow",
                    stacklevel=4,
                )
        slow = [name for name in self.slow if name in self.parameters]
        for name in slow:
            self.parts.pop(name, None)
        total = losses.sum()
        inputs = [self.anchor, *(leaf for _, leaf in self._leaves)]
        self.open = True
        try:
            found = torch.autograd.grad(total, inputs, retain_graph=bool(slow), allow_unused=True)
        finally:
            self.open = False
        for (name, _), g in zip(self._leaves, found[1:], strict=True):
            if g is not None and name not in self.slow:
                self._keep(name, Dense(g.reshape(self.samples, *self.parameters[name].shape)))  # type: ignore[arg-type]
        self._leaves.clear()
        if slow:
            self._one_by_one(losses, slow)
        return {name: merge(parts) for name, parts in self.parts.items()}

    def _one_by_one(self, losses: Tensor, slow: list[str]) -> None:
        parameters = [self.parameters[name] for name in slow]
        rows: list[list[Tensor]] = [[] for _ in slow]
        for i in range(self.samples):
            keep = i + 1 < self.samples
            grads = torch.autograd.grad(losses[i], parameters, retain_graph=keep, allow_unused=True)
            for row, p, g in zip(rows, parameters, grads, strict=True):
                row.append(torch.zeros_like(p) if g is None else g)
        for name, row in zip(slow, rows, strict=True):
            self._keep(name, Dense(torch.stack(row)))  # type: ignore[arg-type]


def _requires_grad(out: Any) -> bool:
    if isinstance(out, Tensor):
        return out.requires_grad
    return isinstance(out, (tuple, list)) and any(_requires_grad(x) for x in out)


def _mark(out: Any) -> None:
    if isinstance(out, Tensor):
        if not out.requires_grad:
            out._ftw_samples = True  # type: ignore[attr-defined]
    elif isinstance(out, (tuple, list)):
        for x in out:
            _mark(x)
