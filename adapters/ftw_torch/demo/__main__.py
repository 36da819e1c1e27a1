"""See it work: ``python -m ftw_torch.demo``, the demo of ``ftw.demo.harness`` in PyTorch."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

import ftw
from ftw.demo import harness
from ftw.demo.corpus import Corpus, Sample
from ftw_torch import FilterThenWeight

from .model import GPT, batch_of, per_sample_loss

__all__ = ["main"]


class Learner:
    """A run from a copy of the pretrained model."""

    def __init__(self, start: GPT, method: str, keep: int, seed: int) -> None:
        self.model = copy.deepcopy(start)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.keep, self.rng = keep, random.Random(seed)
        self.selector: FilterThenWeight | None = None
        if method != harness.RANDOM:
            top_k: dict[str, Any] = {"filter": "top_k", "weight": "uniform", "guard": 0.0}
            options = top_k if method == harness.TOP_K else {}
            self.selector = FilterThenWeight(self.model, self.optimizer, per_sample_loss, keep=keep, **options)

    def choose(self, pool: Sequence[Sample], target: Sequence[Sample]) -> dict[str, Any]:
        """Fill ``.grad`` with the gradient of the samples the method picks."""
        self.optimizer.zero_grad()
        if self.selector is None:
            keep = self.keep
            indices = self.rng.sample(range(len(pool)), keep)
            loss = per_sample_loss(self.model, batch_of([pool[i] for i in indices])).mean()
            torch.autograd.backward(loss)
            return {"indices": indices, "weights": [1 / keep] * keep, "loss": loss.item(), "effective_size": keep}
        selection = self.selector.backward(batch_of(pool), batch_of(target))
        fields = {n: getattr(selection, n) for n in ("match", "effective_size", "shrinkage", "target_loss", "status")}
        indices, weights = selection.indices.tolist(), selection.weights.tolist()
        value = sum(w * selection.losses[i].item() for i, w in zip(indices, weights, strict=True))
        return {**fields, "indices": indices, "weights": weights, "scores": selection.scores.tolist(), "loss": value}

    def update(self) -> None:
        """Take the optimizer's step."""
        self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, samples: Sequence[Sample]) -> float:
        """Return the mean loss."""
        return per_sample_loss(self.model, batch_of(samples)).mean().item()


class Framework:
    """What PyTorch brings to the demo."""

    versions = f"torch {torch.__version__}, ftw {ftw.__version__}"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = GPT(harness.LENGTH - 1)

    def progress(self, **options: Any) -> Any:
        """Return a progress bar, silent where there is no terminal."""
        return tqdm(**options, disable=None)

    def write(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def pretrain(self, corpus: Corpus, steps: int) -> int:
        """Train the model that all runs start from; returns its number of parameters."""
        rng = random.Random(0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
        with tqdm(range(steps), desc="pretraining", unit="step", dynamic_ncols=True, disable=None) as bar:
            for _ in bar:
                loss = per_sample_loss(self.model, batch_of(rng.sample(corpus.pretrain, 32))).mean()
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
                bar.set_postfix(loss=f"{loss.item():.3f}")
        return sum(p.numel() for p in self.model.parameters())

    def learner(self, method: str, seed: int, *, keep: int, pool: int, target: int) -> Learner:
        """Return a new run from there."""
        del pool, target
        return Learner(self.model, method, keep, seed)


def main(given: Sequence[str] | None = None) -> int:
    """Run the demo, on one thread: the matrices are small, and results do not depend on the machine's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return harness.main(Framework(), given, "python -m ftw_torch.demo")
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    sys.exit(main())
