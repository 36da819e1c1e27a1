"""Samples by number: cut into batches, shuffled, split into folds."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from ftw_torch import batches

from .errors import TrialError

__all__ = ["LEAST_TARGET", "Samples", "ShuffledPasses", "first_of_each", "fold", "refuse_shared"]

MOST_VALIDATION = 128  # validation samples of a fold
LEAST_TARGET = 12  # 8 to train on, 4 to judge by


class Samples:
    """Samples of which some, by number, make a batch.

    Parameters
    ----------
    data : sequence, or batch
        A sequence of samples (a list, a map-style dataset), or one batch of them all: a nested mapping or tuple of
        tensors with samples on axis 0.
    collate : callable, optional
        Makes a batch of a list of samples; `torch.utils.data.default_collate` by default.
    what : str
        The name in error messages.
    """

    def __init__(self, data: Any, collate: Callable[[list[Any]], Any] | None, what: str) -> None:
        whole = isinstance(data, (torch.Tensor, Mapping)) or (
            isinstance(data, tuple) and any(True for _ in batches.leaves(data))
        )
        self._data, self._whole = data, whole and collate is None
        self._collate: Callable[[list[Any]], Any] = collate or default_collate
        if not self._whole and not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
            raise TrialError(
                f"{what} is a {type(data).__name__}; expected a sequence of samples, or a batch of tensors"
            )
        self._count = batches.size(data, what) if self._whole else len(data)
        if self._count == 0:
            raise TrialError(f"{what} is empty")

    def __len__(self) -> int:
        return self._count

    def batch(self, numbers: Sequence[int], device: torch.device) -> Any:
        """Return the batch of these samples, on a device."""
        if self._whole:
            found = batches.take(self._data, torch.as_tensor(numbers, dtype=torch.int64))
        else:
            found = self._collate([self._data[i] for i in numbers])
        return batches.map_tensors(lambda x: x.to(device), found)

    def keys(self) -> list[bytes]:
        """Return a digest of each sample: the same for equal samples."""
        if self._whole:
            one = (batches.take(self._data, torch.tensor([i])) for i in range(len(self)))
            return [_digest(sample) for sample in one]
        return [_digest(self._data[i]) for i in range(len(self))]


def _digest(sample: Any) -> bytes:
    found = hashlib.blake2b(digest_size=16)

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for name in sorted(value, key=str):
                add(str(name))
                add(value[name])
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            add({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
        elif isinstance(value, (tuple, list)):
            found.update(f"{len(value)} items".encode())
            for part in value:
                add(part)
        else:
            found.update(value if isinstance(value, bytes) else repr(value).encode())
            found.update(b"\0")

    add(sample)
    return found.digest()


def first_of_each(keys: Sequence[bytes]) -> list[int]:
    """Return the numbers of the samples that repeat no earlier one."""
    return sorted({key: i for i, key in reversed([*enumerate(keys)])}.values())


def refuse_shared(one: tuple[str, Sequence[bytes]], other: tuple[str, Sequence[bytes]]) -> None:
    """Raise if samples of one split, (name, keys), are in another."""
    places = {key: i for i, key in enumerate(other[1])}
    shared = [i for i, key in enumerate(one[1]) if key in places]
    if shared:
        first = shared[0]
        raise TrialError(
            f"{len(shared)} of the {len(one[1])} samples of the {one[0]} are in the {other[0]} too (number {first}, "
            f"there {places[one[1][first]]}): the model would train on what it is judged by; take them out of one split"
        )


class ShuffledPasses:
    """Numbers of samples, in one shuffled pass after the other; a draw never holds a sample twice."""

    def __init__(self, numbers: Sequence[int], seed: str) -> None:
        self._numbers, self._rng, self._left = list(numbers), random.Random(seed), list[int]()

    def draw(self, count: int) -> list[int]:
        """Return the next ``count`` numbers, at most as many as there are."""
        count = min(count, len(self._numbers))
        if len(self._left) < count:
            self._left = self._rng.sample(self._numbers, len(self._numbers))
        drawn, self._left = self._left[:count], self._left[count:]
        return drawn


def fold(numbers: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Split the target samples: to train on, and a third kept apart to judge by."""
    order = random.Random(f"fold {seed}").sample(numbers, len(numbers))
    apart = min(len(numbers) // 3, MOST_VALIDATION)
    return sorted(order[apart:]), sorted(order[:apart])
