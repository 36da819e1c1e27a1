"""Pool and target as one batch: only where no loss depends on the batch that its sample is in."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from ftw_torch import FilterThenWeight, PlanWarning
from ftw_torch.capture.mixing import Mixing
from plan_net import VOCABULARY, net, tokens
from torch import nn

pytestmark = pytest.mark.filterwarnings("ignore::ftw_torch.errors.BatchingWarning")  # said of such losses, rightly

IGNORED = -100


def masked(n, t=7, *, full=False):
    """Tokens, and labels of which the last few are left out, another number of them in each sample."""
    x = tokens(n, t)
    labels = x[:, 1:].clone()
    if not full:
        kept = torch.randint(2, t + 1, (n, 1))
        labels[torch.arange(t) >= kept] = IGNORED
    return {"x": x[:, :-1], "labels": labels}


def sums(model, batch):
    """Return each sample's sum over its labels, and their number."""
    logits, labels = model(batch["x"]), batch["labels"]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses.sum(1), (labels != IGNORED).sum(1)


def own(model, batch):
    total, counts = sums(model, batch)
    return total / counts


def by_mean_count(model, batch):
    total, counts = sums(model, batch)
    return total / counts.float().mean()


def by_count_in_python(model, batch):
    total, counts = sums(model, batch)
    return total / (sum(counts.tolist()) / len(counts))


def by_most(model, batch):
    total, counts = sums(model, batch)
    return total / counts.max(0).values


def by_length(model, batch):
    return own(model, batch) * math.log(1 + len(batch["x"]))


def by_contents(model, batch):
    total, counts = sums(model, batch)
    return total / (7 if (batch["labels"] == IGNORED).any() else counts)


def by_weights_of_all(model, batch):
    losses = own(model, batch)
    return losses * torch.softmax(losses.detach(), 0) * len(losses)


def by_ranks(model, batch):
    losses = own(model, batch)
    return losses * (1 + losses.detach().argsort().argsort())


class Hidden(torch.autograd.Function):
    """Divides by the mean count where no function of PyTorch is seen."""

    @staticmethod
    def forward(ctx, total, counts):
        ctx.save_for_backward(counts)
        return total / counts.double().mean()

    @staticmethod
    def backward(ctx, g):
        return g / ctx.saved_tensors[0].double().mean(), None


def by_hidden_mean(model, batch):
    return Hidden.apply(*sums(model, batch))


DEPENDENT = [
    by_mean_count,
    by_count_in_python,
    by_most,
    by_length,
    by_contents,
    by_weights_of_all,
    by_ranks,
    by_hidden_mean,
]


def rows_of(model, loss, batch):
    """Return each sample's gradient (n, p), of its loss in its own batch."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = []
    for i in range(len(batch["x"])):
        grads = torch.autograd.grad(loss(model, batch)[i], parameters, allow_unused=True)
        pairs = zip(parameters, grads, strict=True)
        found.append(torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in pairs]))
    return torch.stack(found)


def step(selector, pool, target):
    """Run a step of SGD's response; compare with gradients of the losses in their own batches."""
    model, loss = selector.model, selector.per_sample_loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    got = selector.backward(pool, target)
    rows, aim = rows_of(model, loss, pool), rows_of(model, loss, target).mean(0)
    torch.testing.assert_close(got.losses, loss(model, pool).detach())
    torch.testing.assert_close(got.target_loss, loss(model, target).detach().mean())
    torch.testing.assert_close(got.scores, rows @ aim, rtol=1e-10, atol=1e-12)
    update = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(update, got.weights @ rows[got.indices], rtol=1e-10, atol=1e-12)


