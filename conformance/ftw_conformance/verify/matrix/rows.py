"""The rows of the matrix: every layer in every use and in every mode, in pairs, or all products with ``full``."""

from __future__ import annotations

from collections.abc import Iterator

from .layers import Layer, every_layer
from .steps import MODES, USES, applies

__all__ = ["Row", "rows"]

Row = tuple[str, Layer, str, str]
"""Name, layer, use and mode."""


def rows(*, full: bool = False) -> Iterator[Row]:
    """Yield the rows.

    In pairs each value of each axis meets each layer, and each use each mode over the layers: layer i takes its uses
    with the modes shifted by i.
    """
    for i, (name, layer) in enumerate(every_layer().items()):
        pairs = [(use, mode) for use in USES for mode in MODES if applies(layer, use, mode)]
        if not full:
            pairs = _covering(pairs, i)
        for use, mode in pairs:
            yield f"matrix/layer/{name}/{use}, {mode}", layer, use, mode


def _covering(pairs: list[tuple[str, str]], shift: int) -> list[tuple[str, str]]:
    """Return few of the pairs in which every use and every mode of all is in one."""
    uses, modes = list(dict.fromkeys(u for u, _ in pairs)), list(dict.fromkeys(m for _, m in pairs))
    chosen = []
    for i in range(max(len(uses), len(modes))):
        pair = uses[i % len(uses)], modes[(i + shift) % len(modes)]
        if pair in pairs:
            chosen.append(pair)
    for use in uses:
        if use not in {u for u, _ in chosen}:
            chosen.append(next(p for p in pairs if p[0] == use))
    for mode in modes:
        if mode not in {m for _, m in chosen}:
            chosen.append(next(p for p in pairs if p[1] == mode))
    return chosen
