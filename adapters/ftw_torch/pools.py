"""Pools from any dataset or stream: each sample offered once, none lost; the refused may be offered again."""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from .errors import SelectionWarning, TargetWarning

__all__ = ["Pools"]


class Pools:
    """Iterates over pools of samples, collated.

    Parameters
    ----------
    samples : iterable
        A dataset or stream; read once from front to back for each iteration over the pools, never ahead of the pool
        that is asked for.
    size : int
        Samples of a pool; the last one may be smaller.
    collate : callable, optional
        ``collate(list of samples) -> batch``; pads ragged samples. The default is PyTorch's.
    reoffer : int
        How many more times a refused sample is offered, in front of fresh ones. The refused ones are those of the last
        pool that `picked` was not told of.
    target : iterable, optional
        The target samples: one that stands in the pool too is warned of, once; it would always win.
    key : callable, optional
        What makes two samples the same, for the check against the target: the sample's content by default.

    Attributes
    ----------
    read, offered, refused : int
        Samples read from the source, places in pools filled, samples refused for good, in this iteration.
    leaked : int
        Samples read that stand in the target too.
    current : list
        The samples of the last pool, uncollated.

    Examples
    --------
    >>> pools = Pools([1, 2, 3, 4, 5], size=2, reoffer=1)
    >>> for pool in pools:
    ...     print(pool.tolist())
    ...     pools.picked([0])
    [1, 2]
    [2, 3]
    [3, 4]
    [4, 5]
    [5]
    """

    def __init__(
        self,
        samples: Iterable[Any],
        size: int,
        collate: Callable[[list[Any]], Any] | None = None,
        *,
        reoffer: int = 0,
        target: Iterable[Any] | None = None,
        key: Callable[[Any], Any] | None = None,
    ) -> None:
        for name, value, least in (("size", size, 1), ("reoffer", reoffer, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be an int >= {least}")
        self.samples, self.size, self.reoffer = samples, size, reoffer
        self.collate = default_collate if collate is None else collate
        self.key = _content if key is None else key
        self._target = None if target is None else {self.key(sample) for sample in target}
        self._warned = False
        self._passes = 0
        self._reset()

    def _reset(self) -> None:
        self.read = self.offered = self.refused = self.leaked = 0
        self.current: list[Any] = []
        self._left: list[int] = []  # offers left of the current samples
        self._waiting: deque[tuple[Any, int]] = deque()
        self._told = True

    def picked(self, indices: Iterable[int] | torch.Tensor) -> None:
        """Say which places of the last pool were trained on; the others are refused.

        Raises
        ------
        IndexError
            If a place is not in the pool.
        RuntimeError
            If the pool was told of before, or there is none.
        """
        if self._told:
            raise RuntimeError("picked() belongs to one pool: call it once after each")
        chosen = {int(i) for i in indices}
        wrong = sorted(i for i in chosen if not 0 <= i < len(self.current))
        if wrong:
            raise IndexError(f"places {wrong} are not in the pool of {len(self.current)} samples")
        self._told = True
        for i, (sample, left) in enumerate(zip(self.current, self._left, strict=True)):
            if i in chosen:
                continue
            if left > 0:
                self._waiting.append((sample, left - 1))
            else:
                self.refused += 1

    def __iter__(self) -> Iterator[Any]:
        """Yield the pools of one pass over the samples."""
        self._reset()
        self._passes += 1
        source = iter(self.samples)
        while True:
            places: list[tuple[Any, int]] = []
            while self._waiting and len(places) < self.size:
                places.append(self._waiting.popleft())
            for sample in itertools.islice(source, self.size - len(places)):
                self.read += 1
                self._check(sample)
                places.append((sample, self.reoffer))
            if not places:
                if self._passes > 1 and not self.read and source is self.samples:
                    words = "the samples were an iterator, used up by the pass before"
                    warnings.warn(words, SelectionWarning, stacklevel=2)
                return
            self.current, self._left = [sample for sample, _ in places], [left for _, left in places]
            self.offered += len(places)
            self._told = False
            yield self.collate(list(self.current))
            if not self._told and self.reoffer:
                raise RuntimeError("reoffer needs to know what was refused: call picked(indices) after each pool")

    def _check(self, sample: Any) -> None:
        if self._target is None or self.key(sample) not in self._target:
            return
        self.leaked += 1
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"sample {self.read - 1} of the pool is a target sample too: a copy of the target always wins; take "
                "it out of one of them",
                TargetWarning,
                stacklevel=4,
            )


def _content(sample: Any) -> bytes:
    """Return a digest of a sample's content."""
    digest = hashlib.sha256()
    _update(digest, sample)
    return digest.digest()


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            digest.update(f"{{{name}:".encode())
            _update(digest, value[name])
    elif hasattr(value, "tolist"):
        _update(digest, value.tolist())
    elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        digest.update(f"[{len(value)}:".encode())
        for item in value:
            _update(digest, item)
    else:
        digest.update(f"{type(value).__name__}={value!r};".encode())
