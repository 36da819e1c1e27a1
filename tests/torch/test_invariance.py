"""The check that batching leaves a sample's loss and gradient alone: what is warned of, once, and what is not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from ftw_torch import BatchingWarning, FilterThenWeight
from torch import nn

PAD = 0


class Reader(nn.Module):
    """One attention over tokens; parts of it may leak."""

    def __init__(self, *, masked=True, statistics=False, causal=False, positions="own"):
        super().__init__()
        self.tokens, self.places = nn.Embedding(12, 8), nn.Embedding(16, 8)
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 12)
        self.masked, self.statistics, self.causal, self.positions = masked, statistics, causal, positions

    def forward(self, input_ids, attention_mask):
        place = attention_mask.cumsum(1) - 1
        if self.positions == "absolute":
            place = torch.arange(input_ids.shape[1])[None]
        h = self.tokens(input_ids) + self.places(place.clamp_min(0))
        q, k, v = self.qkv(h)[:, None].chunk(3, -1)
        mask = attention_mask[:, None, None, :].bool()
        t = input_ids.shape[1]
        if self.causal:
            mask = mask & torch.ones(t, t, dtype=torch.bool).tril() | torch.eye(t, dtype=torch.bool)
        h = h + F.scaled_dot_product_attention(q, k, v, attn_mask=mask if self.masked else None)[:, 0]
        if self.statistics:
            with torch.no_grad():
                mean, variance = h.mean((0, 1)), h.var((0, 1))
            h = F.batch_norm(h.mT, mean, variance).mT
        return self.head(h)


def token_loss(model, batch):
    mask = batch["attention_mask"]
    logits = model(batch["input_ids"], mask)
    losses = F.cross_entropy(logits.mT, batch["labels"], reduction="none", ignore_index=-100)
    return losses.sum(1) / mask.sum(1)


def leaking_loss(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"])
    return F.cross_entropy(logits.mT, batch["labels"], reduction="none", ignore_index=-100).mean(1)


def padded(n, seed, *, left=False, t=7):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, t - 1, (n,), generator=g)
    mask = (torch.arange(t) < lengths[:, None]).long()
    ids = torch.randint(1, 12, (n, t), generator=g)
    mask = mask.flip(1) if left else mask
    labels = torch.randint(0, 12, (n, t), generator=g).masked_fill(mask == 0, -100)
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask, "labels": labels}


def warned(model, loss, pool, target, steps=2, **options):
    """Run some steps; return the warnings of the check."""
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), 0.1), loss, keep=3, guard=0, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            selector.select(pool, target)
    assert all(issubclass(w.category, BatchingWarning) for w in caught), [str(w.message) for w in caught]
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_a_correct_model_is_not_warned_of(dtype, left, causal):
    torch.manual_seed(0)
    model = Reader(causal=causal).to(dtype)
    assert not warned(model, token_loss, padded(6, 1, left=left), padded(4, 2, left=left))


@pytest.mark.parametrize(
    ("model", "loss", "left"),
    [
        ({"masked": False}, token_loss, False),
        ({"positions": "absolute"}, token_loss, True),
        ({}, leaking_loss, False),
    ],
    ids=["no mask", "positions count the padding", "the mean counts the padding"],
)
def test_padding_that_leaks(model, loss, left):
    torch.manual_seed(0)
    model = Reader(**model).double()
    target = padded(4, 2, left=left)
    (words,) = warned(model, loss, padded(6, 1, left=left), target)
    assert "target sample 0" in words
    assert "Padding leaks" in words
    whole = loss(model, {k: x[:2] for k, x in target.items()})[0]
    kept = target["attention_mask"][0].bool()
    short = loss(model, {k: x[:1, kept] for k, x in target.items()})[0]
    assert f"{float(((whole - short) / whole).abs().detach()):.2g}" in words


def test_statistics_of_the_batch_without_a_gradient():
    """They leave sums of gradients right, so that the audit has nothing to say."""
    torch.manual_seed(0)
    model = Reader(statistics=True).double().eval()
    target = padded(4, 2)
    (words,) = warned(model, token_loss, padded(6, 1), target)
    together, alone = (token_loss(model, {k: x[:n] for k, x in target.items()})[0] for n in (2, 1))
    assert f"differs by {float(((together - alone) / together).abs().detach()):.2g} (relative)" in words
    assert "batch norm" in words
    assert "Padding" not in words


class _Kernel(torch.autograd.Function):
    """The identity, with a backward that has an error in batches of two."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * (1.5 if len(g) == 2 else 1.0)


def test_a_backward_that_depends_on_the_batch():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()

    def loss(model, batch):
        return F.cross_entropy(_Kernel.apply(model(batch[0])), batch[1], reduction="none")

    g = torch.Generator().manual_seed(0)
    pool = torch.randn(6, 5, dtype=torch.float64, generator=g), torch.arange(6) % 3
    (words,) = warned(model, loss, pool, tuple(x[:4] for x in pool))
    assert "the gradient of target sample 0 differs by 0.33" in words


def test_the_pool_is_looked_at_too():
    torch.manual_seed(0)
    model, full = Reader(masked=False).double(), padded(4, 2)
    full["attention_mask"] = torch.ones_like(full["attention_mask"])
    full["labels"] = full["labels"].clamp_min(0)
    (words,) = warned(model, token_loss, padded(6, 1), full)
    assert "pool sample 0" in words


@pytest.mark.parametrize("kind", ["dropout", "calls", "length", "pairs"])
def test_models_that_cannot_be_compared_are_left_alone(kind):
    """Random masks, a state that moves, inputs of one length only, batches of two at least."""
    torch.manual_seed(0)
    calls = []

    class Model(Reader):
        def forward(self, input_ids, attention_mask):
            out = super().forward(input_ids, attention_mask)
            calls.append(1)
            if kind == "pairs" and len(input_ids) < 2:
                raise ValueError("two samples at least")
            if kind == "length" and input_ids.shape[1] != 7:
                raise RuntimeError("seven tokens")
            if kind == "dropout":
                return F.dropout(out, 0.5)
            return out * (1 + len(calls)) if kind == "calls" else out

    model = Model(masked=kind not in ("length", "pairs")).double()
    g = torch.optim.SGD(model.parameters(), 0.1)
    selector = FilterThenWeight(model, g, token_loss, keep=3, guard=0)
    pool, target = padded(6, 1), padded(4, 2)
    if kind == "calls":  # its gradients cannot be compared either: the check comes after the audit
        from ftw_torch.step.invariance import warn_of_batching

        warn_of_batching(lambda b, n, what: token_loss(model, b), dict(model.named_parameters()), pool, target)
        return
    state = torch.get_rng_state()
    selector.select(pool, target)
    if kind != "dropout":
        assert torch.equal(state, torch.get_rng_state())


def test_nothing_is_left_behind():
    model = Reader().double()
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_hook(lambda m, x, y: m.count.add_(1) and None)
    assert not warned(model, token_loss, padded(6, 1), padded(4, 2), steps=1)
    assert model.count == 2  # the two passes of the step itself
    assert all(p.grad is None for p in model.parameters())
