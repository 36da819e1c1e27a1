"""The audit of a selector's first use: captured factors against autograd, parameter by parameter.

Both sum the samples' gradients with different weights, so that a gradient booked to the wrong sample shows up, and so
does a loss that depends on other samples. What disagrees is tried once more by per-sample autograd, and then refused
by name. The audit leaves no trace: random generators and buffers are afterwards what they were.

A gradient of zero agrees with anything: branches behind a gate that starts at zero, adapters whose second matrix does.
While a parameter has had no other, the audit comes back at the second, fourth, eighth ... use.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ftw
from ftw.spi import leaves
from ftw_torch import batches
from ftw_torch.capture.backward import gradients, has_reentrant
from ftw_torch.capture.functions import tensors
from ftw_torch.capture.passes import Randomness
from ftw_torch.errors import CaptureWarning, SelectionError
from ftw_torch.packing import PackedBatch
from ftw_torch.records.join import join

__all__ = ["MAX_SAMPLES", "Audits", "agrees", "audit", "dtypes_of", "same_state", "tolerance"]

MAX_SAMPLES = 3  # enough to tell samples apart; an audit must not take more memory than a step


class Audits:
    """Which parameters a selector has compared, and whether there was a gradient to compare."""

    def __init__(self) -> None:
        self.compared: dict[str, bool] = {}
        self.uses = 0
        self.hooked: set[str] = set()  # have hooks, which may change gradients
        self.packed = False  # documents that share a row have been seen

    def due(self, parameters: Mapping[str, Tensor], *inputs: Any) -> bool:
        """Count a use; tell whether to compare. Batches in which documents share a row are compared once."""
        first = not self.packed and any(isinstance(batch, PackedBatch) and batch.shares_rows for batch in inputs)
        self.packed = self.packed or first
        self.uses += 1
        again = self.uses & (self.uses - 1) == 0  # a power of two
        hooked = {name for name, p in parameters.items() if p._backward_hooks}
        new, self.hooked = hooked - self.hooked, hooked
        told = self.compared.get
        return (
            first
            or bool(new)
            or any(not told(name, False) and (again or name not in self.compared) for name in parameters)
        )

    def note(self, found: Mapping[str, bool]) -> None:
        """Write down what `audit` returned."""
        for name, told in found.items():
            self.compared[name] = told or self.compared.get(name, False)


def audit(
    capture: Callable[..., Any],
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    slow: dict[str, str],
    pool: Any,
    target: Any,
    buffers: Sequence[Tensor] = (),
    modules: Sequence[nn.Module] = (),
) -> dict[str, bool]:
    """Compare on the first samples of the target, and of the pool, which may take other ways through the model.

    Returns
    -------
    dict of str to bool
        Whether each parameter had a gradient that could disagree. Empty if nothing could be compared, for losses that
        are not finite, or one sample only, which says little.

    Raises
    ------
    SelectionError
        If a parameter's captured gradients disagree with autograd's even by the slow route, naming it.
    ValueError
        If a sample's loss is a share of its batch's.
    """
    told: dict[str, bool] = {}
    for batch, what in ((target, "target"), (pool, "pool")):
        if batch is not None:
            n = min(batches.size(batch, what), MAX_SAMPLES)
            found = _compare(capture, losses, parameters, slow, batch, n, what, buffers, modules)
            if found is not None and n > 1:
                told = {name: name in found or told.get(name, False) for name in parameters}
    return told


def agrees(
    capture: Callable[..., Any],
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    pool: Any,
    target: Any,
    buffers: Sequence[Tensor] = (),
) -> bool:
    """Return whether a capture agrees with autograd on the first samples of target and pool; nothing else is changed.

    False where nothing could be compared.
    """
    for batch, what in ((target, "target"), (pool, "pool")):
        if batch is None:
            continue
        n = min(batches.size(batch, what), MAX_SAMPLES)
        found = _differences(capture, losses, parameters, batches.take(batch, torch.arange(n)), n, what, buffers)
        if found is None or found[0]:
            return False
    return True


def _compare(
    capture: Callable[..., Any],
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    slow: dict[str, str],
    batch: Any,
    n: int,
    what: str,
    buffers: Sequence[Tensor],
    modules: Sequence[nn.Module],
) -> set[str] | None:
    """Compare on n samples of a batch; return the parameters that could disagree, None if losses are not finite."""
    wrong: dict[str, float] = {}
    packed = isinstance(batch, PackedBatch)
    few = batches.take(batch, batch.crowd(n) if packed else torch.arange(n))
    every = few if packed else batch  # its first sample is that of the few
    repeats = not packed or few.by_rows  # whether samples may be copied
    if packed:
        with same_state(parameters, buffers):
            _refuse_crossing(losses, modules, few, what)
    for attempt in range(2):
        seen = _differences(capture, losses, parameters, few, n, what, buffers)
        if seen is None:
            return None
        wrong, told, found = seen
        if not wrong:
            if n == MAX_SAMPLES and repeats:  # else the model may take no more
                with same_state(parameters, buffers):
                    _refuse_shares(losses, every, what, Randomness(parameters))
            return told
        rewind = partial(same_state, parameters, buffers)
        if attempt == 0 and repeats and not _independent(losses, few, every, what, found, rewind):
            break
        if attempt == 0:
            for name in wrong:
                slow.setdefault(name, "a layer that mixes samples and tokens in an unknown order")
            warnings.warn(
                f"captured gradients of {_listed(wrong)} disagree with autograd's: they are left to one backward "
                "pass a sample, exact but slow",
                CaptureWarning,
                stacklevel=6,
            )
    raise SelectionError(
        f"per-sample gradients of {_listed(wrong)} do not add up to autograd's gradient: does a sample's loss depend "
        "on other samples of the batch, does the forward change from call to call, or does a hook change a gradient?",
        parameters=wrong,
    )


def _refuse_crossing(
    losses: Callable[..., Tensor], modules: Sequence[nn.Module], batch: PackedBatch, what: str
) -> None:
    """Raise if a document's loss depends on what a layer computes for tokens that are not its own."""
    shape = batch.samples.shape
    outputs: list[tuple[str, Tensor]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        found = [x for x in tensors(output) if x.requires_grad and x.shape[:2] == shape]
        outputs.extend((type(module).__name__, x) for x in found)

    hooks = [module.register_forward_hook(note) for module in modules]
    try:
        with torch.enable_grad():
            found = losses(batch, batch.n, what).unbind()
    finally:
        for hook in hooks:
            hook.remove()
    if not outputs or has_reentrant(found):
        return
    for i in range(batch.n):
        grads = torch.autograd.grad(found[i], [x for _, x in outputs], retain_graph=True, allow_unused=True)
        for (layer, _), g in zip(outputs, grads, strict=True):
            if g is None:
                continue
            size = g.detach().flatten(2).abs().amax(2) if g.ndim > 2 else g.detach().abs()  # (rows, T)
            others = size[batch.samples != i]
            if others.numel() and bool(others.max() > 1e-6 * size.max()):
                raise SelectionError(
                    f"documents of the packed {what} look at each other: the loss of one depends on what a {layer} "
                    "computes for tokens of another. Attention must stay within a document: give the model "
                    "position_ids that restart at 0, seq_idx or cumulated lengths and an attention that reads them, or "
                    "a mask with a block for each document",
                    samples=[i],
                )


def _differences(
    capture: Callable[..., Any],
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    few: Any,
    n: int,
    what: str,
    buffers: Sequence[Tensor],
) -> tuple[dict[str, float], set[str], Tensor] | None:
    """Return what `_disagreements` finds for n samples, and their losses (n,); None if these are not finite."""
    with same_state(parameters, buffers) as again:
        found, records = capture(parameters, few, what)
        if not bool(torch.isfinite(found).all()):
            return None
        weights = torch.arange(1, n + 1, dtype=found.dtype, device=found.device) / n  # (n,)
        ours = ftw.combine(join([records], [n], parameters), weights)
        dtypes = {x.dtype for x in leaves(dict(records))} | {p.dtype for p in parameters.values()}
        del records
        again()
        with torch.enable_grad(), dtypes_of(dtypes):
            total = (losses(few, n, what) * weights).sum()
        theirs = gradients(total, list(parameters.values()), reentrant=has_reentrant([total]))
    return *_disagreements(parameters, ours, theirs, _coarsest(dtypes)), found


def _independent(
    losses: Callable[..., Tensor],
    few: Any,
    batch: Any,
    what: str,
    found: Tensor,
    same_state: Callable[[], AbstractContextManager[Any]],
) -> bool:
    """Return whether the first sample's loss is the same among copies of itself, which draw the same random numbers."""
    n = len(found)
    if n < 2:
        return True
    with torch.no_grad(), same_state() as rewind:
        again = _values(losses, few, n, what)
        if not torch.equal(again, found):
            return True  # the losses change from call to call
        rewind()
        alone = _values(losses, _copies(batch, n), n, what)
    scale = float(found.abs().max())
    return float((alone - found)[0].abs()) <= (1e-3 if found.dtype.itemsize > 2 else 5e-2) * scale


def _refuse_shares(losses: Callable[..., Tensor], batch: Any, what: str, randomness: Randomness) -> None:
    """Raise if a sample's loss among two copies of itself is half as large again as among three."""
    with torch.no_grad():
        three, two = (_values(losses, _copies(batch, n), n, what)[0] for n in (3, 2))
    randomness.mark()
    if randomness.used:  # other masks, other losses
        return
    if float((two - 1.5 * three).abs()) <= (1e-3 if two.dtype.itemsize > 2 else 2e-2) * float(two.abs()) and two != 0:
        raise ValueError(
            f"the losses of the {what} are shares of their batch's: among three copies of itself a sample has two "
            "thirds of the loss that it has among two. per_sample_loss must not divide by the number of samples, or by "
            "that of all their tokens, but leave each sample its own loss"
        )


def _copies(batch: Any, n: int) -> Any:
    """Return n times the first sample of a batch; of the whole one, whose length tells what goes with samples."""
    return batches.take(batch, torch.zeros(n, dtype=torch.int64))


def _values(losses: Callable[..., Tensor], batch: Any, n: int, what: str) -> Tensor:
    with torch.enable_grad():
        return losses(batch, n, what).detach()


def _disagreements(
    parameters: Mapping[str, nn.Parameter],
    ours: Mapping[str, Tensor],
    theirs: Sequence[Tensor | None],
    coarsest: torch.dtype,
) -> tuple[dict[str, float], set[str]]:
    """Return the relative errors of parameters that disagree beyond rounding, and those large enough to disagree."""
    norms = [torch.zeros(()) if g is None else g.norm().float().cpu() for g in theirs]
    overall = float(torch.stack(norms).norm())
    wrong, told = {}, set()
    for (name, p), g, norm in zip(parameters.items(), theirs, norms, strict=True):
        mine = ours[name].reshape(p.shape)
        difference = float((mine if g is None else mine - g).norm())
        relative, floor = _tolerance(coarsest)
        if difference > relative * float(norm) + floor * overall:
            wrong[name] = difference / (float(norm) or overall or 1.0)
        if float(norm) > 10 * floor * overall:
            told.add(name)
    return wrong, told


def _coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the coarsest floating dtype that gradients went through: float32 if not 16 bits.

    Models in float64 take norms and softmax in float32, where nobody need see it.
    """
    return max({torch.float32, *(x for x in dtypes if x.is_floating_point)}, key=lambda dtype: torch.finfo(dtype).eps)


class dtypes_of(TorchFunctionMode):  # noqa: N801
    """A block that adds the dtypes of what a forward's functions return to a set."""

    def __init__(self, dtypes: set[torch.dtype]) -> None:
        super().__init__()
        self.dtypes = dtypes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of PyTorch."""
        out = func(*args, **(kwargs or {}))
        self.dtypes.update(x.dtype for x in tensors(out))
        return out


def tolerance(dtypes: Iterable[torch.dtype]) -> float:
    """Return the relative difference up to which rounding in the coarsest of these dtypes explains it."""
    return _tolerance(_coarsest(dtypes))[0]


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative tolerance, and the share of the whole gradient below which a difference is rounding."""
    eps = torch.finfo(dtype).eps
    return min(0.2, 1e4 * eps if eps < 1e-4 else 20 * eps), 20 * eps


def _listed(wrong: Mapping[str, float]) -> str:
    named = [f"{name!r} (relative error {error:.2g})" for name, error in list(wrong.items())[:8]]
    return ", ".join(named) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")


@contextmanager
def same_state(parameters: Mapping[str, nn.Parameter], buffers: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Give a function that rewinds random generators and buffers to the start of the block; rewind them after it."""
    devices = sorted({p.device.index or 0 for p in parameters.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        cpu = torch.get_rng_state()
        cuda = [torch.cuda.get_rng_state(i) for i in devices]
        held = [buffer.clone() for buffer in buffers]

        def rewind() -> None:
            torch.set_rng_state(cpu)
            for i, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, i)
            for buffer, old in zip(buffers, held, strict=True):
                if not torch.equal(buffer, old):
                    buffer.copy_(old)

        try:
            yield rewind
        finally:
            rewind()