def selector_of(model, loss, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return FilterThenWeight(model, optimizer, loss, **{"keep": 3, "guard": 0.0, "capture": "learned", **options})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("loss", DEPENDENT)
def test_losses_that_depend_on_their_batch(loss, late):
    """Exact in each step, also where the first steps do not show it: all samples have all labels."""
    model = net()
    selector = selector_of(model, loss)
    for i in range(7):
        full = late and i < 4  # the sixth use is no power of two: nothing is compared
        step(selector, masked(9, full=full), masked(4, full=full))
    assert selector.memory.learned.steps == 7
    assert selector.memory.learned.together.reason


def test_a_loss_of_ones_own_goes_together():
    selector = selector_of(net(), own)
    for n, m in ((9, 4), (9, 4), (8, 4), (9, 5)):
        step(selector, masked(n), masked(m))
    assert selector.memory.learned.steps == 4
    assert selector.memory.learned.together.reason is None


def test_a_last_pool_of_another_size_is_compared():
    """A loss that knows the usual pool by its length."""

    def loss(model, batch):
        return own(model, batch) * (1.0 if len(batch["x"]) in (4, 9, 13) else 2.0)

    selector = selector_of(net(), loss)
    for n in (9, 9, 9, 9, 9, 5):
        step(selector, masked(n), masked(4))
    assert selector.memory.learned.together.reason == "losses depend on the batch that a sample is in"


def test_a_loss_for_no_more_samples_than_usual():
    def loss(model, batch):
        if len(batch["x"]) > 9:
            raise ValueError("too many samples")
        return own(model, batch)

    selector = selector_of(net(), loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(selector, masked(9), masked(4))
    assert selector.memory.learned.steps == 3
    assert "too many samples" in selector.memory.learned.together.reason


def test_the_mode_of_batch_norm():
    """In evaluation samples are apart; in training the selector refuses the layer."""
    model = net()
    model.norm = nn.BatchNorm1d(8, affine=False).double()
    model.way = lambda m, h: m.norm(h.transpose(1, 2)).transpose(1, 2)
    selector = selector_of(model.eval(), own)
    for _ in range(3):
        step(selector, masked(9), masked(4))
    assert selector.memory.learned.steps == 3
    assert selector.memory.learned.together.reason is None
    model.train()
    with pytest.raises(ValueError, match="BatchNorm"):
        selector.backward(masked(9), masked(4))


def test_a_mode_in_which_the_loss_depends_on_its_batch():
    selector = selector_of(net().eval(), lambda m, b: (by_mean_count if m.training else own)(m, b))
    for _ in range(5):
        step(selector, masked(9), masked(4))
    assert selector.memory.learned.together.reason is None
    selector.model.train()
    for _ in range(4):
        step(selector, masked(9), masked(4))
    assert selector.memory.learned.together.reason


def test_a_plan_that_fails_says_so(monkeypatch):
    """Discovery makes the step, one warning says why, and no plan is made again."""
    from ftw_torch.step import learned

    def broken(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(learned, "hold", broken)
    selector = selector_of(net(), own)
    with pytest.warns(PlanWarning, match="out of luck"):
        step(selector, masked(9), masked(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(selector, masked(9), masked(4))
    assert selector.memory.learned.steps == 0


def test_what_discovery_raises_too_is_no_fault_of_the_plan():
    model, bad = net(), {"now": False}

    def loss(model, batch):
        if bad["now"]:
            raise KeyError("a column is missing")
        return own(model, batch)

    selector = selector_of(model, loss)
    step(selector, masked(9), masked(4))
    bad["now"] = True
    with pytest.raises(KeyError, match="a column is missing"):
        selector.backward(masked(9), masked(4))
    bad["now"] = False
    for _ in range(4):
        step(selector, masked(9), masked(4))
    assert selector.memory.learned.steps > 1


# ---------------------------------------------------------------------------------------------------------------------
# Functions in which samples meet


def test_transformers_keep_samples_apart():
    """With and without padding, whose mask transformers leaves out where it hides nothing."""
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **size
    )
    model = transformers.LlamaForCausalLM(config)
    for mask in (None, torch.ones(5, 6, dtype=torch.int64), torch.tensor([[0] * i + [1] * (6 - i) for i in range(5)])):
        batch = {"input_ids": torch.randint(0, VOCABULARY, (5, 6))} | ({} if mask is None else {"attention_mask": mask})
        mode = Mixing(batch.values(), 5)
        with mode:
            logits = model(**batch).logits[:, :-1]
            losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1)
        assert mode.met(losses) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(),
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x * (x > 0).sum(),
        lambda x: x / x.norm(),
        lambda x: x.cumsum(0),
        lambda x: x.flip(0),
        lambda x: (x @ x.T)[:, :3],
        lambda x: x.softmax(0),
        lambda x: torch.where(x.sum() > 0, x, -x),
        lambda x: x * float(x.sum()),
        lambda x: x * len(x[x > 0].tolist()),
        lambda x: x.T.reshape(5, 3),
        lambda x: x + x.roll(1, 0),
        lambda x: torch.einsum("ij,kj->ik", x, x)[:, :3],
        lambda x: torch.stack([x[i] for i in range(4, -1, -1)]),
    ],
)
def test_functions_in_which_samples_meet(function):
    x = torch.randn(5, 3)
    mode = Mixing([x], 5)
    with mode:
        losses = function(x).sum(1)
    assert mode.met(losses)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.reshape(-1).view(5, 3),
        lambda x: torch.cat([x, 2 * x], 1),
        lambda x: x * torch.arange(3) + torch.ones(()),
        lambda x: x.gather(1, x.argmax(1, keepdim=True)),
        lambda x: x.transpose(0, 1).softmax(0).T,
        lambda x: (x[:, :, None] @ x[:, None, :]).flatten(1),
        lambda x: torch.einsum("ij,ik->ijk", x, x).sum(2),
        lambda x: x.masked_fill(x > 0, 0.0)[:, 1:],
        lambda x: F.layer_norm(x, (3,)) if x.shape[0] > 2 else x,
    ],
)
def test_functions_that_keep_samples_apart(function):
    x = torch.randn(5, 3)
    mode = Mixing([x], 5)
    with mode:
        losses = function(x).sum(1)
    assert mode.met(losses) is None
