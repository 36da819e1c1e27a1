"""Capture: per-sample gradient factors of every trainable parameter, in one forward and one backward to activations.

While a `Capture` is active it sees each function of PyTorch that a trainable parameter enters, whoever calls it: a
module, a functional call with a tied weight, a wrapper such as LoRA. Functions with a rule (``rules/``) are
replaced by ones that do the same forward, skip the weight's gradient in the backward, and hand over the layer's input
and output gradient instead. Two things are kept track of: where the samples are in a tensor (``batch_axis.py``), and
which tensors are made of parameters alone (``derived.py``). A parameter that enters a function without a rule is left
to autograd, one sample at a time: slow, exact, and said once.

Nothing is installed on the model: leaving the ``with`` block, by an exception too, leaves it as it was.
"""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ftw import Dense
from ftw.gradients import Record
from ftw_torch.errors import CaptureWarning
from ftw_torch.records.join import merge, seen

from . import batch_axis as layout
from . import batching as moves
from .backward import gradients, has_reentrant
from .batch_axis import Layout, Scattered
from .coupling import refuse_batch_statistics
from .derived import Aligned, Derived, Key, pull_of, written_out
from .functions import INPLACE, PLAIN, WRITES, first, tensors, transformed
from .grid import TokenGrid, Tokens
from .internals import quietly
from .registry import rule_of

__all__ = ["Capture", "trainable"]

Sink = Callable[[str, Record], Record | None]

_serial = itertools.count()
_NOWHERE = (None, None)  # of a tensor that was not computed from a batch


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, under their first names; raise if one is complex."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in found.items():
        if p.is_complex():
            raise TypeError(
                f"{name!r} {tuple(p.shape)} is complex: hold it as a real parameter {(*p.shape, 2)} and take "
                "torch.view_as_complex of it in the forward"
            )
    return found


