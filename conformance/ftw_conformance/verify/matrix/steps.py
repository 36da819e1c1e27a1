"""One step of the PyTorch adapter on one layer, against one sample at a time with plain autograd in float64."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from ftw_torch import FilterThenWeight, PackedBatch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftw_conformance.verify.table import Expect

from .layers import VOCABULARY, D, Layer

__all__ = ["MODES", "USES", "Outcome", "applies", "run"]

USES = ("one use", "twice", "tied", "frozen bias", "padded", "T=1", "n=1", "empty micro-batch")
MODES = ("eager", "checkpointed", "autocast", "learned", "two pass, micro-batches", "target of the pool", "packed")
TOKENS = 4


class Outcome(NamedTuple):
    """What a step gave, and what it should have."""

    expected: dict[str, Expect]
    slow: dict[str, str]  # parameters left to per-sample autograd, and why
    dtype: str


class Network(nn.Module):
    """The layer in one use, behind a layer that makes its input depend on parameters."""

    def __init__(self, layer: Layer, use: str, *, checkpointed: bool) -> None:
        super().__init__()
        self.words = layer.inputs == "words"
        self.floats, self.skips = layer.inputs == "floats", use == "empty micro-batch"
        self.front = nn.Linear(D, D) if self.floats else None
        self.layer = layer.make()
        self.other = None
        if use == "tied":
            self.other = copy.deepcopy(self.layer)
            for name, module in self.layer.named_modules():
                for key, p in list(module._parameters.items()):
                    if p is not None:
                        self.other.get_submodule(name)._parameters[key] = p
        self.twice = use in ("twice", "tied")
        named = list(self.layer.named_parameters())
        if use == "frozen bias" and len(named) > 1:
            named[-1][1].requires_grad_(False)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the layer's output; a micro-batch of nothing but padding goes round it."""
        h = x if self.front is None else torch.tanh(self.front(x))
        if self.front is not None and self.skips and not bool(mask.any()):
            return h * 0
        out = self._run(self.layer, h)
        if self.twice:
            turned = h.cos() if self.floats else (3 * h + 1) % VOCABULARY if self.words else h.flip(-1)
            out = out + self._run(self.layer if self.other is None else self.other, turned)
        return out

    def _run(self, layer: nn.Module, h: Tensor) -> Tensor:
        out: Tensor = checkpoint(layer, h, use_reentrant=False) if self.checkpointed else layer(h)
        return out


