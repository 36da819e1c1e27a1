"""Batches: a tensor, or nested mappings and sequences of tensors, with the samples on axis 0."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["leaves", "map_tensors", "size", "split", "take"]


def leaves(batch: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a batch with the path that leads to it."""
    if isinstance(batch, Tensor):
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
    for start in range(0, n, piece):
        yield map_tensors(lambda x, s=start: x[s : s + piece], batch)  # type: ignore[misc]


def take(batch: Any, indices: Tensor) -> Any:
    """Return the samples ``indices`` of a batch."""
    return map_tensors(lambda x: x.index_select(0, indices.to(x.device)), batch)


def devices(batch: Any) -> set[torch.device]:
    """Return where the batch's tensors live."""
    return {tensor.device for _, tensor in leaves(batch)}