class Capture(TorchFunctionMode):
    """Collects ``{parameter name: records}`` of one batch.

    Parameters
    ----------
    parameters : mapping of str to Parameter
        What to capture.
    samples : int
        Number n of samples in the batch.
    batch : sequence of tensor
        The batch's tensors, samples on axis 0: what is computed from them belongs to samples; what is not (position
        numbers) is shared by all.
    slow : dict of str to str
        Parameters left to per-sample autograd, with the function to blame; grows by those that enter one without a
        rule.
    sink : callable, optional
        Told each ``(name, record)`` as its output gradient arrives; keeps what it returns, None for nothing.
    grid : TokenGrid, optional
        The documents of a packed batch, which are its samples.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        samples: int,
        batch: Sequence[Tensor],
        *,
        slow: dict[str, str] | None = None,
        sink: Sink | None = None,
        grid: TokenGrid | None = None,
    ) -> None:
        super().__init__()
        self.parameters = dict(parameters)
        self.samples = samples
        self.slow = {} if slow is None else slow
        self.sink = sink
        self.parts: dict[str, list[Record]] = defaultdict(list)
        self.anchor = torch.zeros((), requires_grad=True)  # makes every layer's output part of the graph
        self.open = False
        self._serial = next(_serial)
        self._keys: dict[int, tuple[Key, Tensor]] = {id(p): (name, p) for name, p in self.parameters.items()}
        self._standins: dict[str, Tensor] = {}  # enter functions without a rule, so that no parameter ever does
        self._leaves: list[tuple[Key, Tensor, int | None]] = []  # per-sample copies of small parameters
        self._entered: dict[str, str] = {}  # what entered a function without a rule
        self.hidden: list[str] = []  # reached by the backward in a place that nobody saw
        self._derived: list[Derived] = []
        self.grid = grid
        self._mine: dict[int, tuple[Layout | Scattered | Tokens, Tensor]] = {}
        for x in batch:
            whole = x.ndim and x.shape[0] == samples
            found = grid.find(x) if grid else Layout(1, x.numel() // samples) if whole else None
            if found is not None:
                self._mine[id(x)] = (found, x)
        self._marked: list[weakref.ref[Tensor]] = []  # tensors written in place, which may outlive the capture
        self._checkpointed = False  # a parameter was used without a graph: perhaps in a checkpoint
        self.recomputed = False  # a parameter was used in the middle of the backward: a checkpoint's

    # ------------------------------------------------------------------------------------------------------------------
    # Forward

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of PyTorch, by its rule if a captured parameter enters it."""
        kwargs = kwargs or {}
        graph = torch.is_grad_enabled()
        if func in PLAIN or (self.open and not graph) or transformed():
            return func(*args, **kwargs)
        if func is Tensor.__iter__:
            with self:
                return iter(args[0].unbind(0))
        keyed, sampled = self._look(args, kwargs)
        if not keyed:
            if func is F.batch_norm:
                refuse_batch_statistics(*args, **kwargs)
            out = func(*args, **kwargs)
        elif not graph:
            self._checkpointed = self._checkpointed or bool(sampled)
            return self._place(func, args, kwargs, func(*args, **kwargs), sampled)
        elif not sampled:
            args, kwargs = self._exchange(args, kwargs)
            return self._derive(func, args, kwargs, func(*args, **kwargs), keyed)
        else:
            self.recomputed = self.recomputed or self.open
            rule = rule_of(func)
            out = NotImplemented if rule is None else rule(self, *args, **kwargs)
            if out is NotImplemented:
                raw_args, raw_kwargs = self._exchange(args, kwargs)
                out = func(*raw_args, **raw_kwargs)
                if any(x.requires_grad for x in tensors(out)):
                    for key, _ in keyed:
                        for name in (key,) if isinstance(key, str) else key.roots:
                            self._entered.setdefault(name, getattr(func, "__name__", str(func)))
        return self._place(func, args, kwargs, out, sampled) if sampled else out

    def name(self, x: Any) -> Key | None:
        """Return the key of a parameter, or of a tensor made of some, that a rule may handle; None for all else."""
        found = self._keys.get(id(x))
        if found is None:
            return None
        key = found[0]
        roots = (key,) if isinstance(key, str) else key.roots
        return None if any(root in self.slow for root in roots) else key

    def where(self, x: Any) -> Layout | Scattered | None:
        """Return where the samples are in a tensor, None if that is not known."""
        found = self._tracked(x)
        if isinstance(found, Tokens):
            assert self.grid is not None
            return self.grid.numbers(found, x.shape)
        return found

    def _tracked(self, x: Any) -> Layout | Scattered | Tokens | None:
        if not isinstance(x, Tensor):
            return None
        mine = self._mine.get(id(x))
        if mine is not None:
            return mine[0]
        serial, found = getattr(x, "_ftw_samples", _NOWHERE)
        if serial == self._serial:
            return found
        if x.requires_grad and id(x) not in self._keys and self.grid:
            return self.grid.find(x)
        if x.requires_grad and id(x) not in self._keys and x.ndim and x.shape[0] % self.samples == 0:
            return Layout(1, x.numel() // self.samples)  # out of a function nobody sees: as usual, checked by the audit
        return None

    def sampled(self, x: Any) -> bool:
        """Return whether a tensor was computed from the batch."""
        if not isinstance(x, Tensor) or id(x) in self._keys:
            return False
        return id(x) in self._mine or x.requires_grad or getattr(x, "_ftw_samples", _NOWHERE)[0] == self._serial

    def group(self, x: Tensor, place: Layout | Scattered | None, trailing: int) -> Tensor | None:
        """Return ``x`` (..., *trail) as (n, t, *trail); None if the layout does not allow it."""
        if self.samples == 1:
            trail = x.shape[x.ndim - trailing :]
            return x.reshape(1, x.shape[: x.ndim - trailing].numel(), *trail)
        return None if place is None else layout.group(x, place, self.samples, trailing)

    def copies(self, key: Key, p: Tensor, x: Tensor) -> Tensor | None:
        """Return a copy of ``p`` for each sample, to stand in its place beside ``x``; None if the axes do not allow it.

        Its gradient is the per-sample gradient.
        """
        n, place = self.samples, self.where(x)
        ndim = max(x.ndim, p.ndim)
        shape = (1,) * (ndim - p.ndim) + tuple(p.shape)  # aligned from the right
        if place is None:
            return None
        if n == 1:
            return self._leaf(key, p.detach()[None])[0]
        if isinstance(place, Scattered):
            lead = place.rows.ndim
            if ndim > x.ndim or any(size != 1 for size in shape[:lead]):
                return None
            leaf = self._leaf(key, p.detach().reshape(shape[lead:]).expand(n, *shape[lead:]))
            if self.grid:  # rows of no sample have the number -1
                leaf = torch.cat([leaf, p.detach().reshape(1, *shape[lead:])])
            return leaf[place.rows.reshape(-1)].reshape(*place.rows.shape, *shape[lead:])
        found = layout.axis(x.shape, place, n)
        if found is None:
            return None
        k = found.number + ndim - x.ndim
        if shape[k] == 1:
            rest = shape[:k] + shape[k + 1 :]
            leaf = self._leaf(key, p.detach().reshape(rest).expand(n, *rest))  # (n, *rest)
            if not found.pure:
                spread = leaf[None, :, None].expand(found.outer, n, found.inner, *rest)
                return spread.reshape(x.shape[found.number], *rest).movedim(0, k)
            return leaf.movedim(0, k)
        if not found.pure or shape[k] != n:
            return None
        at = k - (ndim - p.ndim)  # something for each sample already
        return self._leaf(key, p.detach().movedim(at, 0), at).movedim(0, at)

    def _leaf(self, key: Key, values: Tensor, at: int | None = None) -> Tensor:
        leaf = values.requires_grad_()
        self._leaves.append((key, leaf, at))
        return leaf

    def _look(self, args: Any, kwargs: dict[str, Any]) -> tuple[list[tuple[Key, Tensor]], list[Tensor]]:
        """Return the arguments made of parameters, and those that belong to samples."""
        keyed, sampled = [], []
        for x in tensors((args, kwargs.values()) if kwargs else args):
            found = self._keys.get(id(x))
            if found is not None:
                keyed.append(found)
            elif self.sampled(x):
                sampled.append(x)
        return keyed, sampled

    def _place(self, func: Any, args: Any, kwargs: Any, out: Any, sampled: list[Tensor]) -> Any:
        """Write down where the samples are in the results of a function."""
        for y in tensors(out):
            if id(y) in self._mine or (id(y) in self._keys):
                continue
            found: Layout | Scattered | Tokens | None = None
            if self.samples == 1:
                found = Layout(1, y.numel())
            else:
                writes = func in WRITES
                for x in sampled:
                    place = None if writes and x is not args[0] else self._tracked(x)
                    if isinstance(place, Tokens):
                        assert self.grid is not None
                        found = self.grid.move(func, x, place, args, kwargs, y)
                    elif place is not None:
                        found = moves.place(func, x, place, self.samples, args, kwargs, y)
                    if found is not None:
                        break
            if found is None and func in INPLACE and (y is first(args) or func in WRITES):
                whole = y.ndim and y.shape[0] % self.samples == 0 and not self.grid
                found = self._tracked(args[0]) or (Layout(1, y.numel() // self.samples) if whole else None)
            if found is None and not any(y is x for x in tensors((args, kwargs.values()))):
                serial, known = getattr(y, "_ftw_samples", _NOWHERE)  # by the functions that this one is made of
                found = known if serial == self._serial else None
            y._ftw_samples = (self._serial, found)  # type: ignore[attr-defined]
            if y is first(args) or y is kwargs.get("out"):  # may be a buffer of the model
                self._marked.append(weakref.ref(y))
        if (
            args
            and args[0] is (out if out is not None else args[0])
            and isinstance(self._keys.get(id(args[0]), (None,))[0], Derived)
        ):
            del self._keys[id(args[0])]  # samples were written into it
        if func is Tensor.__setitem__ and not self.sampled(args[0]):
            self._written(args[0], args[1])
        return out

    def _written(self, x: Tensor, index: Any) -> None:
        """Write down that samples were written into a tensor; where they are is clear if their axis was kept whole."""
        first = index[0] if isinstance(index, tuple) and index else index
        whole = (isinstance(first, slice) and first == slice(None)) or first is Ellipsis
        known = whole and x.shape[0] == self.samples and not self.grid
        x._ftw_samples = (self._serial, Layout(1, x.numel() // self.samples) if known else None)  # type: ignore[attr-defined]
        self._marked.append(weakref.ref(x))

    def _derive(self, func: Any, args: Any, kwargs: Any, out: Any, keyed: list[tuple[Key, Tensor]]) -> Any:
        """Write down that a tensor is made of parameters alone."""
        roots = frozenset(name for key, _ in keyed for name in ((key,) if isinstance(key, str) else key.roots))
        written = [args[0]] if func is Tensor.__setitem__ else []
        for y in (*tensors(out), *written):
            known = self._keys.get(id(y), (None,))[0]
            if not y.requires_grad or isinstance(known, str) or (known is not None and y is not first(args)):
                continue
            single = len(keyed) == 1 and known is None  # written in place, a tensor has a new history
            pull = pull_of(func, args, kwargs, keyed[0][1], y) if single else None
            derived = Derived(y, roots, keyed[0][0] if pull else None, pull)
            self._keys[id(y)] = (derived, y)
            self._derived.append(derived)
        return out

    def _exchange(self, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Put stand-ins in the places of parameters."""
        return tuple(map(self._exchanged, args)), {k: self._exchanged(x) for k, x in kwargs.items()}

    def _exchanged(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            key = self._keys.get(id(x), (None,))[0]
            return self.standin(key) if isinstance(key, str) else x
        return type(x)(map(self._exchanged, x)) if type(x) in (tuple, list) else x

    def standin(self, name: str) -> Tensor:
        """Return what enters the graph in a parameter's place, so that no hook of the parameter is ever run."""
        if name not in self._standins:
            self._standins[name] = self.parameters[name].detach().requires_grad_()
        return self._standins[name]

    # ------------------------------------------------------------------------------------------------------------------
    # Records

    def deliver(self, key: Key, record: Any) -> None:
        """Take in a record as a layer's output gradient arrives, unless the backward is for somebody else."""
        if self.open:
            self._keep(key, record)

    def _keep(self, key: Key, record: Any) -> None:
        if isinstance(key, Derived):
            pulled = NotImplemented if key.pull is None else key.pull(record)
            if pulled is NotImplemented:
                key.pending.append(record)
            else:
                assert key.base is not None
                self._keep(key.base, pulled)
            return
        if isinstance(record, Aligned):
            full = record.grads.new_zeros(self.samples, *self.parameters[key].shape)
            line = torch.arange(self.samples, device=full.device)
            full.movedim(record.axis + 1, 1)[line, line] = record.grads
            record = Dense(full)
        if isinstance(record, Dense):
            g: Any = record.grads
            record = Dense(g.reshape(self.samples, *seen(self.parameters[key].shape)))
        with quietly():  # the sink's own arithmetic is not captured
            kept = record if self.sink is None else self.sink(key, record)
        if kept is not None:
            self.parts[key].append(kept)

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the block; nothing stays installed.

        A checkpoint that runs a part of the forward again ends it by an exception, once the backward has what it needs.
        """
        super().__exit__(exc_type, exc, traceback)  # type: ignore[no-untyped-call]
        if exc_type is not None and not self.open:
            self._leaves.clear()
            self._unmark()

    def _unmark(self) -> None:
        """Take back what was written on tensors that may be the model's."""
        for mark in self._marked:
            x: Any = mark()
            if hasattr(x, "_ftw_samples"):
                del x._ftw_samples
        self._marked.clear()

    # ------------------------------------------------------------------------------------------------------------------
    # Backward

    def backward(self, losses: Tensor) -> dict[str, Record]:
        """Return the records of the samples whose ``losses`` (n,) were computed in this block."""
        self._warn()
        reentrant = self._checkpointed and has_reentrant([losses])
        known = len(self._leaves)
        visible = [name for name in self.parameters if name not in self.slow]  # stand-ins enter for them, or nothing
        leaves = [self.anchor, *(leaf for _, leaf, _ in self._leaves), *(self.parameters[name] for name in visible)]
        self.open = True
        try:
            retain, others = bool(self.slow) or reentrant, self.parameters.values()
            found = gradients(losses.sum(), leaves, retain=retain, reentrant=reentrant, others=others)[1:]
        finally:
            self.open = False
        self.hidden = [name for name, g in zip(visible, found[known:], strict=True) if g is not None]
        found = found[:known]
        found += [leaf.grad for _, leaf, _ in self._leaves[known:]]  # made while a reentrant checkpoint ran again
        for (key, _, at), g in zip(self._leaves, found, strict=True):
            if g is not None:
                self._keep(key, Dense(g) if at is None else Aligned(g, at))
        self._leaves.clear()
        self._warn()  # of what a reentrant checkpoint showed only now
        slow = [name for name in self.slow if name in self.parameters]
        if slow:
            self._one_by_one(losses, slow, reentrant)
        for name in self.hidden:
            self._entered.setdefault(name, "a function that PyTorch does not show (of torch.autograd.Function?)")
        self._warn()
        for derived in reversed(self._derived):
            self._pull(derived)
        return self._records()

    def past(self, losses: Tensor, hidden: Sequence[str]) -> dict[str, Record]:
        """Return the records of what reached the ``hidden`` parameters where nobody saw it, and of nothing else."""
        self._one_by_one(losses, hidden, has_reentrant([losses]), shown=False)
        return self._records()

    def _records(self) -> dict[str, Record]:
        self._leaves.clear()
        self._keys.clear()
        self._unmark()
        return {name: merge(parts) for name, parts in self.parts.items()}

    def _warn(self) -> None:
        for name, function in self._entered.items():
            if name not in self.slow:
                self.slow[name] = function
                warnings.warn(
                    f"{name!r} enters {function}, for which there is no rule: its per-sample gradients come from one "
                    "backward pass a sample, exact but slow",
                    CaptureWarning,
                    stacklevel=5,
                )

    def _one_by_one(self, losses: Tensor, slow: Sequence[str], reentrant: bool, *, shown: bool = True) -> None:
        """Add what autograd finds for parameters that entered functions without a rule, or that nobody saw."""
        known = [(name, self._standins[name]) for name in slow if shown and name in self._standins]
        for _, leaf in known:
            leaf.grad = None
        unseen = [(name, self.parameters[name]) for name in slow]  # perhaps seen in some uses and not in others
        inputs: list[tuple[str, Tensor]] = [*known, *unseen]
        rows: list[list[Tensor]] = [[] for _ in inputs]
        touched = [False] * len(inputs)
        for i in range(self.samples):
            again = i + 1 < self.samples or bool(self._derived)  # whose graphs are a part of this one
            leaves, others = [p for _, p in inputs], self.parameters.values()
            grads = gradients(losses[i], leaves, retain=again, reentrant=reentrant, others=others)
            for j, g in enumerate(grads):
                touched[j] = touched[j] or g is not None
                rows[j].append(torch.zeros_like(inputs[j][1]) if g is None else g)
        for (name, _), row, used in zip(inputs, rows, touched, strict=True):
            if used:
                self._keep(name, Dense(torch.stack(row)))

    def _pull(self, derived: Derived) -> None:
        """Take the records of a tensor back to the parameters it was made of."""
        if not derived.pending:
            return
        names = sorted(derived.roots)
        inputs = [self.standin(name) for name in names]
        rows: list[list[Tensor]] = [[] for _ in names]
        for i in range(self.samples):
            shape = derived.tensor.shape
            g = torch.stack([written_out(record, shape, i) for record in derived.pending]).sum(0)
            grads = gradients(derived.tensor, inputs, g.to(derived.tensor.dtype), retain=True)
            for row, p, found in zip(rows, inputs, grads, strict=True):
                row.append(torch.zeros_like(p) if found is None else found)
        for name, row in zip(names, rows, strict=True):
            self._keep(name, Dense(torch.stack(row)))
