"""See it work: ``python -m ftw_jax.demo``, the demo of ``ftw_torch`` in JAX, on the same data and with the same table.

Each step is one compiled function: the selection, the gradient and the optimizer's update together.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

import ftw
import ftw_jax
from ftw.demo import harness
from ftw.demo.corpus import Corpus, Sample

from ._demo_model import batch_of, initial, loss

__all__ = ["main"]

OPTIMIZER = optax.adamw(1e-3, weight_decay=1e-2)


PIECE = 8  # samples at a time: they fit a processor's cache


def mean_loss(params: Any, batch: Any) -> Any:
    """Return the mean loss over a batch (n, length + 1)."""
    return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, batch))


def by_pieces(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the function of parameters and a batch, which is a mean over samples, piece by piece."""

    def in_pieces(params: Any, batch: Any) -> Any:
        pieces = jnp.reshape(batch, (-1, math.gcd(batch.shape[0], PIECE), batch.shape[1]))  # (pieces, size, length + 1)
        means = jax.lax.map(lambda piece: function(params, piece), pieces)
        return jax.tree.map(lambda x: jnp.mean(x, axis=0), means)

    return jax.jit(in_pieces)


evaluate = by_pieces(mean_loss)
gradient = by_pieces(jax.value_and_grad(mean_loss))


@cache
def chooser(method: str, keep: int, pool: int, target: int) -> Callable[..., Any]:
    """Return the compiled ``(params, opt_state, pool, target) -> (grads, selection)`` of a method."""
    options: dict[str, Any] = {"filter": "top_k", "weight": "uniform", "guard": 0.0} if method == harness.TOP_K else {}
    select = jax.jit(ftw_jax.filter_then_weight(loss, OPTIMIZER, keep=keep, micro_batch=PIECE, **options))
    params = initial(harness.LENGTH - 1)
    batches = (np.zeros((size, harness.LENGTH), np.int32) for size in (pool, target))
    compiled: Callable[..., Any] = select.lower(params, OPTIMIZER.init(params), *batches).compile()
    return compiled


@jax.jit
def apply(params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
    """Return the parameters and the state after the optimizer's step."""
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


class Learner:
    """A run from the pretrained parameters."""

    def __init__(self, params: Any, select: Callable[..., Any] | None, keep: int, seed: int) -> None:
        self.params, self.opt_state, self.grads = params, OPTIMIZER.init(params), params
        self.select, self.keep, self.rng = select, keep, random.Random(seed)

    def choose(self, pool: Sequence[Sample], target: Sequence[Sample]) -> dict[str, Any]:
        """Compute the gradient of the samples the method picks."""
        samples, keep = batch_of(pool), self.keep
        if self.select is None:
            indices = self.rng.sample(range(len(pool)), keep)
            value, self.grads = gradient(self.params, samples[indices])
            weights = [1 / keep] * keep
            return {"indices": indices, "weights": weights, "loss": float(value), "effective_size": keep}
        self.grads, selection = self.select(self.params, self.opt_state, samples, batch_of(target))
        selection = jax.device_get(selection)
        fields = {n: float(getattr(selection, n)) for n in ("match", "effective_size", "shrinkage", "target_loss")}
        return {
            **fields,
            "status": int(selection.status),
            "indices": selection.indices.tolist(),
            "weights": selection.weights.tolist(),
            "scores": selection.scores.tolist(),
            "loss": float(np.sum(selection.weights * selection.losses[selection.indices])),
        }

    def update(self) -> None:
        """Take the optimizer's step."""
        self.params, self.opt_state = apply(self.params, self.opt_state, self.grads)

    def evaluate(self, samples: Sequence[Sample]) -> float:
        """Return the mean loss."""
        return float(evaluate(self.params, batch_of(samples)))


class Framework:
    """What JAX brings to the demo."""

    versions = f"jax {jax.__version__}, optax {optax.__version__}, ftw {ftw.__version__}"

    def __init__(self) -> None:
        self.params: Any = initial(harness.LENGTH - 1)

    def progress(self, **options: Any) -> Any:
        """Return a progress bar, silent where there is no terminal."""
        return tqdm(**options, disable=None)

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def pretrain(self, corpus: Corpus, steps: int) -> int:
        """Train the model that all runs start from; returns its number of parameters."""
        schedule = optax.cosine_onecycle_schedule(steps, 3e-3, pct_start=0.3, div_factor=25, final_div_factor=1e4)
        optimizer = optax.adamw(schedule, weight_decay=1e-2)

        @jax.jit
        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
            value, grads = gradient(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        rng, state = random.Random(0), optimizer.init(self.params)
        with tqdm(range(steps), desc="pretraining", unit="step", dynamic_ncols=True, disable=None) as bar:
            for _ in bar:
                batch = batch_of(rng.sample(corpus.pretrain, 32))
                self.params, state, value = step(self.params, state, batch)
                bar.set_postfix(loss=f"{float(value):.3f}")
        return sum(p.size for p in jax.tree.leaves(self.params))

    def learner(self, method: str, seed: int, *, keep: int, pool: int, target: int) -> Learner:
        """Return a new run from there, its selection compiled for batches of these sizes."""
        select = None if method == harness.RANDOM else chooser(method, keep, pool, target)
        return Learner(self.params, select, keep, seed)


def main(given: Sequence[str] | None = None) -> int:
    """Run the demo."""
    return harness.main(Framework(), given, "python -m ftw_jax.demo")


if __name__ == "__main__":
    sys.exit(main())
