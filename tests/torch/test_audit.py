"""The audit of a selector's first use: what passes, what is left to autograd, what is refused; and no trace of it."""

import contextlib
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_models as models
from ftw_torch import FilterThenWeight
from torch import nn


class Hidden(torch.autograd.Function):
    """A product that no torch function shows."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight.T, x.flatten(0, -2).T @ g.flatten(0, -2)


class Model(nn.Module):
    """A product of any kind between two layers."""

    def __init__(self, run):
        super().__init__()
        self.run = run
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.w = nn.Parameter(torch.randn(6, 6) / 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.last(self.run(self, self.first(x)))


def batch(n, dtype=torch.float64):
    return torch.randn(n, 5, dtype=dtype), torch.randint(0, 3, (n,))


def checked(model, pool, target, loss=models.classifier_loss, rtol=1e-10, **options):
    """Select, and compare scores and gradient with per-sample autograd; return what was warned of."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    selector = options.pop("selector", None) or FilterThenWeight(
        model, torch.optim.SGD(model.parameters(), lr=1.0), loss, **{"keep": 3, "guard": 0.0, **options}
    )
    for p in parameters:
        p.grad = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = selector.backward(pool, target)
    explicit, goal = (
        models.per_sample_gradients(model, loss, b, lambda b, i: {k: x[i : i + 1] for k, x in b.items()})
        if isinstance(b, dict)
        else models.per_sample_gradients(model, loss, b, lambda b, i: [x[i : i + 1] for x in b])
        for b in (pool, target)
    )
    rows, goal = (torch.cat([g.flatten(1) for g in e.values()], 1).double() for e in (explicit, goal))
    update = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]).double()
    for a, b in ((got.scores, rows @ goal.mean(0)), (update, got.weights.double() @ rows[got.indices])):
        assert float((a - b).norm()) <= rtol * float(b.norm())
    return " ".join(str(w.message) for w in caught)


@pytest.mark.parametrize(("outer", "inner"), [("float64", "float32"), ("float32", "bfloat16")])
def test_a_part_in_fewer_bits(outer, inner):
    """Transformers take norms and softmax in float32 whatever the model's dtype."""
    outer, inner = getattr(torch, outer), getattr(torch, inner)
    torch.manual_seed(0)
    model = Model(lambda m, h: F.softmax(h.to(inner) * 3, -1).to(h.dtype) @ m.w).to(outer)
    eps = torch.finfo(inner).eps
    assert not checked(model, batch(6, outer), batch(4, outer), rtol=30 * eps)


def test_buffers_are_put_back():
    torch.manual_seed(0)
    model = Model(lambda m, h: h @ m.w).double()
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=1.0), models.classifier_loss, keep=3)
    for calls in (2, 4):  # once for the target and once for the pool, with or without an audit
        selector.select(batch(6), batch(3))
        assert model.calls == calls


def test_nothing_is_written_on_buffers():
    def run(m, h):
        m.mean.mul_(0.9).add_(h.detach().mean((0, 1)))
        m.last_one[0] = h.detach()[0, 0]
        return h @ m.w

    model = Model(lambda m, h: run(m, h[:, None])[:, 0]).double()
    model.register_buffer("mean", torch.zeros(6).double())
    model.register_buffer("last_one", torch.zeros(1, 6).double())
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=1.0), models.classifier_loss, keep=3)
    selector.backward(batch(6), batch(3))
    with pytest.raises(FloatingPointError):
        selector.backward((torch.full((6, 5), torch.nan).double(), batch(6)[1]), batch(3))
    assert not any(vars(x) for x in model.buffers())


def test_a_state_that_every_forward_moves():
    """As spectral normalisation does in training mode; the two gradients that are compared must see the same one."""
    torch.manual_seed(0)
    model = Model(lambda m, h: h @ m.w * m.calls).double()
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=1.0), models.classifier_loss, keep=3)
    assert torch.isfinite(selector.backward(batch(6), batch(3)).weights).all()


@pytest.mark.parametrize(
    "run",
    [
        lambda m, h: Hidden.apply(h, m.w) + h @ m.w,
        lambda m, h: torch.vmap(lambda x: x @ m.w)(h),
        lambda m, h: torch.vmap(torch.func.grad(lambda x: (x @ m.w).square().sum()))(h),
    ],
    ids=["seen and unseen", "vmap", "grad"],
)
def test_what_capture_does_not_see(run):
    torch.manual_seed(0)
    assert "'w'" in checked(Model(run).double(), batch(6), batch(4))


