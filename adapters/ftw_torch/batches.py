"""Batches: a tensor, or nested mappings and sequences of tensors, with the samples on axis 0.

Among the tensors there may be other things: an array (NumPy's), or a sequence without tensors, as long as there are
samples says something about each (texts, names of sources) and is cut with them; what else there is goes along whole,
a tuple of numbers too (the size of all images).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["CustomBatch", "concatenated", "leaves", "map_tensors", "size", "split", "take"]


class CustomBatch(ABC):
    """A batch that finds and cuts its samples by itself."""

    @abstractmethod
    def size(self, what: str) -> int:
        """Return the number of samples."""

    @abstractmethod
    def leaves(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with the path that leads to it."""

    @abstractmethod
    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Any:
        """Return the batch with ``function`` applied to every tensor."""

    @abstractmethod
    def take(self, indices: Tensor) -> Any:
        """Return some samples."""

    @abstractmethod
    def split(self, piece: int) -> Iterator[Any]:
        """Yield consecutive samples, about ``piece`` at a time."""


def leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a batch with the path that leads to it."""
    if isinstance(batch, CustomBatch):
        yield from batch.leaves(path)
    elif isinstance(batch, Tensor):
        yield path, batch
    elif isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(batch, (tuple, list)):
        for i, value in enumerate(batch):
            yield from leaves(value, f"{path}[{i}]")


def size(batch: Any, what: str) -> int:
    """Return the number of samples of a batch.

    Raises
    ------
    ValueError
        If there is no tensor with a sample axis, the batch is empty, or the tensors disagree.
    """
    if isinstance(batch, CustomBatch):
        return batch.size(what)
    sizes = {path: tensor.shape[0] for path, tensor in leaves(batch, what) if tensor.ndim > 0}
    if not sizes:
        raise ValueError(f"the {what} holds no tensor with samples on axis 0; got a {type(batch).__name__}")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the tensors of the {what} disagree in the number of samples on axis 0: {sizes}")
    n = next(iter(sizes.values()))
    if n == 0:
        raise ValueError(f"the {what} is empty: its tensors have length 0 on axis 0")
    return n


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return the batch with ``function`` applied to every tensor that has a sample axis; mappings become dicts."""
    if isinstance(batch, CustomBatch):
        return batch.map_tensors(function)
    if isinstance(batch, Tensor):
        return function(batch) if batch.ndim > 0 else batch
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map_tensors(function, value) for value in batch)
    return batch


def split(batch: Any, n: int, piece: int | None) -> Iterator[Any]:
    """Yield the batch in pieces of at most ``piece`` samples; the batch itself if that is None."""
    if piece is None or piece >= n:
        yield batch
        return
    if isinstance(batch, CustomBatch):
        yield from batch.split(piece)
        return
    for start in range(0, n, piece):
        yield _slice(batch, n, slice(start, start + piece))


def _slice(batch: Any, n: int, places: slice) -> Any:
    return _cut(batch, n, lambda x: x[places], lambda: range(n)[places])


def take(batch: Any, indices: Tensor) -> Any:
    """Return the samples ``indices`` of a batch."""
    if isinstance(batch, CustomBatch):
        return batch.take(indices)
    n = size(batch, "batch")
    return _cut(batch, n, lambda x: x.index_select(0, indices.to(x.device)), lambda: indices.tolist())


def _cut(batch: Any, n: int, function: Callable[[Tensor], Tensor], places: Callable[[], Sequence[int]]) -> Any:
    """Return a batch of n samples with ``function`` applied to its tensors, and ``places`` of what goes with them."""
    if isinstance(batch, Mapping):
        return {key: _cut(value, n, function, places) for key, value in batch.items()}
    if isinstance(batch, Tensor):
        return map_tensors(function, batch)
    if isinstance(batch, (tuple, list)):
        named = hasattr(batch, "_fields")
        if any(True for _ in leaves(batch)):
            parts = [_cut(value, n, function, places) for value in batch]
            return type(batch)(*parts) if named else type(batch)(parts)
        numbers = isinstance(batch, tuple) and all(isinstance(x, (int, float)) for x in batch)
        return batch if named or numbers or len(batch) != n else type(batch)(batch[i] for i in places())
    array: Any = batch
    if hasattr(array, "__array__") and getattr(array, "shape", ())[:1] == (n,):
        return array[list(places())]
    return batch


def devices(batch: Any) -> set[torch.device]:
    """Return where the batch's tensors live."""
    return {tensor.device for _, tensor in leaves(batch)}


def concatenated(first: Any, second: Any) -> Any | None:
    """Return one batch of the samples of two, None where they do not fit together.

    They do if they are built alike, tensors have the same dtype, device and shape of a sample, and nothing else is in
    them but equal numbers and words.
    """
    found = _together(first, second)
    return None if found is _APART else found


_APART = object()


def _together(x: Any, y: Any) -> Any:
    if type(x) is not type(y):
        return _APART
    if isinstance(x, Tensor):
        alike = x.ndim > 0 and x.shape[1:] == y.shape[1:] and x.dtype == y.dtype and x.device == y.device
        plain = type(x) is Tensor and x.layout is torch.strided and not (x.requires_grad or y.requires_grad)
        return torch.cat([x, y]) if alike and plain else _APART
    if type(x) is dict:
        if list(x) != list(y):
            return _APART
        parts = {key: _together(value, y[key]) for key, value in x.items()}
        return _APART if any(part is _APART for part in parts.values()) else parts
    if type(x) in (tuple, list):
        if len(x) != len(y) or not any(True for _ in leaves(x)):
            return _APART
        every = [_together(a, b) for a, b in zip(x, y, strict=True)]
        return _APART if any(part is _APART for part in every) else type(x)(every)
    return x if isinstance(x, (int, float, str, type(None))) and x == y else _APART
