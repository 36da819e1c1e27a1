"""Collectives between ranks: failures told to all, ragged rows gathered, records sent round as bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

import ftw
from ftw import Dense, OuterProduct, Rows, Sum
from ftw.gradients import Record
from ftw_torch.errors import SelectionError
from ftw_torch.records.join import is_empty, seen

__all__ = ["Exchange", "Layouts", "rank_names"]

T = TypeVar("T")


class Exchange:
    """The collectives of one step, and the bytes that this rank put into them."""

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        cuda = dist.get_backend(group) == "nccl"
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.sent: dict[str, int] = {}

    def together(self, what: str, work: Callable[[], T]) -> T:
        """Return ``work()``; if it raises on one rank, all raise."""
        value: Any = None
        error: Exception | None = None
        try:
            value = work()
        except Exception as caught:
            error = caught
        notes = self.texts("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [f"rank {rank}: {note}" for rank, note in enumerate(notes) if note]
        if failed:
            raise SelectionError(f"another rank failed in {what}, so all stop: {'; '.join(failed)}")
        found: T = value
        return found

    def texts(self, text: str) -> list[str]:
        """Return every rank's text."""
        data = text.encode()
        sizes = [size for (size,) in self.counts([len(data)])]
        if not any(sizes):
            return [""] * self.world
        own = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        own[: len(data)] = torch.tensor(list(data), dtype=torch.uint8)
        every = self._gather(own, "control")
        return [bytes(x[:size].tolist()).decode() for x, size in zip(every, sizes, strict=True)]

    def counts(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return every rank's few numbers."""
        own = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        return [x.tolist() for x in self._gather(own, "control")]

    def add(self, tensors: Sequence[Tensor], what: str) -> list[Tensor]:
        """Return the sums of tensors over the ranks, in one all-reduce."""
        dtype = tensors[0].dtype
        for x in tensors:
            dtype = torch.promote_types(dtype, x.dtype)
        flat = torch.cat([x.reshape(-1).to(dtype) for x in tensors])
        home = flat.device
        flat = flat.to(self.device)
        dist.all_reduce(flat, group=self.group)
        self.count(what, flat.numel() * flat.element_size())
        pieces = torch.split(flat.to(home), [x.numel() for x in tensors])
        return [piece.reshape(x.shape) for piece, x in zip(pieces, tensors, strict=True)]

    def rows(self, own: Tensor, sizes: Sequence[int], what: str) -> Tensor:
        """Return the rows (sum of sizes, k) of all ranks from this one's (n, k)."""
        padded = own.new_zeros(max(sizes), own.shape[1])
        padded[: len(own)] = own
        every = self._gather(padded.to(self.device), what)
        return torch.cat([x[:size] for x, size in zip(every, sizes, strict=True)]).to(own.device)

    def bytes(self, own: Tensor, what: str) -> list[Tensor]:
        """Return the buffers of all ranks, of one length."""
        home = own.device
        return [x.to(home) for x in self._gather(own.to(self.device), what)]

    def _gather(self, own: Tensor, what: str) -> list[Tensor]:
        every = [torch.empty_like(own) for _ in range(self.world)]
        dist.all_gather(every, own.contiguous(), group=self.group)
        self.count(what, own.numel() * own.element_size())
        return every

    def count(self, what: str, size: int) -> None:
        """Write down bytes that this rank puts into a collective."""
        if size:
            self.sent[what] = self.sent.get(what, 0) + size


class Layouts:
    """How the records of each parameter look on the ranks, and the form in which they go round."""

    def __init__(self, exchange: Exchange, records: Mapping[str, Record], parameters: Mapping[str, Tensor]) -> None:
        self.exchange, self.parameters = exchange, parameters
        own = {name: None if is_empty(record) else _describe(record) for name, record in records.items()}
        every = [json.loads(text) for text in exchange.texts(json.dumps(own))]
        self.forms: dict[str, list[Any] | None] = {}
        for name, p in parameters.items():
            found = [layout[name] for layout in every if layout.get(name) is not None]
            form = _common(found) if found else None
            whole = ["dense", list(seen(p.shape)), _dtype(torch.promote_types(p.dtype, torch.float32))]
            some_empty = len(found) < sum(name in layout for layout in every)
            if found and (form is None or some_empty or _bytes(form) > _bytes(whole)):
                form = whole
            self.forms[name] = form

    def used(self, name: str) -> bool:
        """Return whether any rank's candidates use a parameter."""
        return self.forms[name] is not None

    def chunk(self, name: str, max_bytes: int) -> int:
        """Return how many samples of every rank may go round at a time."""
        return max(1, max_bytes // max(1, _bytes(self.forms[name] or []) * self.exchange.world))

    def gather(self, name: str, record: Record | None, counts: Sequence[int], size: int) -> Record:
        """Return the records of all ranks' next few samples, from this rank's."""
        form: Any = self.forms[name]
        p = self.parameters[name]
        size = min(size, max(counts))
        if record is not None and form[0] == "dense" and not isinstance(record, Dense):
            record = _written_out(record, counts[self.exchange.rank])
        buffer = torch.cat([part.view(torch.uint8).reshape(-1) for part in _leaves(form, record, size, p.device)])
        every = self.exchange.bytes(buffer, "records")
        cut = [_rebuild(form, x, size, count)[0] for x, count in zip(every, counts, strict=True)]
        return _concatenate([x for x, count in zip(cut, counts, strict=True) if count])


def rank_names(bad: Tensor, sizes: Sequence[int]) -> str:
    """Return words for the candidates where ``bad`` (N,) is True, by rank."""
    out, start = [], 0
    for rank, size in enumerate(sizes):
        numbers = torch.nonzero(bad[start : start + size])[:, 0].tolist()
        start += size
        if numbers:
            out.append(f"sample {', '.join(map(str, numbers[:8]))} of rank {rank}'s pool")
    return " and ".join(out)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(record: Any) -> list[Any]:
    """Return the form of a record: kind, shapes of a sample's leaves, dtypes."""
    if isinstance(record, Sum):
        return ["sum", [_describe(part) for part in record.parts]]
    if isinstance(record, OuterProduct):
        x, y = record.inputs, record.output_grads
        return ["outer", list(x.shape[1:]), _dtype(x.dtype), list(y.shape[1:]), _dtype(y.dtype)]
    if isinstance(record, Rows):
        x, y = record.indices, record.output_grads
        return ["rows", list(x.shape[1:]), _dtype(x.dtype), list(y.shape[1:]), _dtype(y.dtype), record.size]
    return ["dense", list(record.grads.shape[1:]), _dtype(record.grads.dtype)]


def _common(forms: Sequence[Any]) -> list[Any] | None:
    """Return the form that holds all of them, with the longest sequences; None if there is none."""
    first = forms[0]
    if any(form[0] != first[0] or len(form) != len(first) for form in forms):
        return None
    if first[0] == "sum":
        if len({len(form[1]) for form in forms}) > 1:
            return None
        parts = [_common(part) for part in zip(*(form[1] for form in forms), strict=True)]
        return None if any(part is None for part in parts) else ["sum", parts]
    if first[0] == "dense":
        return first if all(form == first for form in forms) else None
    longest = max(form[1][0] for form in forms)
    out = [
        [longest, *first[1][1:]] if i == 1 else [longest, *first[3][1:]] if i == 3 else x for i, x in enumerate(first)
    ]
    same = all(
        [[*f[1][1:]], f[2], f[3][1:], f[4:]] == [[*first[1][1:]], first[2], first[3][1:], first[4:]] for f in forms
    )
    return out if same else None


def _parts(form: Any) -> list[tuple[list[int], torch.dtype]]:
    """Return shapes and dtypes of a sample's leaves."""
    if form[0] == "sum":
        return [leaf for part in form[1] for leaf in _parts(part)]
    pairs = [(form[1], form[2])] if form[0] == "dense" else [(form[1], form[2]), (form[3], form[4])]
    return [(shape, getattr(torch, dtype)) for shape, dtype in pairs]


def _bytes(form: Any) -> int:
    """Return the bytes of one sample."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in _parts(form)) if form else 0


def _leaves(form: Any, record: Any, size: int, device: torch.device) -> list[Tensor]:
    """Return a record's tensors (size, *shape), padded with zeros; all zeros for None."""
    if form[0] == "sum":
        parts = [None] * len(form[1]) if record is None else record.parts
        return [leaf for f, part in zip(form[1], parts, strict=True) for leaf in _leaves(f, part, size, device)]
    out = [torch.zeros(size, *shape, dtype=dtype, device=device) for shape, dtype in _parts(form)]
    if record is not None:
        fields = ("grads",) if form[0] == "dense" else ("indices" if form[0] == "rows" else "inputs", "output_grads")
        for padded, field in zip(out, fields, strict=True):
            x: Tensor = getattr(record, field)
            padded[tuple(slice(0, length) for length in x.shape[: 1 if form[0] == "dense" else 2])] = x.to(padded.dtype)
    return out


def _rebuild(form: Any, buffer: Tensor, size: int, count: int) -> tuple[Record, Tensor]:
    """Return a record of ``count`` samples from its bytes, and what is left of them."""
    if form[0] == "sum":
        parts = []
        for part in form[1]:
            found, buffer = _rebuild(part, buffer, size, count)
            parts.append(found)
        return Sum(tuple(parts)), buffer
    leaves: list[Any] = []
    for shape, dtype in _parts(form):
        length = size * torch.Size(shape).numel() * dtype.itemsize
        leaves.append(buffer[:length].clone().view(dtype).reshape(size, *shape)[:count])  # a clone is aligned
        buffer = buffer[length:]
    if form[0] == "dense":
        return Dense(leaves[0]), buffer
    return Rows(leaves[0], leaves[1], form[5]) if form[0] == "rows" else OuterProduct(leaves[0], leaves[1]), buffer


def _concatenate(records: Sequence[Any]) -> Record:
    first: Any = records[0]
    if isinstance(first, Sum):
        return Sum(tuple(_concatenate(parts) for parts in zip(*(r.parts for r in records), strict=True)))
    if isinstance(first, Dense):
        return Dense(torch.cat([r.grads for r in records]))
    grads: Any = torch.cat([r.output_grads for r in records])
    if isinstance(first, Rows):
        return Rows(torch.cat([r.indices for r in records]), grads, first.size)
    return OuterProduct(torch.cat([r.inputs for r in records]), grads)


def _written_out(record: Any, n: int) -> Record:
    """Return the per-sample gradients themselves."""
    out = []
    for i in range(n):
        one = ftw.take({"": record}, torch.tensor([i]))
        x: Any = ftw.combine(one, torch.ones(1))[""]
        out.append(x)
    return Dense(torch.stack(out))
