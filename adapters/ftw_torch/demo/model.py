"""The demo's model: a GPT over bytes, as small as one can be and still learn something."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ftw.demo.corpus import Sample

__all__ = ["GPT", "batch_of", "per_sample_loss"]

Batch = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention, then a perceptron, each on a normalised copy of its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (n, t, width)
        """Return the block's output (n, t, width)."""
        n, t, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, t, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, width))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """Next-byte model; the head is tied to the embedding.

    Parameters
    ----------
    length : int
        Positions, at most.
    width, heads, layers : int
        Size of the model: 35,712 parameters by default, with ``length=64``.
    """

    def __init__(self, length: int, width: int = 32, heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # (n, t) of int64
        """Return logits (n, t, 256)."""
        places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)  # (n, t)
        x = self.tokens(tokens) + self.positions(places)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def batch_of(samples: Sequence[Sample]) -> Batch:
    """Return what the model reads and what it should say next, each (n, t) of int64."""
    tokens = torch.stack([torch.frombuffer(bytearray(sample.text), dtype=torch.uint8) for sample in samples]).long()
    return tokens[:, :-1], tokens[:, 1:]


def per_sample_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return each sample's mean cross-entropy over its bytes (n,)."""
    tokens, following = batch
    return F.cross_entropy(model(tokens).transpose(1, 2), following, reduction="none").mean(1)
