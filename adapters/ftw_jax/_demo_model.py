"""The demo's model: a GPT over bytes, as small as one can be and still learn something; its layers in a scan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ftw.demo.corpus import Sample

__all__ = ["batch_of", "initial", "loss"]

HEADS = 4


def initial(length: int, width: int = 48, layers: int = 2) -> dict[str, Any]:
    """Return parameters: 72,000 by default with ``length=64``. The head is tied to the embedding."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * 0.02, jnp.float32)

    def linear(fan_in: int, fan_out: int) -> dict[str, Any]:
        bound = 1 / math.sqrt(fan_in)
        bias = rng.uniform(-bound, bound, size=(layers, fan_out))
        return {"kernel": normal(layers, fan_in, fan_out), "bias": jnp.asarray(bias, jnp.float32)}

    def norm(*shape: int) -> dict[str, Any]:
        return {"scale": jnp.ones(shape, jnp.float32), "bias": jnp.zeros(shape, jnp.float32)}

    return {
        "tokens": normal(256, width),
        "positions": normal(length, width),
        "layers": {
            "norm1": norm(layers, width),
            "qkv": linear(width, 3 * width),
            "out": linear(width, width),
            "norm2": norm(layers, width),
            "up": linear(width, 4 * width),
            "down": linear(4 * width, width),
        },
        "norm": norm(width),
    }


def _linear(x: Any, p: Any) -> Any:
    return x @ p["kernel"] + p["bias"]


def _norm(x: Any, p: Any) -> Any:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def _block(x: Any, p: Any) -> tuple[Any, None]:
    """Attention, then a perceptron, each on a normalised copy of its input x (t, width)."""
    t, width = x.shape
    q, k, v = jnp.split(_linear(_norm(x, p["norm1"]), p["qkv"]), 3, axis=-1)
    q, k, v = (jnp.reshape(z, (t, HEADS, width // HEADS)) for z in (q, k, v))
    scores = jnp.einsum("shd,thd->hst", q, k) / math.sqrt(width // HEADS)  # (heads, t, t)
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf))
    x = x + _linear(jnp.reshape(jnp.einsum("hst,thd->shd", weights, v), (t, width)), p["out"])
    return x + _linear(jax.nn.gelu(_linear(_norm(x, p["norm2"]), p["up"])), p["down"]), None


def loss(params: Any, text: Any) -> Any:
    """Return the mean cross-entropy of one sample (length + 1,) over its bytes: each from those before."""
    tokens, following = text[:-1], text[1:]  # (t,), (t,)
    x = params["tokens"][tokens] + params["positions"][: tokens.shape[0]]  # (t, width)
    x, _ = jax.lax.scan(_block, x, params["layers"], unroll=True)
    logits = jax.nn.log_softmax(_norm(x, params["norm"]) @ params["tokens"].T)  # (t, 256)
    return -jnp.mean(jnp.take_along_axis(logits, following[:, None], axis=1))


def batch_of(samples: Sequence[Sample]) -> Any:
    """Return the samples' bytes (n, length + 1) as int32."""
    return np.stack([np.frombuffer(sample.text, np.uint8) for sample in samples]).astype(np.int32)
