"""P of an optimizer whose parameters and state lie in shards (DTensors), applied to gradients in the same shards.

Readers that work entry by entry run on the shards as they are: what they take over a whole parameter (the root mean
square of the damping, the means of Adafactor) becomes an all-reduce of a number, or of a row of them. Muon, SOAP and
readers from outside need whole matrices: parameter, state and gradient are gathered, one parameter at a time, and the
response is formed again where it is asked for again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ftw.geometry import Operator
from ftw_torch.capture.fsdp import cut_as, gathered, part_bytes
from ftw_torch.records.join import seen

from . import torch_optim as readers
from .geometry import Reading, geometry, readings

__all__ = ["ShardedGeometry"]

BY_SHARD = ("lion_pytorch.lion_pytorch.Lion",)  # third-party readers that work entry by entry


class ShardedGeometry:
    """The response to g_T and to updates, parameter by parameter.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer, or a sequence of them
    parameters : mapping of str to Parameter
        DTensors or plain tensors.
    anticipate : mapping of str to tensor
        g_T, in the shards of its parameter.
    damping : float
        As in `geometry`.
    note : callable
        Given the bytes that this rank puts into gathering a parameter with its state and gradients.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        parameters: Mapping[str, Tensor],
        anticipate: Mapping[str, Tensor],
        damping: float,
        note: Callable[[int], None],
    ) -> None:
        self.parameters, self.anticipate, self.damping = parameters, anticipate, damping
        self.optimizer = optimizer
        self.readings = readings(optimizer, parameters)
        self.note = note
        self._known: dict[str, Operator] = {}

    def apply(self, name: str, g: Tensor) -> Tensor:
        """Return P g of one parameter, in the shards of g."""
        p, reading = self.parameters[name], self.readings[name]
        if not hasattr(p, "placements") or _by_shard(reading):
            if name not in self._known:
                self._known[name] = self._operator(reading, p, reading.state(p), self.anticipate[name])
            found: Any = self._known[name].apply(g.to(_wide(g)))
            placements = getattr(g, "placements", None)
            if placements is not None:  # arithmetic gathers what has fewer rows than there are ranks
                found = found.redistribute(placements=placements)
            out: Tensor = found
            return out
        state = reading.state(p)
        self.note(part_bytes(p) + sum(map(part_bytes, state.values())) + 2 * part_bytes(g))
        operator = self._operator(reading, gathered(p), gathered(state), gathered(self.anticipate[name]))
        return cut_as(operator.apply(gathered(g).to(_wide(g))), p)

    def whole(self) -> dict[str, Operator]:
        """Return P in the shapes of records, where parameters are whole on each rank."""
        mean = {name: g.reshape(seen(g.shape)) for name, g in self.anticipate.items()}
        return geometry(self.optimizer, self.parameters, mean, damping=self.damping)

    def _operator(self, reading: Reading, p: Tensor, state: Any, anticipate: Tensor) -> Operator:
        group = reading.optimizer.param_groups[reading.group]
        return reading.read(p, state, group, lr=reading.lr, anticipate=anticipate, damping=self.damping).operator


def _by_shard(reading: Reading) -> bool:
    """Return whether a reader takes a parameter entry by entry, and what it sums over as DTensors do."""
    kind = type(reading.optimizer)
    if reading.read is readers.READERS.get(kind):
        return kind.__name__ != "Muon"
    return f"{kind.__module__}.{kind.__qualname__}" in BY_SHARD


def _wide(g: Tensor) -> torch.dtype:
    return torch.promote_types(g.dtype, torch.float32)
