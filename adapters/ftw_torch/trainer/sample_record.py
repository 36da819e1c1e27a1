"""What a trainer's record says about the samples of a pool: their names and, if asked for, their text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .documents import Documents
from .step import Ranks
from .target import row_keys

__all__ = ["about", "decoder"]

Decode = Callable[[Any], list[str]]


def about(pool: Any, decode: Decode | None, ranks: Ranks) -> dict[str, list[str]]:
    """Return columns over the pools of all processes: ``id``, the same wherever a sample comes up, and text."""
    own = {"id": [key[:12] for key in row_keys(pool)]}
    if decode is not None:
        own["text"] = decode(pool)
    every = [json.loads(text) for text in ranks.texts(json.dumps(own))]
    return {name: [x for one in every for x in one.get(name, ())] for name in own}


def decoder(tokenizer: Any) -> Decode:
    """Return what makes text of the samples of a batch."""
    if not hasattr(tokenizer, "decode"):
        raise ValueError("record_text needs processing_class=, a tokenizer that decodes; or leave the text out")

    def decode(batch: Any) -> list[str]:
        if isinstance(batch, Documents):
            rows = batch.rows(batch.tensors["input_ids"].cpu())
            return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if not isinstance(ids, Tensor):
            raise ValueError(f"record_text needs 'input_ids' in the batch, which has {sorted(batch)}")
        ids, mask = ids.cpu(), None if mask is None else mask.cpu().bool()
        rows = [row if mask is None else row[mask[i]] for i, row in enumerate(ids)]
        return [tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]

    return decode
