"""Packed batches: documents side by side in the rows of a batch, without padding between them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import batches

__all__ = ["PackedBatch", "documents"]


class PackedBatch(batches.CustomBatch):
    """A batch whose samples are documents, packed into rows.

    Every document is a candidate. The model must keep documents apart: attention that looks across their borders is
    refused at a selector's first use. ``per_sample_loss`` gets the packed batch and returns one loss a document, (n,);
    see `mean`.

    Parameters
    ----------
    tensors : tensor, or nested mapping or tuple of tensors
        What the model takes. Tensors with leading axes (rows, T) hold something for each token.
    samples : integer tensor (rows, T)
        Number of each token's document, 0 .. n - 1, each at least once; -1 for tokens of none, such as padding.
        `documents` reads them from the inputs of a padding-free model.

    Raises
    ------
    TypeError, ValueError
        If ``samples`` is not a matrix of such numbers, or no tensor has its shape.

    Examples
    --------
    >>> def per_sample_loss(model, batch):
    ...     logits = model(**batch.tensors).logits  # (rows, T, vocabulary)
    ...     labels = batch.tensors["input_ids"].roll(-1, 1)
    ...     same = batch.samples == batch.samples.roll(-1, 1)  # a document's last token has nothing to predict
    ...     losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    ...     return batch.mean(losses.view_as(labels), same)
    """

    def __init__(self, tensors: Any, samples: Tensor) -> None:
        if not isinstance(samples, Tensor) or samples.is_floating_point() or samples.dtype == torch.bool:
            kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
            raise TypeError(f"PackedBatch: samples must be a tensor of integers, got {kind}")
        if samples.ndim != 2 or not samples.numel():
            raise ValueError(f"PackedBatch: samples {tuple(samples.shape)} must be (rows, T), not empty")
        self.tensors, self.samples = tensors, samples.to(torch.int64)
        least, most = (int(x) for x in self.samples.aminmax())
        self.n = most + 1
        if least < -1 or most < 0:
            raise ValueError("PackedBatch: samples must be 0 .. n - 1, or -1 for tokens of no document")
        counts = torch.bincount(self.samples.reshape(-1) + 1, minlength=self.n + 1)[1:]  # (n,)
        if not bool((counts > 0).all()):
            missing = torch.nonzero(counts == 0)[:8, 0].tolist()
            raise ValueError(f"PackedBatch: documents {missing} have no token; number them 0 .. n - 1 without gaps")
        shape = tuple(samples.shape)
        shapes = {path: tuple(x.shape) for path, x in batches.leaves(tensors, "tensors")}
        if shape not in {found[:2] for found in shapes.values()}:
            raise ValueError(f"PackedBatch: no tensor has the leading axes {shape} of samples; got {shapes}")
        self.by_rows = all(not found or found[0] == shape[0] for found in shapes.values())

    @property
    def shares_rows(self) -> bool:
        """Whether a row holds several documents, which may look at each other."""
        first = torch.where(self.samples < 0, self.n, self.samples).amin(1)  # (rows,)
        return bool((self.samples.amax(1) > first).any())

    def size(self, what: str) -> int:
        """Return the number n of documents."""
        return self.n

    def leaves(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor, the documents' numbers last."""
        yield from batches.leaves(self.tensors, path)
        yield f"{path}.samples", self.samples

    def map_tensors(self, function: Any) -> PackedBatch:
        """Return the batch with ``function`` applied to every tensor."""
        return PackedBatch(batches.map_tensors(function, self.tensors), function(self.samples))

    def mean(self, values: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the mean (n,) of the values (rows, T) of each document's tokens, of those ``where`` is True.

        A document without such tokens has the mean zero.
        """
        chosen = self.samples >= 0 if where is None else (self.samples >= 0) & where  # (rows, T)
        place = torch.where(chosen, self.samples, self.n).reshape(-1)  # the last is that of tokens that do not count
        total = values.new_zeros(self.n + 1).index_add(0, place, values.reshape(-1))[:-1]
        count = total.new_zeros(self.n + 1).index_add(0, place, torch.ones_like(place, dtype=total.dtype))[:-1]
        return total / count.clamp_min(1)

    def take(self, indices: Tensor) -> PackedBatch:
        """Return some documents, in order: the rows that hold them, where tokens of other documents are of none.

        Raises
        ------
        ValueError
            If a document is asked for twice in a batch with tensors that are not cut by rows.
        """
        wanted = indices.to(self.samples.device)  # (k,)
        if len(set(indices.tolist())) == len(wanted):
            table = self.samples.new_full((self.n + 1,), -1)  # the last, at -1, is that of tokens of no document
            table[wanted] = torch.arange(len(wanted), device=table.device)
            numbers = table[self.samples]  # (rows, T)
            if not self.by_rows:
                return PackedBatch(self.tensors, numbers)
            rows = torch.nonzero((numbers >= 0).any(1))[:, 0]
            return self._rows(rows, numbers[rows])
        if not self.by_rows:
            raise ValueError(
                "a packed batch with tensors that have no axis of rows cannot repeat a document; give lengths or "
                "positions as tensors (rows, T)"
            )
        hit = self.samples[None] == wanted[:, None, None]  # (k, rows, T)
        which, rows = torch.nonzero(hit.any(2), as_tuple=True)  # a copy of its rows for each time
        numbers = torch.where(hit[which, rows], which[:, None], -1)
        return self._rows(rows, numbers)

    def split(self, piece: int) -> Iterator[PackedBatch]:
        """Yield groups of whole rows with at most ``piece`` documents each, or of one row that has more.

        Raises
        ------
        ValueError
            If a document crosses rows, documents are not numbered row by row, or a tensor has no axis of rows.
        """
        most = self.samples.amax(1)  # (rows,)
        least = torch.where(self.samples < 0, self.n, self.samples).amin(1)
        bounds = [(a, b) for a, b in zip(least.tolist(), most.tolist(), strict=True) if b >= 0]
        if any(later[0] <= earlier[1] for earlier, later in pairwise(bounds)):
            raise ValueError(
                "micro_batch= cuts a packed batch between rows, but a document crosses rows, or documents are not "
                "numbered row by row; keep each document in one row and number them in order, or drop micro_batch"
            )
        if not self.by_rows:
            raise ValueError(
                "micro_batch= cuts a packed batch between rows, and one of its tensors has no axis of rows; give "
                "lengths or positions as tensors (rows, T), or drop micro_batch"
            )
        group: list[int] = []
        start = 0
        for row, (first, last) in enumerate(zip(least.tolist(), most.tolist(), strict=True)):
            if group and last >= 0 and last + 1 - start > piece:
                yield self._group(group, start)
                group, start = [], first
            group.append(row)
        yield self._group(group, start)

    def crowd(self, most: int) -> Tensor:
        """Return numbers of up to ``most`` documents that are neighbours, of the row that has the most of them."""
        rows = [torch.unique(row[row >= 0]) for row in self.samples]
        first = max(rows, key=len)[:most]
        others = torch.arange(self.n, device=first.device)
        return torch.cat([first, others[~torch.isin(others, first)]])[: min(most, self.n)]

    def _group(self, rows: list[int], start: int) -> PackedBatch:
        index = torch.tensor(rows, device=self.samples.device)
        numbers = self.samples[index]
        return self._rows(index, torch.where(numbers < 0, -1, numbers - start))

    def _rows(self, rows: Tensor, numbers: Tensor) -> PackedBatch:
        tensors = batches.map_tensors(lambda x: x.index_select(0, rows.to(x.device)), self.tensors)
        return PackedBatch(tensors, numbers)


def documents(batch: Any) -> Tensor:
    """Return the number of each token's document, read from the inputs of a padding-free model.

    Parameters
    ----------
    batch : mapping of str to tensor
        With ``seq_idx`` (rows, T), or ``cu_seq_lens_q``, ``cu_seqlens_q`` or ``cu_seqlens`` (documents + 1,) for one
        row, or ``position_ids`` (rows, T), which restart with each document. Where it has an ``attention_mask``
        (rows, T) too, tokens with 0 belong to no document.

    Returns
    -------
    integer tensor (rows, T)
        0 .. n - 1, row by row, -1 for tokens of none: the ``samples`` of a `PackedBatch`.

    Raises
    ------
    ValueError
        If none of these tensors is there, or it has another shape.
    """
    shape = tuple(batch["input_ids"].shape) if "input_ids" in batch else None
    lengths = next((batch[k] for k in ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens") if k in batch), None)
    if "seq_idx" in batch:
        index = batch["seq_idx"]
        starts = _matrix(index, "seq_idx", shape).diff(dim=1, prepend=index[:, :1] - 1) != 0
    elif lengths is not None:
        total = int(lengths[-1]) if shape is None else shape[-1]
        if lengths.ndim != 1 or (shape is not None and shape[:-1] not in ((), (1,))):
            raise ValueError(
                f"documents: cumulated lengths {tuple(lengths.shape)} need a batch of one row, not {shape}"
            )
        starts = torch.zeros(1, total, dtype=torch.bool, device=lengths.device)
        starts[0, lengths[:-1][lengths[:-1] < total].long()] = True
    elif "position_ids" in batch:
        positions = _matrix(batch["position_ids"], "position_ids", shape)
        starts = positions.diff(dim=1, prepend=positions[:, :1]) <= 0
    else:
        raise ValueError(
            "documents: the batch says nothing about its documents; it needs position_ids that restart at 0 with each, "
            f"seq_idx, or cu_seq_lens_q; it has {sorted(batch)}"
        )
    starts = starts.clone()
    mask = batch.get("attention_mask")
    real = mask.bool() if mask is not None and tuple(mask.shape) == tuple(starts.shape) else None
    if real is not None:
        starts |= real & ~torch.nn.functional.pad(real, (1, 0))[:, :-1]  # after padding a document begins
        starts &= real
    else:
        starts[:, 0] = True
    numbers = starts.reshape(-1).cumsum(0).reshape(starts.shape) - 1
    return numbers if real is None else torch.where(real, numbers, -1)


def _matrix(x: Tensor, name: str, shape: tuple[int, ...] | None) -> Tensor:
    if x.ndim != 2 or (shape is not None and tuple(x.shape) != shape):
        raise ValueError(f"documents: {name} {tuple(x.shape)} must be (rows, T){f' = {shape}' if shape else ''}")
    return x