def test_a_way_that_only_the_pool_takes():
    def loss(m, b):
        h = m.first(b["x"])
        return F.cross_entropy(m.last(Hidden.apply(h, m.w) if "more" in b else h), b["y"], reduction="none")

    torch.manual_seed(0)
    x, y = batch(6)
    target = dict(zip("xy", batch(4), strict=True))
    assert "'w'" in checked(Model(None).double(), {"x": x, "y": y, "more": torch.ones(6)}, target, loss)


@pytest.mark.parametrize("options", [{}, {"mode": "two_pass"}, {"mode": "two_pass", "micro_batch": 4}], ids=str)
@pytest.mark.parametrize("late", [False, True])
def test_hidden_where_the_audit_is_blind(options, late):
    """Behind a gate that starts at zero there is nothing to compare, on a way taken later neither."""

    def run(m, h):
        if late:
            return Hidden.apply(h, m.w) + h @ m.w if m.way else h
        return h + m.gate * (Hidden.apply(h, m.w) + h @ m.w)

    torch.manual_seed(0)
    model = Model(run).double()
    model.gate, model.way = nn.Parameter(torch.zeros(6).double()), False
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = FilterThenWeight(model, optimizer, models.classifier_loss, keep=3, guard=0.0, **options)
    said = [checked(model, batch(6), batch(4), selector=selector)]
    optimizer.step()
    model.way = True
    said += [checked(model, batch(6), batch(4), selector=selector) for _ in range(2)]
    assert ["'w'" in words for words in said] == [not late, late, False]


class Turned(torch.autograd.Function):
    """A transposition that no torch function shows."""

    @staticmethod
    def forward(ctx, x):
        return torch.from_numpy(x.detach().numpy().swapaxes(0, 1).copy())

    @staticmethod
    def backward(ctx, g):
        return g.transpose(0, 1)


def test_samples_in_an_unknown_place_behind_a_gate():
    """While a gradient has been zero, the audit comes back."""

    def run(m, h):
        h = h[:, None] * torch.linspace(0.5, 1, 6).double()[:, None]  # (n, 6 tokens, 6)
        return (h + m.gate * Turned.apply(Turned.apply(h) @ m.w)).mean(1)

    torch.manual_seed(0)
    model = Model(run).double()
    model.gate = nn.Parameter(torch.zeros(6).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = FilterThenWeight(model, optimizer, models.classifier_loss, keep=3, guard=0.0)
    said = []
    for _ in range(3):
        said.append(checked(model, batch(6), batch(3), selector=selector))
        optimizer.step()
    assert ["'w' (relative" in words for words in said] == [False, True, False]


@pytest.mark.parametrize(
    "share", [lambda x: x / len(x), lambda x: x / x.sum().detach()], ids=["of the samples", "of the tokens"]
)
def test_a_loss_that_is_a_share_of_its_batch(share):
    """All are scaled alike: the choice would be right, and the step N times too short."""
    model = Model(lambda m, h: h @ m.w).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = FilterThenWeight(model, optimizer, lambda m, b: share(models.classifier_loss(m, b)), keep=3)
    with pytest.raises(ValueError, match=r"target are shares of their batch.*leave each sample its own"):
        selector.select(batch(6), batch(4))


def test_a_parameter_that_thaws():
    torch.manual_seed(0)
    model = Model(lambda m, h: Hidden.apply(h, m.w)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = FilterThenWeight(model, optimizer, models.classifier_loss, keep=3, guard=0.0)
    model.w.requires_grad_(False)
    assert not checked(model, batch(6), batch(4), selector=selector)
    model.w.requires_grad_(True)
    assert "'w'" in checked(model, batch(6), batch(4), selector=selector)


@pytest.mark.parametrize("coupled", [False, True])
def test_under_dropout(coupled):
    """What is not seen is left to autograd; a loss that mixes samples is told from it all the same."""
    torch.manual_seed(0)
    model = Model(lambda m, h: F.dropout(Hidden.apply(h, m.w))).double()

    def loss(m, b):
        losses = models.classifier_loss(m, b)
        return losses.mean().expand(len(losses)) if coupled else losses

    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=1.0), loss, keep=3)
    refused = pytest.raises(RuntimeError, match="depend on other samples") if coupled else contextlib.nullcontext()
    with pytest.warns(UserWarning, match=r"'w'.*one backward pass a sample"), refused:
        selector.select(batch(6), batch(4))


