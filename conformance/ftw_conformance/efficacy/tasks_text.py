"""Text of one kind to be learned from a stream of other kinds, by the demo's byte-level GPT (in torch).

The model is pretrained on some kinds of text; the target is another kind, which makes up 12 % of each pool; 20 % of a
pool have their bytes shuffled, 20 % are copies of three samples. Built in, the kinds are those of the demo, from
Python's own library. Where Debian's manual pages are installed in several languages, German is learned by a model that
knows English, French and Spanish. ``--pool`` and ``--target`` take a user's own files, as they are.
"""

from __future__ import annotations

import copy
import functools
import gzip
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ftw.demo import corpus as corpora
from ftw.demo.text_files import read_files
from ftw.gradients import Dense, OuterProduct, Record, Rows, Sum

from .learner import Adam, Array, Batches, Captured, Layer, Optimizer, Tree

__all__ = ["Text", "has_languages"]

LENGTH, TESTS, PRETRAINING = 33, 96, 400
MANUALS = Path("/usr/share/man")
LANGUAGES = {"German": "de", "English": "", "French": "fr", "Spanish": "es"}


@dataclass
class Text:
    """A scenario on text.

    Attributes
    ----------
    kind : str
        "library", "languages", or "files" with the paths in ``files``.
    rank : int
        Rank of LoRA's matrices beside the linear layers; 0 trains everything.
    """

    seed: int
    kind: str = "library"
    targets: int = 24
    rank: int = 0
    lr: float = 1e-3
    steps: int = 80
    size: int = 64
    keep: int = 4
    files: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())

    def __post_init__(self) -> None:
        corpus = corpus_of(self.kind, *self.files)
        shares = (0.0, 0.0, 0.0) if self.kind == "files" else (0.12, 0.20, 0.20)
        domain, shuffled, copied = shares
        self.stream = corpora.Stream(corpus, self.size, seed=self.seed, domain=domain, shuffled=shuffled, copied=copied)
        self.domain = None if self.kind == "files" else corpus.domain
        self.target = batch_of(self.stream.target(self.targets))
        self.targets = len(self.target[0])
        self.test = batch_of(random.Random(0).sample(corpus.test, min(TESTS, len(corpus.test))))

    def model(self) -> tuple[Network, Optimizer]:
        """Return a copy of the pretrained model, and its optimizer."""
        model = Network(pretrained(self.kind, *self.files), self.rank, self.seed, self.test)
        return model, Adam(model.params, self.lr)

    def batches(self, step: int) -> Batches:
        """Return the pool of a step, the target, and which samples are of the target's kind."""
        pool = self.stream.pool(step)
        good = None if self.domain is None else np.array([sample.source == self.domain for sample in pool])
        return Batches(batch_of(pool), self.target, good)

    def take(self, batch: Any, indices: Array) -> Any:
        """Return some samples of a batch."""
        return batch[0][indices], batch[1][indices]

    def layers(self) -> list[Layer]:
        """Return the model's matrices; of an embedding only the head that it is tied to multiplies."""
        net = self.model()[0].net
        shapes = [(p.shape, p.requires_grad) for name, p in net.named_parameters() if p.ndim == 2]
        return [Layer(LENGTH - 1, d_in, d_out, trained) for (d_out, d_in), trained in shapes]


def batch_of(samples: Sequence[corpora.Sample]) -> tuple[Array, Array]:
    """Return what the model reads and what it should say next, each (n, t) of int64."""
    tokens = np.stack([np.frombuffer(sample.text, dtype=np.uint8) for sample in samples]).astype(np.int64)
    return tokens[:, :-1], tokens[:, 1:]