def _values(model: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """Return a number for each token (n, t), or for each sample (n, 1), that depends on every output."""
    out = model(x, mask)
    out = out if out.dtype.itemsize > 2 else out.float()
    by_token = out.ndim > 1 and out.shape[1] == mask.shape[1]
    flat = out.flatten(2) if by_token and out.ndim > 2 else out[..., None] if by_token else out.flatten(1)[:, None]
    weights = torch.linspace(0.5, 1.5, flat.shape[2], dtype=flat.dtype, device=flat.device)
    values = (torch.sin(flat) * weights).sum(2)  # (n, t)
    return values * mask.to(values.dtype) if by_token else values


def _loss(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, PackedBatch):
        values = _values(model, batch.tensors["x"], batch.samples >= 0)  # (rows, t)
        return batch.mean(values, batch.samples >= 0)
    x, mask = batch
    return _values(model, x, mask).sum(1)


def applies(layer: Layer, use: str, mode: str) -> bool:
    """Return whether there is such a row: documents side by side need layers that take one token at a time."""
    if mode == "packed":
        return layer.by_token and layer.inputs != "images" and use not in ("padded", "empty micro-batch")
    return mode != "autocast" or layer.autocast


def run(layer: Layer, use: str, mode: str, device: str = "cpu") -> Outcome:
    """Run one step of one row."""
    torch.manual_seed(7)
    dtype = torch.float32 if mode == "autocast" or layer.narrow else torch.float64
    model = Network(layer, use, checkpointed=mode == "checkpointed").to(device=device, dtype=dtype)
    pool: Any
    target: Any
    pool, target = (_batch(layer, use, n, device, dtype) for n in ((1, 1) if use == "n=1" else (6, 3)))
    singles = [[_one(batch, i) for i in range(len(batch[0]))] for batch in (pool, target)]
    if mode == "packed":
        offered = [_packed(batch) for batch in (pool, target)]
        singles = [_documents(batch) for batch in offered]
        pool, target = offered
    if mode == "target of the pool":
        target, singles[1] = None, singles[0]
    options: dict[str, Any] = {"learned": {"capture": "learned"}}.get(mode, {})
    if mode == "two pass, micro-batches":
        options = {"mode": "two_pass", "micro_batch": 4}
    if use == "empty micro-batch":
        options |= {"micro_batch": 2}
    keep = 1 if use == "n=1" else 3
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = FilterThenWeight(model, optimizer, _loss, keep=keep, guard=0.0, shortlist=None, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is left to autograd is in `slow`
        with torch.autocast(device, torch.bfloat16, enabled=mode == "autocast"):
            selection = selector.backward(pool, target)
    exact = copy.deepcopy(model).to(torch.float32 if layer.narrow else torch.float64)
    exact.checkpointed = False
    G, T = (
        torch.stack([_gradient(exact, one).double() for one in batch]).cpu().numpy() for batch in singles
    )  # (n, p), (m, p)
    rough = None
    if mode == "autocast":
        with torch.autocast(device, torch.bfloat16):
            rough = [np.stack([_gradient(model, one).double().cpu().numpy() for one in batch]) for batch in singles]
    return Outcome(_expected(model, selection, G, T, rough), dict(selector.memory.slow), str(dtype)[6:])


def _batch(layer: Layer, use: str, n: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    t = 1 if use == "T=1" else TOKENS
    if layer.inputs == "words":
        x = torch.randint(VOCABULARY, (n, t))
        x[0, 0] = 3
        x[-1, -1] = VOCABULARY - 2  # one of padding_idx of each sign
    else:
        shape = (n, 3, D, 5) if layer.inputs == "images" else (n, t, D)
        x = torch.randn(shape).to(dtype)
    mask = torch.ones(n, t, dtype=torch.bool)
    if use == "padded":
        mask = torch.arange(t) < torch.randint(1, t + 1, (n, 1))
        x = x if layer.inputs != "floats" else x * mask[..., None]
    if use == "empty micro-batch" and n > 4:
        mask[2:4] = False
    return x.to(device), mask.to(device)


def _one(batch: tuple[Tensor, Tensor], i: int) -> Any:
    return tuple(x[i : i + 1] for x in batch)


def _packed(batch: tuple[Tensor, Tensor]) -> PackedBatch:
    """Return the tokens side by side in rows of documents of one to three tokens."""
    x = batch[0]
    n, t = x.shape[:2]
    samples, number = torch.full((n, t), -1, dtype=torch.int64, device=x.device), 0
    for i in range(n):
        for start, length in ((0, 1 + i % 3), (1 + i % 3, 1)) if t > 1 else ((0, 1),):
            if start + length <= t:
                samples[i, start : start + length] = number
                number += 1
    return PackedBatch({"x": x}, samples)


def _documents(batch: PackedBatch) -> list[Any]:
    """Return each document alone, as the batch (1, length) of a model that knows no packing."""
    x, found = batch.tensors["x"], []
    for i in range(batch.n):
        own = x[batch.samples == i][None]  # (1, length, ...)
        found.append(PackedBatch({"x": own}, torch.zeros(own.shape[:2], dtype=torch.int64, device=x.device)))
    return found


def _gradient(model: nn.Module, one: Any) -> Tensor:
    """Return one sample's gradient (p,) by plain autograd, of the trained parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    wide = parameters[0].dtype
    one = _cast(one, lambda x: x.to(wide) if x.is_floating_point() else x)
    loss = _loss(model, one).sum()
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(grads, parameters, strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs])


def _cast(one: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(one, PackedBatch):
        return PackedBatch({"x": function(one.tensors["x"])}, one.samples)
    return tuple(function(x) for x in one)


def _expected(model: nn.Module, selection: Any, G: Any, T: Any, rough: Any) -> dict[str, Expect]:
    """Return what scores, match and update should be; under autocast up to what its own gradients are off by."""
    indices, weights = (np.asarray(x.detach().cpu().double()) for x in (selection.indices, selection.weights))
    weights, goal = weights.astype(float), T.mean(0)
    update = weights @ G[indices.astype(int)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    got = torch.cat([g.reshape(-1).double() for g in grads]).cpu().numpy()
    norms = np.linalg.norm(G, axis=1)
    scale = float(norms.max() * np.linalg.norm(goal))
    widths = max(float(norms.max() * np.abs(weights).sum()), 1e-300)
    cosine = update @ goal / max(float(np.linalg.norm(update) * np.linalg.norm(goal)), 1e-300)
    loose = 1.0
    if rough is not None:
        off = max(float(np.linalg.norm(a - b, axis=1).max() / norms.max()) for a, b in zip(rough, (G, T), strict=True))
        loose = 4 * max(off, 2.0**-8) / (8 * 2.0**-23)
    condition = max(1e3, loose)
    return {
        "scores": Expect(G @ goal, "summed", scale, condition, got=selection.scores.double().cpu().numpy()),
        "match": Expect(np.asarray(cosine), "summed", 1.0, 4 * condition, got=np.asarray(float(selection.match))),
        "update": Expect(update, "summed", widths, condition, got=got),
    }
