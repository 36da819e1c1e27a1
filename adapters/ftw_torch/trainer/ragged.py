"""Entries of a batch with several rows a sample, or none: patches and images laid end to end.

Such an entry (``pixel_values`` of Qwen-VL, images of samples that have one or two) is cut by declared counts, travels
as a list of one part a sample, and is joined again for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .documents import entries
from .pairs import laid_out

__all__ = ["Counts", "Part", "cut", "joined", "known_counts"]

Counts = Callable[[Mapping[str, Any]], Mapping[str, Sequence[int] | Tensor]]


class Part:
    """The rows of an entry that are one sample's."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows  # (r, ...)


class _Grid(NamedTuple):
    """An entry of Qwen-VL's with one row an image or video, and that of its patches."""

    sizes: str
    patches: str
    token: str  # the configuration's name of the placeholder


_GRIDS = (
    _Grid("image_grid_thw", "pixel_values", "image_token_id"),
    _Grid("video_grid_thw", "pixel_values_videos", "video_token_id"),
)


def known_counts(inputs: Mapping[str, Any], config: Any = None) -> dict[str, list[int]]:
    """Return how many rows each sample has in entries whose layout is known: Qwen-VL's patches.

    A sample has the images for whose patches its text has placeholders, after merging.

    Raises
    ------
    ValueError
        If placeholders and images do not fit.
    """
    counts: dict[str, list[int]] = {}
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1) ** 2
    for grid in _GRIDS:
        sizes, ids, token = inputs.get(grid.sizes), inputs.get("input_ids"), getattr(config, grid.token, None)
        if not isinstance(sizes, Tensor) or not isinstance(ids, Tensor) or token is None:
            continue
        patches = sizes.prod(1).tolist()  # of each image
        images: list[int] = []
        place = 0
        for wanted in ids.eq(token).sum(1).tolist():  # of each sample
            first = place
            while wanted > 0 and place < len(patches):
                wanted -= patches[place] // merge
                place += 1
            if wanted:
                break
            images.append(place - first)
        if len(images) != len(ids) or place != len(patches):
            raise ValueError(
                f"the placeholders {grid.token}={token} in 'input_ids' do not fit the {len(patches)} rows of "
                f"{grid.sizes!r}; give the rows of each sample: ragged=(inputs) -> {{entry: counts}}"
            )
        counts[grid.sizes] = images
        starts = [sum(images[:i]) for i in range(len(images))]
        counts[grid.patches] = [sum(patches[s : s + k]) for s, k in zip(starts, images, strict=True)]
    return counts


def cut(inputs: Mapping[str, Any], counts: Mapping[str, Sequence[int] | Tensor]) -> dict[str, Any]:
    """Return a batch whose entries named in ``counts`` are lists of one part a sample.

    Raises
    ------
    ValueError
        If an entry is missing, its rows are not as many as counted, or what is left disagrees in its number of samples.
    """
    batch = dict(inputs)
    for name, given in counts.items():
        each = [int(k) for k in given]
        rows = batch.get(name)
        if not isinstance(rows, Tensor) or len(rows) != sum(each):
            got = f"a tensor {tuple(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
            raise ValueError(f"ragged counts {sum(each)} rows of {name!r} in {len(each)} samples; the batch has {got}")
        batch[name] = [Part(x) for x in torch.split(rows, each)]
    sizes = {
        name: len(x)
        for name, x in batch.items()
        if isinstance(x, (Tensor, list)) and (not isinstance(x, Tensor) or x.ndim)
    }
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the entries of the batch disagree in the number of samples: {sizes}. If an entry has several rows a "
            "sample (patches, images), say how many: ragged=(inputs) -> {entry: counts (n,)}"
        )
    return batch


def joined(inputs: Any) -> dict[str, Any]:
    """Return a batch's entries, parts of its samples laid end to end again; those without any row are left out."""
    batch = {}
    for name, x in entries(inputs).items():
        if not (isinstance(x, list) and x and all(isinstance(part, Part) for part in x)):
            batch[name] = x
        elif any(len(part.rows) for part in x):
            batch[name] = torch.cat([part.rows for part in x])
    return laid_out(batch)
