"""The audit of a selector's first use: captured factors against autograd, parameter by parameter.

Both sum the samples' gradients with different weights, so that a gradient booked to the wrong sample shows up, and so
does a loss that depends on other samples. What disagrees is tried once more by per-sample autograd, and then refused
by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import ftw
from ftw import _array

from . import batches
from .backprop import gradients, has_reentrant
from .records import join

__all__ = ["audit"]

MAX_SAMPLES = 3  # enough to tell samples apart; an audit must not take more memory than a step


def audit(
    capture: Callable[..., Any],
    losses: Callable[..., Tensor],
    parameters: Mapping[str, nn.Parameter],
    slow: dict[str, str],
    pool: Any,
    target: Any,
) -> bool:
    """Compare on the target, or on the pool if that has one sample only.

    Returns
    -------
    bool
        False if the batch's losses were not finite, so that nothing could be compared.

    Raises
    ------
    RuntimeError
        If a parameter's captured gradients disagree with autograd's even by the slow route, naming it.
    """
    batch, what = (pool, "pool") if target is None or batches.size(target, "target") < 2 else (target, "target")
    n = batches.size(batch, what)
    if n > MAX_SAMPLES:
        device = next(iter(batches.devices(batch)))
        batch, n = batches.take(batch, torch.arange(MAX_SAMPLES, device=device)), MAX_SAMPLES
    wrong: dict[str, float] = {}
    for attempt in range(2):
        with _same_randomness(parameters) as again:
            found, records = capture(parameters, batch, what)
            if not bool(torch.isfinite(found).all()):
                return False
            weights = torch.arange(1, n + 1, dtype=found.dtype, device=found.device) / n  # (n,)
            ours = ftw.combine(join([records], [n], parameters), weights)
            coarsest = _coarsest(records, parameters)
            del records
            again()
            with torch.enable_grad():
                total = (losses(batch, n, what) * weights).sum()
            theirs = gradients(total, list(parameters.values()), reentrant=has_reentrant([total]))
        wrong = _disagreements(parameters, ours, theirs, coarsest)
        if not wrong:
            return True
        if attempt == 0 and not _independent(losses, batch, n, what, found, parameters):
            break
        if attempt == 0:
            for name in wrong:
                slow.setdefault(name, "a layer that mixes samples and tokens in an unknown order")
            warnings.warn(
                f"captured gradients of {_listed(wrong)} disagree with autograd's: they are left to one backward "
                "pass a sample, exact but slow",
                stacklevel=5,
            )
    raise RuntimeError(
        f"per-sample gradients of {_listed(wrong)} do not add up to autograd's gradient: does a sample's loss depend "
        "on other samples of the batch, or does the forward change from call to call?"
    )


def _independent(
    losses: Callable[..., Tensor],
    batch: Any,
    n: int,
    what: str,
    found: Tensor,
    parameters: Mapping[str, nn.Parameter],
) -> bool:
    """Tell whether the first sample's loss is the same without the others, as far as chance lets one see."""
    if n < 2:
        return True
    with torch.no_grad(), _same_randomness(parameters):
        again = _values(losses, batch, n, what)
        if not torch.equal(again, found):
            return True  # dropout, say: the losses change from call to call
        one = batches.take(batch, torch.arange(1, device=next(iter(batches.devices(batch)))))
        alone = _values(losses, one, 1, what)
    scale = float(found.abs().max())
    return float((alone - found[:1]).abs()) <= (1e-3 if found.dtype.itemsize > 2 else 5e-2) * scale


def _values(losses: Callable[..., Tensor], batch: Any, n: int, what: str) -> Tensor:
    with torch.enable_grad():
        return losses(batch, n, what).detach()


def _disagreements(
    parameters: Mapping[str, nn.Parameter],
    ours: Mapping[str, Tensor],
    theirs: Sequence[Tensor | None],
    coarsest: torch.dtype,
) -> dict[str, float]:
    """Return the relative errors of the parameters that disagree beyond rounding."""
    norms = [torch.zeros(()) if g is None else g.norm().float().cpu() for g in theirs]
    overall = float(torch.stack(norms).norm())
    wrong = {}
    for (name, p), g, norm in zip(parameters.items(), theirs, norms, strict=True):
        mine = ours[name].reshape(p.shape)
        difference = float((mine if g is None else mine - g).norm())
        relative, floor = _tolerance(coarsest)
        if difference > relative * float(norm) + floor * overall:
            wrong[name] = difference / (float(norm) or overall or 1.0)
    return wrong


def _coarsest(records: Mapping[str, Any], parameters: Mapping[str, nn.Parameter]) -> torch.dtype:
    """Return the coarsest floating dtype that the gradients went through."""
    found = {x.dtype for x in _array.leaves(dict(records)) if x.dtype.is_floating_point}
    return max(found | {p.dtype for p in parameters.values()}, key=lambda dtype: torch.finfo(dtype).eps)


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Return the relative tolerance, and the share of the whole gradient below which a difference is rounding."""
    eps = torch.finfo(dtype).eps
    return min(0.2, 1e4 * eps if eps < 1e-4 else 20 * eps), 20 * eps


def _listed(wrong: Mapping[str, float]) -> str:
    named = [f"{name!r} (relative error {error:.2g})" for name, error in list(wrong.items())[:8]]
    return ", ".join(named) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")


@contextmanager
def _same_randomness(parameters: Mapping[str, nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Give a function that rewinds the random generators to the start of the block; restore them after it."""
    devices = sorted({p.device.index or 0 for p in parameters.values() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        cpu = torch.get_rng_state()
        cuda = [torch.cuda.get_rng_state(i) for i in devices]

        def rewind() -> None:
            torch.set_rng_state(cpu)
            for i, state in zip(devices, cuda, strict=True):
                torch.cuda.set_rng_state(state, i)

        yield rewind
