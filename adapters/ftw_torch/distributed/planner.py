"""What a rank holds in a step of forward scores under ``fully_shard``, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ftw_torch.options import check_count

__all__ = ["RankBytes", "bytes_per_rank"]

# of a layer in its backward: the gathered parameters, their buffer, the gradient, the reduce-scatter's input
AT_ONCE = 4


class RankBytes(NamedTuple):
    """Bytes on one rank at the peak of a step, without activations and ``.grad`` accumulated before it.

    Attributes
    ----------
    parameters, state, target, response, update : int
        Shards of the parameters, of the optimizer's state, of g_T, of P where it is one number an entry, and of the
        update (earlier in the step: of the parameters' copy while they are moved).
    layer : int
        The largest layer, as often as it is whole in its backward.
    """

    parameters: int
    state: int
    target: int
    response: int
    update: int
    layer: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self)


def bytes_per_rank(
    model: nn.Module, ranks: int, *, layers: Sequence[nn.Module] | None = None, state: float = 2.0
) -> RankBytes:
    """Return the bytes of a rank in a step of ``score="forward"`` under ``fully_shard``.

    Parameters
    ----------
    model : nn.Module
        Not sharded yet; on the meta device it needs no memory.
    ranks : int
        How many the parameters are sharded over.
    layers : sequence of nn.Module, optional
        The modules that ``fully_shard`` is called on beside the model; by default each block of the model's module
        lists, or its children.
    state : float
        Numbers that the optimizer keeps for each trained one: 2 for AdamW, 1 for SGD with momentum and for Lion.

    Returns
    -------
    RankBytes
        In the parameters' own dtypes; under mixed precision a layer is gathered in fewer bytes.

    Raises
    ------
    ValueError
        If ``ranks`` is below one.
    """
    check_count(ranks, "ranks")
    if layers is None:
        lists = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
        layers = lists or list(model.children())
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = sum(p.numel() * p.itemsize for p in model.parameters() if id(p) not in inside)
    largest = max([rest, *(sum(p.numel() * p.itemsize for p in layer.parameters()) for layer in layers)])
    held = trained = 0
    for p in model.parameters():
        rows = p.shape[0] if p.ndim else 1
        part = -(-rows // ranks) * (p.numel() // max(rows, 1)) * p.itemsize  # the first rank's
        held += part
        trained += part * p.requires_grad
    return RankBytes(held, int(state * trained), trained, trained, trained, AT_ONCE * largest)
