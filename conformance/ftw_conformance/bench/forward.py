"""``python -m ftw_conformance bench forward``: how well two forward passes rank the candidates of a pool.

A small GPT learns sequences of four Markov chains for some steps; the target is of one of them. The scores by forward
passes are then compared with the exact ones of the same parameters in float32: Spearman's rank correlation, and the
share of the exact top eighth that is found. The model runs in float32, under bfloat16 autocast, and with parameters in
bfloat16; the step s is the selector's own, and powers of ten times it, which show how well it is chosen.
"""

from __future__ import annotations

import copy
import statistics
from contextlib import nullcontext
from typing import Any

import torch
from ftw_torch import FilterThenWeight
from torch import Tensor, nn

import ftw
from ftw.command_line import Parser

from .torch_models import GPT, lm_loss

__all__ = ["main"]

VOCABULARY, KINDS = 64, 4
DTYPES = ("float32", "autocast", "bfloat16")


class Chains:
    """Sequences of several Markov chains."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        logits = 4 * torch.randn(KINDS, VOCABULARY, VOCABULARY, generator=self.generator)
        self.next = logits.softmax(-1)  # (kinds, vocabulary, vocabulary)

    def sample(self, kinds: Tensor, t: int) -> Tensor:
        """Return a sequence (t + 1,) of each kind (n,): (n, t + 1)."""
        out = torch.randint(0, VOCABULARY, (len(kinds), 1), generator=self.generator)
        for _ in range(t):
            new = torch.multinomial(self.next[kinds, out[:, -1]], 1, generator=self.generator)  # (n, 1)
            out = torch.cat([out, new], 1)
        return out

    def mixed(self, n: int, t: int) -> Tensor:
        """Return sequences of all kinds (n, t + 1)."""
        return self.sample(torch.randint(0, KINDS, (n,), generator=self.generator), t)


def trained(steps: int, t: int, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Chains]:
    """Return a model after some steps."""
    torch.manual_seed(seed)
    chains, model = Chains(seed), GPT(VOCABULARY, 64, 4, t)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(lm_loss(model, chains.mixed(32, t)).mean())
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, optimizer, chains


def scores(model: nn.Module, optimizer: Any, pool: Tensor, target: Tensor, **options: Any) -> Tensor:
    """Return the scores (n,) in float64."""
    selector = FilterThenWeight(model, optimizer, lm_loss, keep=1, filter="top_k", weight="uniform", guard=0, **options)
    found: Tensor = selector.batches(pool, target, steps=1)[0].scores.double()
    return found


def in_dtype(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: str) -> tuple[nn.Module, Any, Any]:
    """Return the model in a dtype, its optimizer, and the context of its passes."""
    if dtype != "bfloat16":
        return model, optimizer, torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else nullcontext()
    narrow = copy.deepcopy(model).bfloat16()
    own = torch.optim.AdamW(narrow.parameters(), lr=3e-3)
    own.load_state_dict(optimizer.state_dict())
    return narrow, own, nullcontext()


def compare(found: Tensor, exact: Tensor) -> tuple[float, float]:
    """Return the rank correlation, and the share of the top eighth that is found."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (found, exact)])  # (2, n)
    best = [set(x.topk(len(x) // 8).indices.tolist()) for x in (found, exact)]
    return float(torch.corrcoef(ranks)[0, 1]), len(best[0] & best[1]) / len(best[1])


def own_step(model: nn.Module, optimizer: Any, target: Tensor, eps: float) -> float:
    """Return the selector's own s."""
    from ftw_torch import geometry

    parameters = dict(model.named_parameters())
    losses = lm_loss(model, target)
    g = dict(zip(parameters, torch.autograd.grad(losses.mean(), list(parameters.values())), strict=True))
    p: Any = geometry(optimizer, parameters, g)
    decrease = sum(float((g[name] * p[name].apply(g[name])).sum()) for name in g)
    return float(ftw.forward_step(losses.detach(), decrease, eps))


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m ftw_conformance bench forward", description=__doc__)
    parser.add_argument("--steps", type=int, default=100, help="steps of training before the comparison")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pool", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for seed in range(options.seeds):
        model, optimizer, chains = trained(options.steps, options.tokens, seed)
        pool = chains.mixed(options.pool, options.tokens)
        target = chains.sample(torch.zeros(16, dtype=torch.int64), options.tokens)
        exact = scores(model, optimizer, pool, target)
        for dtype in DTYPES:
            narrow, own, context = in_dtype(model, optimizer, dtype)
            eps = torch.finfo(torch.float32 if dtype == "float32" else torch.bfloat16).eps
            step = own_step(model, optimizer, target, eps)
            for factor in ("0.1", "own", "10"):
                given = {} if factor == "own" else {"score_step": step * float(factor)}
                with context:
                    found = scores(narrow, own, pool, target, score="forward", **given)
                rows.setdefault((dtype, factor), []).append(compare(found, exact))
    print(f"after {options.steps} steps, N={options.pool}, T={options.tokens}, {options.seeds} seeds: worst and median")
    print(f"{'dtype':10} {'step s':>7} {'rank correlation':>18} {'top eighth found':>18} {'asked':>6}")
    good = True
    for (dtype, factor), found_in in rows.items():
        ranks, shares = ([x[i] for x in found_in] for i in (0, 1))
        asked = 0.95 if dtype == "float32" else 0.85
        good = good and (factor != "own" or min(ranks) >= asked)
        print(f"{dtype:10} {factor:>7} {min(ranks):9.4f} {statistics.median(ranks):8.4f} "
              f"{min(shares):9.2f} {statistics.median(shares):8.2f} {asked if factor == 'own' else '':>6}")  # fmt: skip
    return 0 if good else 1