def test_a_hook_that_changes_a_gradient():
    model = Model(lambda m, h: h @ m.w).double()
    model.w.register_hook(lambda g: 0 * g)
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=1.0), models.classifier_loss, keep=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "captured gradients")
        with pytest.raises(RuntimeError, match=r"'w'.*does a hook change a gradient"):
            selector.select(batch(6), batch(4))


def test_a_hook_that_comes_later():
    model = Model(lambda m, h: h @ m.w).double()
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters(), lr=1.0), models.classifier_loss, keep=3)
    selector.select(batch(6), batch(4))
    handle = model.w.register_hook(lambda g: 0 * g)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "captured gradients")
        with pytest.raises(RuntimeError, match=r"'w'.*does a hook change a gradient"):
            selector.select(batch(6), batch(4))
    handle.remove()
    selector.select(batch(6), batch(4))


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("form", ["shared", "spread"])
def test_gradients_that_cannot_be_added_to(form, micro_batch):
    """Of ``w + v`` both have one tensor for a gradient, of ``v.sum()`` it is one number all over."""

    def run(m, h):
        return h @ (m.w + m.v) if form == "shared" else h @ m.w * m.v.sum()

    torch.manual_seed(0)
    model = Model(run).double()
    model.v = nn.Parameter(torch.randn(6, 6).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"mode": "two_pass", "micro_batch": micro_batch, "guard": 0.0}
    selector = FilterThenWeight(model, optimizer, models.classifier_loss, keep=3, **options)
    pool, target = batch(6), batch(4)
    checked(model, pool, target, selector=selector)
    once = [p.grad.clone() for p in model.parameters()]
    selector.backward(pool, target)
    for p, g in zip(model.parameters(), once, strict=True):
        torch.testing.assert_close(p.grad, 2 * g)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_sparse_gradients_are_added_as_dense_ones(micro_batch):
    torch.manual_seed(0)
    pool, target = batch(6), batch(4)
    base = Model(None).double()
    grads = []
    for sparse in (False, True):
        model = copy.deepcopy(base)
        model.run = lambda m, h, sparse=sparse: F.embedding(h.detach().argmax(-1), m.w, sparse=sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        options = {"mode": "two_pass", "micro_batch": micro_batch, "guard": 0.0}
        FilterThenWeight(model, optimizer, models.classifier_loss, keep=3, **options).backward(pool, target)
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*grads)


def test_a_model_that_takes_no_more_samples_than_there_are():
    model = Model(lambda m, h: h @ m.w).double()

    def loss(m, b):
        assert len(b[1]) < 3
        return models.classifier_loss(m, b)

    checked(model, batch(2), batch(2), loss=loss, keep=2)


@pytest.mark.parametrize("own", [False, True], ids=["optimizer", "in place"])
def test_hooks_that_wait_for_the_gradient_are_run(own):
    """As by ``loss.backward()``: an optimizer that steps as soon as a gradient is there."""
    torch.manual_seed(0)
    one = Model(lambda m, h: h @ m.w).double()
    two = copy.deepcopy(one)
    pool, target = batch(6), batch(4)
    for model in (one, two):
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}
        if model is two:
            for p in model.parameters():
                step = (lambda p: p.sub_(p.grad, alpha=0.1)) if own else (lambda p, o=optimizers: o[p].step())
                p.register_post_accumulate_grad_hook(step)
        FilterThenWeight(model, tuple(optimizers.values()), models.classifier_loss, keep=3).backward(pool, target)
        if model is one:
            for optimizer in optimizers.values():
                optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_pool_of_bad_samples():
    """The remedy is not the one that is in use; a pool that is its own target cannot drop."""
    model = Model(lambda m, h: h @ m.w).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = FilterThenWeight(model, optimizer, models.classifier_loss, keep=3, on_nonfinite="drop")
    x, y = batch(6)
    with pytest.raises(FloatingPointError, match=r"sample 0, 1, 2, 3, 4, 5 is not finite$"):
        selector.select((x * torch.nan, y), batch(4))
    x[2] = torch.nan
    with pytest.raises(FloatingPointError, match="target sample 2 is not finite"):
        selector.select((x, y), None)
