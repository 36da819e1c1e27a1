"""Padding-free batches: all documents in one row, each a candidate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ftw_torch import batches
from ftw_torch.packing import PackedBatch, documents

__all__ = ["IGNORED", "Documents", "entries", "in_one_row", "replaced"]

IGNORED = -100  # a label without a loss
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens")
LONGEST = ("max_length_q", "max_length_k")
INDEX = "seq_idx"


class Documents(PackedBatch):
    """Documents that fill one row, one after the other; any of them make a row of their own.

    Parameters
    ----------
    tensors : mapping of str to anything
        Tensors (1, T, ...) hold something for each token, tensors and lists of length n something for each document;
        cumulated lengths, the longest length and ``seq_idx`` are made anew for every row.
    samples : tensor of int (1, T)
        0 .. n - 1, in order.
    """

    def __init__(self, tensors: Mapping[str, Any], samples: Tensor) -> None:
        super().__init__(dict(tensors), samples)
        self.by_rows = True  # a document may be taken twice
        self.lengths = torch.bincount(self.samples[0], minlength=self.n)  # (n,)
        known = (*LENGTHS, *LONGEST, INDEX)
        wrong = {name: tuple(x.shape) for name, x in self.tensors.items() if name not in known and self._odd(x)}
        if wrong:
            raise ValueError(
                f"entries {wrong} of a padding-free batch are neither (1, {samples.shape[1]}, ...), one row of tokens, "
                f"nor ({self.n}, ...), one a document: an attention mask, for instance, stays out of such batches"
            )

    def map_tensors(self, function: Any) -> Documents:
        """Return the batch with ``function`` applied to every tensor."""
        return Documents(batches.map_tensors(function, self.tensors), function(self.samples))

    def take(self, indices: Tensor) -> Documents:
        """Return some documents, in order, in a row without the others."""
        wanted = indices.to(self.samples.device)  # (k,)
        lengths = self.lengths[wanted]
        numbers = torch.repeat_interleave(torch.arange(len(wanted), device=wanted.device), lengths)  # (t,)
        first = (self.lengths.cumsum(0) - self.lengths)[wanted] - (lengths.cumsum(0) - lengths)  # (k,)
        tokens = torch.arange(len(numbers), device=wanted.device) + first[numbers]  # (t,)
        cut = {name: self._cut(name, x, tokens, wanted) for name, x in self.tensors.items()}
        return Documents(_laid_out(cut, numbers[None], lengths), numbers[None])

    def split(self, piece: int) -> Iterator[Documents]:
        """Yield rows of at most ``piece`` consecutive documents."""
        every = torch.arange(self.n)
        for start in range(0, self.n, piece):
            yield self.take(every[start : start + piece])

    def rows(self, x: Tensor) -> list[Tensor]:
        """Return the tokens' entries (t, ...) of each document, from those of all (1, T, ...)."""
        return list(torch.split(x[0], self.lengths.tolist()))

    def is_of_tokens(self, x: Any) -> bool:
        """Return whether an entry has something for each token."""
        return isinstance(x, Tensor) and x.shape[:2] == self.samples.shape

    def _odd(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.ndim > 0 and not self.is_of_tokens(x) and len(x) != self.n

    def _cut(self, name: str, x: Any, tokens: Tensor, wanted: Tensor) -> Any:
        if name in (*LENGTHS, *LONGEST, INDEX):
            return x
        if self.is_of_tokens(x):
            return x[:, tokens.to(x.device)]
        if isinstance(x, Tensor) and x.ndim:
            return x[wanted.to(x.device)]
        return [x[i] for i in wanted.tolist()] if isinstance(x, list) and len(x) == self.n else x


def in_one_row(inputs: Mapping[str, Any]) -> Documents | None:
    """Return a padding-free batch as its documents; None for a batch in which a row is a sample.

    Documents are read from ``seq_idx``, cumulated lengths or ``position_ids``. Rows of packed documents are laid end to
    end. Tokens that make a document of their own and have no label, such as padding to a multiple, are left out.

    Raises
    ------
    ValueError
        If documents share a row with an attention mask, which a model takes in place of their positions.
    """
    positions, ids = inputs.get("position_ids"), inputs.get("input_ids")
    by_length = any(name in inputs for name in (*LENGTHS, INDEX))
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    if not by_length and (not isinstance(positions, Tensor) or positions.shape != ids.shape):
        return None
    samples = documents(inputs)  # (rows, T)
    if not by_length and int(samples.max()) < len(samples):
        return None
    if "attention_mask" in inputs:
        raise ValueError(
            "documents share rows of the batch, and an attention_mask stands beside their positions: models take the "
            "mask and let documents look at each other; leave it out (padding_free=True, DataCollatorWithFlattening)"
        )
    shape, n = samples.shape, int(samples.max()) + 1
    of_tokens = {name for name, x in inputs.items() if isinstance(x, Tensor) and x.shape[:2] == shape}
    flat = {name: x.flatten(0, 1)[None] if name in of_tokens else x for name, x in inputs.items()}
    numbers = samples.reshape(-1)  # (T,)
    lengths = torch.bincount(numbers, minlength=n)
    real = torch.ones_like(numbers, dtype=torch.bool)
    if "labels" in of_tokens and flat["labels"].ndim == 2:
        real = (lengths[numbers] > 1) | (flat["labels"][0] != IGNORED)
    if not bool(real.all()) and bool(real.any()):
        flat = {name: x[:, real] if name in of_tokens else x for name, x in flat.items()}
        numbers = torch.unique_consecutive(numbers[real], return_inverse=True)[1]
        lengths = torch.bincount(numbers)
    return Documents(_laid_out(flat, numbers[None], lengths), numbers[None])


def _laid_out(tensors: dict[str, Any], samples: Tensor, lengths: Tensor) -> dict[str, Any]:
    """Return the entries of a row, with those that say where its documents (n,) begin made anew."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))  # (n + 1,)
    row = dict(tensors)
    for name in LENGTHS:
        if name in row:
            row[name] = ends.to(row[name])
    for name in LONGEST:
        if name in row:
            row[name] = lengths.max().to(row[name]) if isinstance(row[name], Tensor) else int(lengths.max())
    if INDEX in row:
        row[INDEX] = samples.to(row[INDEX])
    return row


def entries(batch: Any) -> dict[str, Any]:
    """Return the entries of a batch by name, as a dict of one's own."""
    return dict(batch.tensors if isinstance(batch, Documents) else batch)


def replaced(batch: Any, **new: Any) -> Any:
    """Return a batch with some entries put in, or left out where they are None."""
    found = {name: x for name, x in {**entries(batch), **new}.items() if x is not None or name not in new}
    return Documents(found, batch.samples) if isinstance(batch, Documents) else found