class Network:
    """The demo's GPT, with its gradients captured as records; parameters and arrays share memory.

    For every layer the output and the input are kept by a forward hook; one backward to all outputs at once brings
    their gradients. That is `ftw_torch`'s capture for three kinds of layer; a test compares the two.
    """

    def __init__(self, start: Any, rank: int, seed: int, test: Any) -> None:
        import torch
        from torch import nn

        self.net = copy.deepcopy(start)
        if rank:
            generator = torch.Generator().manual_seed(seed)
            self.net.requires_grad_(False)
            for block in self.net.blocks:
                for name in ("qkv", "out", "up", "down"):
                    setattr(block, name, lora(getattr(block, name), rank, generator))
        self.tensors = {name: p for name, p in self.net.named_parameters() if p.requires_grad}
        self.params: Tree = {name: p.detach().numpy() for name, p in self.tensors.items()}
        names = {id(p): name for name, p in self.tensors.items()}
        self.layers = [
            (layer, {what: names[id(p)] for what, p in layer.named_parameters(recurse=False) if id(p) in names})
            for layer in self.net.modules()
            if isinstance(layer, (nn.Linear, nn.Embedding, nn.LayerNorm))
        ]
        self.layers = [(layer, trained) for layer, trained in self.layers if trained]
        self.test = test

    def losses(self, batch: Any) -> Array:
        """Return each sample's mean cross-entropy over its bytes (n,)."""
        import torch

        with torch.no_grad():
            return self._losses(batch).numpy()

    def test_loss(self) -> float:
        """Return the mean loss on the test set."""
        return float(self.losses(self.test).mean())

    def _losses(self, batch: Any) -> Any:
        import torch
        from ftw_torch.demo.model import per_sample_loss

        tokens, following = batch
        return per_sample_loss(self.net, (torch.from_numpy(tokens), torch.from_numpy(following)))

    def capture(self, batch: Any) -> Captured:
        """Return losses (n,) and gradients."""
        import torch

        with self._kept() as seen:
            losses = self._losses(batch)  # (n,)
            outputs = [output for _, _, _, output in seen]
            grads = torch.autograd.grad(losses.sum(), outputs)
        parts: dict[str, list[Record]] = {}
        for (layer, trained, x, _), dy in zip(seen, grads, strict=True):
            factors = x.numpy(), np.ascontiguousarray(dy.numpy())  # (n, t, d_in) or (n, t), (n, t, d_out)
            for what, name in trained.items():
                parts.setdefault(name, []).append(_record(layer, what, *factors))
        records = {name: found[0] if len(found) == 1 else Sum(tuple(found)) for name, found in parts.items()}
        return Captured(losses.detach().numpy(), {name: records[name] for name in self.params})

    @contextmanager
    def _kept(self) -> Iterator[list[tuple[Any, dict[str, str], Any, Any]]]:
        """Collect (layer, names of its parameters, input, output) during a forward pass."""
        seen: list[tuple[Any, dict[str, str], Any, Any]] = []

        def hook(trained: dict[str, str]) -> Callable[..., None]:
            return lambda layer, given, output: seen.append((layer, trained, given[0].detach(), output))

        handles = [layer.register_forward_hook(hook(trained)) for layer, trained in self.layers]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()


def _record(layer: Any, what: str, x: Array, dy: Array) -> Record:
    """Return the record of a layer's weight or bias from its input and its output's gradient."""
    from torch import nn

    if what == "bias":
        return Dense(dy.sum(axis=1))  # (n, d_out)
    if isinstance(layer, nn.Embedding):
        return Rows(np.broadcast_to(x, dy.shape[:2]), dy, layer.num_embeddings)
    if isinstance(layer, nn.LayerNorm):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + layer.eps)
        return Dense((dy * x).sum(axis=1))  # (n, d)
    return OuterProduct(x, dy)


def lora(linear: Any, rank: int, generator: Any) -> Any:
    """Return a linear layer plus a trained product of two thin ones (Hu et al. 2022)."""
    import torch
    from torch import nn

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = linear
            self.down = nn.Linear(linear.in_features, rank, bias=False)
            self.up = nn.Linear(rank, linear.out_features, bias=False)
            with torch.no_grad():
                self.down.weight.normal_(std=linear.in_features**-0.5, generator=generator)
                self.up.weight.zero_()

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.up(self.down(x))

    return Adapted()


# ---------------------------------------------------------------------------------------------------------------------
# The text, and the model that knows most of it


@functools.cache
def corpus_of(kind: str, pool: tuple[str, ...] = (), target: tuple[str, ...] = ()) -> corpora.Corpus:
    """Return the text of a kind: "library", "languages", or "files" with their paths."""
    if kind == "languages":
        texts = {name: manual(folder) for name, folder in LANGUAGES.items()}
        return corpora.load(LENGTH, domain={"German": texts.pop("German")}, rest=texts)
    if kind == "files":
        rest, domain = (read_files(paths, reserved=corpora.LABELS)[0] for paths in (pool, target))
        return corpora.load(LENGTH, rest=rest, domain=domain)
    return corpora.load(LENGTH)


def has_languages() -> bool:
    """Return whether there are manual pages in every language."""
    return all(len(_pages(folder)) >= 20 for folder in LANGUAGES.values())


def manual(folder: str) -> bytes:
    """Return manual pages of a language, at most a megabyte, without the lines that are markup."""
    text = b""
    for path in _pages(folder):
        with gzip.open(path) as file:
            lines = file.read().splitlines()
        text += b"\n".join(line for line in lines if line[:1] not in (b".", b"'")) + b"\n"
        if len(text) > 2**20:
            break
    return text


def _pages(folder: str) -> list[Path]:
    return sorted(path for path in (MANUALS / folder).glob("man[1-8]/*.gz") if path.is_file() and not path.is_symlink())


@functools.cache
def pretrained(kind: str, pool: tuple[str, ...] = (), target: tuple[str, ...] = ()) -> Any:
    """Return a model that knows the rest of the text."""
    import torch
    from ftw_torch.demo.model import GPT, per_sample_loss

    torch.set_num_threads(1)  # the matrices are small, and results do not depend on the machine's cores
    torch.manual_seed(0)
    rng = random.Random(0)
    model = GPT(LENGTH - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=PRETRAINING)
    samples = corpus_of(kind, pool, target).pretrain
    for _ in range(PRETRAINING):
        tokens, following = batch_of(rng.sample(samples, 32))
        loss = per_sample_loss(model, (torch.from_numpy(tokens), torch.from_numpy(following))).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return model
