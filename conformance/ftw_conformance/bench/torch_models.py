"""Models of the PyTorch benchmark: GPT, Llama, an encoder, LoRA on the first two; random weights, no downloads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPT", "Encoder", "Llama", "LoRA", "add_lora", "class_loss", "lm_loss"]


class GPT(nn.Module):
    """Learned positions, LayerNorm, GELU, an untied head."""

    def __init__(self, vocabulary: int, d: int, layers: int, t: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.tokens = nn.Embedding(vocabulary, d)
        self.positions = nn.Embedding(t, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(d),
                    "qkv": nn.Linear(d, 3 * d),
                    "out": nn.Linear(d, d),
                    "norm2": nn.LayerNorm(d),
                    "up": nn.Linear(d, 4 * d),
                    "down": nn.Linear(4 * d, d),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, t, vocabulary) of tokens (n, t)."""
        n, t = x.shape
        h = self.tokens(x) + self.positions(torch.arange(t, device=x.device))  # (n, t, d)
        for module in self.blocks:
            b: Any = module
            q, k, v = b["qkv"](b["norm1"](h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # (n, heads, t, d/h)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            h = h + b["out"](a.transpose(1, 2).reshape(n, t, -1))
            h = h + b["down"](F.gelu(b["up"](b["norm2"](h))))
        out: Tensor = self.head(self.norm(h))
        return out


class Llama(nn.Module):
    """RMSNorm, rotary positions, grouped queries, SwiGLU, no biases, an untied head."""

    def __init__(self, vocabulary: int, d: int, layers: int, heads: int, groups: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, d // heads
        narrow = groups * self.size
        self.tokens = nn.Embedding(vocabulary, d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(d),
                    "q": nn.Linear(d, d, bias=False),
                    "k": nn.Linear(d, narrow, bias=False),
                    "v": nn.Linear(d, narrow, bias=False),
                    "out": nn.Linear(d, d, bias=False),
                    "norm2": nn.RMSNorm(d),
                    "gate": nn.Linear(d, hidden, bias=False),
                    "up": nn.Linear(d, hidden, bias=False),
                    "down": nn.Linear(hidden, d, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, t, vocabulary) of tokens (n, t)."""
        n, t = x.shape
        h = self.tokens(x)  # (n, t, d)
        half = torch.arange(0, self.size, 2, device=x.device) / self.size
        angle = torch.arange(t, device=x.device)[:, None] * 10000.0 ** -half[None, :]  # (t, size/2)
        turn = torch.cat([angle, angle], 1)  # (t, size)
        cos, sin = turn.cos().to(h.dtype), turn.sin().to(h.dtype)

        def rotate(y: Tensor) -> Tensor:  # (n, heads, t, size)
            a, b = y.chunk(2, -1)
            return y * cos + torch.cat([-b, a], -1) * sin

        for module in self.blocks:
            b: Any = module
            y = b["norm1"](h)
            q = rotate(b["q"](y).view(n, t, self.heads, self.size).transpose(1, 2))
            k = rotate(b["k"](y).view(n, t, self.groups, self.size).transpose(1, 2))
            v = b["v"](y).view(n, t, self.groups, self.size).transpose(1, 2)
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.groups)
            h = h + b["out"](a.transpose(1, 2).reshape(n, t, -1))
            y = b["norm2"](h)
            h = h + b["down"](F.silu(b["gate"](y)) * b["up"](y))
        out: Tensor = self.head(self.norm(h))
        return out


class Encoder(nn.Module):
    """BERT's order: learned positions, LayerNorm after each half of a block; the mean over tokens, and two classes."""

    def __init__(self, vocabulary: int, d: int, layers: int, t: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, d), nn.Embedding(t, d)
        self.norm = nn.LayerNorm(d)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "q": nn.Linear(d, d),
                    "k": nn.Linear(d, d),
                    "v": nn.Linear(d, d),
                    "out": nn.Linear(d, d),
                    "norm1": nn.LayerNorm(d),
                    "up": nn.Linear(d, hidden),
                    "down": nn.Linear(hidden, d),
                    "norm2": nn.LayerNorm(d),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(d, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (n, 2) of tokens (n, t)."""
        n, t = x.shape
        h = self.norm(self.tokens(x) + self.positions(torch.arange(t, device=x.device)))  # (n, t, d)
        for module in self.blocks:
            b: Any = module
            q, k, v = (b[name](h).view(n, t, self.heads, -1).transpose(1, 2) for name in "qkv")  # (n, heads, t, d/h)
            a = F.scaled_dot_product_attention(q, k, v)
            h = b["norm1"](h + b["out"](a.transpose(1, 2).reshape(n, t, -1)))
            h = b["norm2"](h + b["down"](F.gelu(b["up"](h))))
        out: Tensor = self.head(h.mean(1))
        return out


class LoRA(nn.Module):
    """A frozen linear layer with a trained update of low rank."""

    def __init__(self, base: nn.Linear, rank: int, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Linear(base.in_features, rank, bias=False)
        self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.b.weight, std=0.02)  # not zero: the benchmark starts after some training

    def forward(self, x: Tensor) -> Tensor:
        """Return ``base(x) + scale * b(a(x))``."""
        out: Tensor = self.base(x) + self.scale * self.b(self.a(x))
        return out


def add_lora(model: nn.Module, rank: int) -> nn.Module:
    """Freeze a model and give each linear layer of its blocks a trained update of low rank."""
    model.requires_grad_(False)
    for module in model.blocks:  # type: ignore[union-attr]
        for name, layer in list(module.items()):
            if isinstance(layer, nn.Linear):
                module[name] = LoRA(layer, rank)
    return model


def lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return each sequence's mean next-token loss (n,), for tokens (n, t + 1)."""
    logits = model(batch[:, :-1])  # (n, t, vocabulary)
    n, t, size = logits.shape
    losses = F.cross_entropy(logits.reshape(n * t, size), batch[:, 1:].reshape(-1), reduction="none")
    return losses.view(n, t).mean(1)


def class_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return each sequence's loss (n,) of the class that its last number says, for tokens (n, t + 1)."""
    return F.cross_entropy(model(batch[:, :-1]), batch[:, -1] % 2, reduction="none")
