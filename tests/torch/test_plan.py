"""The learned plan: exact where it is used, and any step that is not as it was learned goes by discovery at once."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_models as models
from ftw_torch import FilterThenWeight, batches
from ftw_torch.records import stacks
from plan_net import net, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

import ftw


def make(model, optimizer=None, loss=models.lm_loss, **options):
    optimizer = optimizer or torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    return FilterThenWeight(model, optimizer, loss, **{"keep": 3, "guard": 0.0, "capture": "learned", **options})


def one(batch, i):
    return batches.take(batch, torch.tensor([i]))


def exact(selector, pool, target, tol=1e-10):
    """Run a step; compare scores and what is added to ``.grad`` with per-sample autograd in the response of SGD."""
    model, loss = selector.model, selector.per_sample_loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = selector.backward(pool, target)
    update = torch.cat([(p.grad - 1).flatten() for p in parameters])
    rows, aim = (
        torch.cat([g.flatten(1) for g in models.per_sample_gradients(model, loss, b, one).values()], 1)
        for b in (pool, target)
    )
    for ours, theirs in ((got.scores, rows @ aim.mean(0)), (update, got.weights @ rows[got.indices])):
        assert float((ours - theirs).norm()) <= tol * float(theirs.norm())
    return got


def steps(selector):
    return selector.memory.learned.steps


# ---------------------------------------------------------------------------------------------------------------------
# Exactness


def adamw(model):
    """AdamW that has made a step, with two groups."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:], "lr": 3e-3}], lr=1e-2)
    for p in parameters:
        p.grad = torch.randn_like(p) * 1e-2
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def both(model):
    parameters = list(model.parameters())
    return [torch.optim.SGD(parameters[:4], lr=0.1), torch.optim.AdamW(parameters[4:], lr=1e-2)]


WAYS = [
    {"filter": "top_k", "weight": "uniform"},
    {"filter": "top_k"},
    {},
    {"filter": "greedy_utility", "shortlist": None},
    {"guard": 0.3},
    {"filter": "top_k", "weight": "uniform", "guard": 0.3},
]


@pytest.mark.parametrize("lengths", [(7, 7), (7, 5), (3, 3), (13, 13)], ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("optimizer", [adamw, both])
@pytest.mark.parametrize("tied", [False, True])
def test_both_routes_agree(optimizer, way, lengths, tied):
    """Selection and update, where pool and target go through the model together and where they cannot."""
    model = net(tied=tied)
    optimizer = optimizer(model)
    found = []
    for capture in ("learned", "discover"):
        selector = make(model, optimizer, **way, capture=capture)
        torch.manual_seed(1)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        for _ in range(3):
            got = selector.backward(tokens(10, lengths[0]), tokens(4, lengths[1]))
        found.append((got, torch.cat([p.grad.flatten() for p in model.parameters()]), steps(selector)))
    (ours, update, planned), (theirs, expected, none) = found
    assert (planned, none) == (3, 0)
    assert ours.indices.tolist() == theirs.indices.tolist()
    for name in ("weights", "scores", "match", "predicted_decrease", "shrinkage", "effective_size", "losses"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(update, expected, rtol=1e-10, atol=1e-12)


def test_a_share_of_the_target_goes_by_discovery():
    model, pool, target = net(), tokens(8), tokens(4)
    selector = make(model, train_on_target=0.3)
    selection = selector.backward(pool, target)
    weighted = (models.lm_loss(model, pool[selection.indices]) * selection.weights).sum()
    blended = 0.7 * weighted + 0.3 * models.lm_loss(model, target).mean()
    named = dict(model.named_parameters())
    for (name, p), g in zip(
        named.items(), torch.autograd.grad(blended, list(named.values()), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-12, msg=name)
    assert steps(selector) == 0


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("t", [1, 7])
def test_exact_against_autograd(t, tied, norm):
    selector = make(net(tied=tied, norm=norm))
    for m in (1, 4):
        exact(selector, tokens(9, t), tokens(m, t))
    assert steps(selector) == 2


@pytest.mark.parametrize("options", [{}, {"guard": 0.3}, {"filter": "top_k", "weight": "uniform"}], ids=str)
def test_losses_of_a_coarser_dtype(options):
    """As where a model in float64 takes its losses in float32: what is made of gradients stays float64."""
    selector = make(net(), loss=lambda m, x: models.lm_loss(m, x).float(), **options)
    for _ in range(3):
        exact(selector, tokens(9), tokens(4))
    assert steps(selector) == 3


def test_rows_of_numbers():
    """Inputs without a token axis, and classes beside them."""
    torch.manual_seed(0)
    model = models.mlp().double()
    selector = make(model, loss=models.classifier_loss)
    draw = lambda n: (torch.randn(n, 5).double(), torch.randint(0, 3, (n,)))  # noqa: E731
    for _ in range(3):
        exact(selector, draw(9), draw(4))
    assert steps(selector) == 3


def test_conv1d_of_transformers():
    layers = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = net()
    model.more = nn.ModuleList(layers.Conv1D(8, 8).double() for _ in range(3))
    selector = make(model)
    exact(selector, tokens(9), tokens(4))
    assert steps(selector) == 1


def positions_of(shape):
    """Return a way through the net that adds positions, numbers (t,) or (1, t)."""

    def way(m, h):
        t = h.shape[1]
        return h + m.places(torch.arange(t).reshape((1, t) if shape == 2 else (t,)))

    return way


@pytest.mark.parametrize("shape", [1, 2])
def test_positions_that_all_samples_share(shape):
    """As many positions as samples too, of the pass or of the few that are compared; t = 3 is left to discovery."""
    model = net()
    model.places = nn.Embedding(16, 8).double()
    model.way = positions_of(shape)
    selector = make(model)
    for t in (7, 9, 13, 4, 12, 3, 1, 7):
        exact(selector, tokens(9, t), tokens(4, t))
        if t == 12:
            assert steps(selector) == 5


def test_positions_first_seen_as_many_as_samples():
    model = net()
    model.places = nn.Embedding(16, 8).double()
    model.way = positions_of(1)
    selector = make(model)
    for t, length in ((13, 13), (9, 9), (4, 9), (9, 4)):
        exact(selector, tokens(9, t), tokens(4, length))
    assert steps(selector) == 4


def test_positions_that_cannot_be_given_to_each_sample():
    def way(m, h):
        places = m.places(torch.arange(h.shape[1]))
        return h + places.view(h.shape[1], 8)

    model = net()
    model.places = nn.Embedding(16, 8).double()
    model.way = way
    selector = make(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact(selector, tokens(9), tokens(4))
    assert "positions" in selector.memory.learned.reason


def test_the_pool_as_its_own_target():
    model = net()
    found = []
    for capture in ("learned", "discover"):
        selector = make(model, capture=capture)
        torch.manual_seed(1)
        found.append(selector.select(tokens(9), None))
        assert steps(selector) == (capture == "learned")
    assert found[0].indices.tolist() == found[1].indices.tolist()
    torch.testing.assert_close(found[0].weights, found[1].weights, rtol=1e-10, atol=1e-12)


def test_float32():
    model = net(torch.float32)
    found = []
    for capture in ("learned", "discover"):
        torch.manual_seed(1)
        found.append(
            make(model, adamw(copy.deepcopy(model).float()) and None, capture=capture).select(tokens(9), tokens(4))
        )
    torch.testing.assert_close(
        found[0].scores, found[1].scores, rtol=1e-5, atol=1e-5 * float(found[1].scores.abs().max())
    )


def test_what_the_pool_alone_uses_and_what_nothing_uses():
    """A layer behind a branch of the batch, and one that the losses do not reach."""

    def loss(model, batch):
        model.way = (lambda m, h: m.spare(h) + 0 * h) if "more" in batch else None
        model.spare(torch.zeros(len(batch["x"]), 8).double())  # fires, and is not used
        return models.lm_loss(model, batch["x"])

    selector = make(net(), loss=loss)
    for _ in range(3):
        exact(selector, {"x": tokens(9), "more": torch.ones(9)}, {"x": tokens(4)})
    assert steps(selector) == 3


def test_a_module_called_several_times():
    model = net()
    model.way = lambda m, h: m.more[0](torch.tanh(m.more[1](h)))
    selector = make(model)
    for _ in range(2):
        exact(selector, tokens(9), tokens(4))
    assert steps(selector) == 2


def test_bad_samples_are_dropped_and_named():
    torch.manual_seed(0)
    model = models.mlp().double()
    x, y = torch.randn(9, 5).double(), torch.randint(0, 3, (9,))
    target = torch.randn(4, 5).double(), torch.randint(0, 3, (4,))
    selector = make(model, loss=models.classifier_loss, on_nonfinite="drop")
    exact(selector, (x, y), target)
    x[3] = torch.nan
    got = selector.backward((x, y), target)
    assert steps(selector) == 2
    assert 3 not in got.indices.tolist()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    with pytest.raises(FloatingPointError, match="pool sample 3"):
        make(model, loss=models.classifier_loss).backward((x, y), target)
    target[0][1] = torch.inf
    with pytest.raises(FloatingPointError, match="target sample 1"):
        selector.backward((x, y), target)


def test_nothing_is_left_on_the_model():
    model = net()
    before = {path: dict(vars(m)) for path, m in model.named_modules()}
    make(model).backward(tokens(9), tokens(4))
    for path, m in model.named_modules():
        assert vars(m).keys() == before[path].keys()
        assert not m._forward_hooks
    assert not torch.nn.modules.module._global_forward_hooks


def test_large_layers_keep_their_route(monkeypatch):
    """Where arithmetic leads, layers are captured one at a time; the pass is not tried again for larger pools."""
    monkeypatch.setattr(stacks, "CALLS", 0)
    selector = make(net())
    for _ in range(2):
        exact(selector, tokens(9), tokens(4))
    assert steps(selector) == 0
    assert selector.memory.learned.plan is not None


# ---------------------------------------------------------------------------------------------------------------------
# Steps that are not as they were learned


def hidden_use(m, h):
    return h + F.linear(h, m.up.weight[:8])


def raw_use(m, h):
    return h * m.first.weight


def penalty(m, h):
    (g,) = torch.autograd.grad(m.spare(h).square().sum(), h, create_graph=True)
    return h + g.tanh()


def cast_use(m, h):
    with torch.autocast("cpu", torch.bfloat16):
        a = m.spare(h)
        b = F.linear(h, m.spare.weight)
    return h + (a + b).float()


class Other(nn.Module):
    """A layer of no known kind."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8).double())

    def forward(self, h):
        return torch.tanh(h @ self.weight)


def unfreeze(m):
    m.spare.requires_grad_(True)
    m.way = lambda m, h: m.spare(h)


def own_forward(m):
    m.up.forward = lambda x: F.linear(x, 2 * m.up.weight, m.up.bias)


def hook_with_a_parameter(m):
    m.up.register_forward_hook(lambda layer, args, out: out * m.down.weight.sum())


def halved_by_a_hook(m):
    m.up.register_full_backward_hook(lambda layer, before, after: None)


def replaced(m):
    m.up.weight = nn.Parameter(torch.randn_like(m.up.weight))


def another_module(m):
    m.more.append(nn.Linear(8, 8).double())


def late_raw_parameter(m):
    m.scale = nn.Parameter(torch.ones(8).double())
    m.way = lambda m, h: h * m.scale


def set_way(way):
    def change(m):
        m.way = way

    return change


def checkpointed(m):
    m.way = lambda m, h: checkpoint(m.spare, h, use_reentrant=False)


def functional(m, h):
    other = {"weight": m.up.weight[:8] * 2, "bias": m.spare.bias}
    return torch.func.functional_call(m.spare, other, (h,))


CHANGES = {
    "a function of a parameter": set_way(hidden_use),
    "a gain used twice": set_way(raw_use),
    "a gradient penalty": set_way(penalty),
    "an unknown layer": lambda m: setattr(m, "more", nn.ModuleList([Other()])),
    "unfrozen": unfreeze,
    "frozen": lambda m: m.up.requires_grad_(False),
    "a forward of its own": own_forward,
    "a hook that uses a parameter": hook_with_a_parameter,
    "a hook of the backward": halved_by_a_hook,
    "a parameter replaced": replaced,
    "a tied parameter": lambda m: setattr(m.head, "weight", m.words.weight),
    "another module": another_module,
    "a raw parameter": late_raw_parameter,
    "another branch": set_way(lambda m, h: m.spare(h)),
    "a module twice": set_way(lambda m, h: m.more[0](h)),
    "evaluation": lambda m: m.eval(),
    "padding": lambda m: setattr(m.words, "padding_idx", 2),
    "called with a keyword": set_way(lambda m, h: m.more[0](input=h)),
    "tokens first": set_way(lambda m, h: m.more[0](h.transpose(0, 1)).transpose(0, 1)),
    "other parameters for a module": set_way(functional),
    "a checkpoint": checkpointed,
    "its forward called": set_way(lambda m, h: m.more[0].forward(h)),
    "all samples at once": set_way(lambda m, h: h + m.spare(torch.ones(1, 8).double())),
    "a use inside vmap": set_way(lambda m, h: torch.vmap(m.spare)(h)),
}


@pytest.mark.parametrize("when", [0, 4])  # the fifth use is no power of two: no comparison with autograd
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed_in_its_step(change, when):
    """Before the first step and after four planned ones; pool and target see it, and are exact in that same step."""
    model = net()
    if change == "unfrozen":
        model.spare.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    selector = make(model, optimizer)
    for _ in range(when):
        exact(selector, tokens(9), tokens(4))
    assert steps(selector) == when
    known = {id(p) for p in model.parameters()}
    CHANGES[change](model)
    fresh = [p for p in model.parameters() if id(p) not in known]
    if fresh:
        optimizer.add_param_group({"params": fresh})
    for _ in range(3):
        exact(selector, tokens(9), tokens(4))


def test_a_branch_that_only_the_pool_takes():
    """Learned without it: the step in which the pool first takes it is exact, and so are those after."""

    def loss(model, batch):
        model.way = hidden_use if batch["more"].any() else None
        return models.lm_loss(model, batch["x"])

    def draw(n, more):
        return {"x": tokens(n), "more": torch.full((n,), more)}

    selector = make(net(), loss=loss)
    for _ in range(3):
        exact(selector, draw(9, False), draw(4, False))
    assert steps(selector) == 3
    for _ in range(2):
        exact(selector, draw(9, True), draw(9, True))
    assert steps(selector) == 3


@pytest.mark.parametrize("change", ["hidden_use", "spare"])
def test_a_branch_by_content(change):
    """The batch decides; a branch that calls another module is compared with autograd before it is trusted."""
    way = hidden_use if change == "hidden_use" else (lambda m, h: m.spare(h))

    def loss(model, batch):
        model.way = way if bool((batch[:, 0] == 1).all()) else None
        return models.lm_loss(model, batch)

    def draw(n, first):
        batch = tokens(n)
        batch[:, 0] = first
        return batch

    selector = make(net(), loss=loss)
    for first in (2, 2, 2, 1, 1, 2):
        exact(selector, draw(9, first), draw(4, first))
    assert steps(selector) == (6 if change == "spare" else 3)


def test_a_buffer_that_the_forward_changes():
    """One forward in place of two would show in it."""

    def count(m, h):
        m.calls += 1
        return h

    model = net()
    model.way = count
    selector = make(model)
    for calls in (2, 4):
        selector.select(tokens(9), tokens(4))
        assert model.calls == calls
    assert steps(selector) == 0


def test_an_input_changed_in_place_after_its_use():
    def change(m, h):
        y = h * 1.0
        out = m.spare(y)
        y.data.add_(0.0)  # no version: allowed
        y.mul_(2.0)
        return out + h

    selector = make(net())
    exact(selector, tokens(9), tokens(4))
    selector.model.way = change
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        selector.backward(tokens(9), tokens(4))


def test_autocast_goes_by_discovery():
    model = net(torch.float32)
    selector = make(model)
    selector.select(tokens(9), tokens(4))
    with torch.autocast("cpu", torch.bfloat16):
        selector.select(tokens(9), tokens(4))
    assert steps(selector) == 1


def test_a_weight_cast_once_by_autocast_is_not_used_elsewhere():
    model = net(torch.float32)
    model.way = cast_use
    selector = make(model)
    selector.select(tokens(9), tokens(4))
    assert steps(selector) == 0
    assert "inside" in selector.memory.learned.reason


def test_hooks_of_parameters_go_by_discovery():
    model = net()
    selector = make(model)
    exact(selector, tokens(9), tokens(4))
    model.up.weight.register_hook(lambda g: None)
    exact(selector, tokens(9), tokens(4))
    assert steps(selector) == 1


def test_random_numbers_of_a_step_that_goes_back():
    """Discovery draws the masks that it would have drawn alone."""
    found = []
    for capture in ("learned", "discover"):
        model = net()
        model.dropout.p = 0.3
        model.way = hidden_use
        selector = make(model, capture=capture)
        selector.select(tokens(9), tokens(4))
        torch.manual_seed(3)
        found.append(selector.backward(tokens(9), tokens(4)).scores)
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_the_masks_are_those_of_discovery():
    """With dropout, target and pool go through the model one after the other, as by discovery."""
    found = []
    for capture in ("learned", "discover"):
        model = net()
        model.dropout.p = 0.4
        selector = make(model, capture=capture)
        selector.select(tokens(9), tokens(4))
        torch.manual_seed(3)
        for p in model.parameters():
            p.grad = None
        got = selector.backward(tokens(9), tokens(4))
        found.append((got.scores, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        assert steps(selector) == 2 * (capture == "learned")
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_reentrant_checkpoint():
    found = []
    for capture in ("learned", "discover"):
        model = net()
        model.way = lambda m, h: checkpoint(m.spare, h, use_reentrant=True)
        selector = make(model, capture=capture)
        torch.manual_seed(3)
        found.append(selector.select(tokens(9), tokens(4)).scores)
        assert steps(selector) == 0
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_response_that_is_not_elementwise():
    """Muon's: the step goes by discovery."""
    model = net()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.1)]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers:
        optimizer.step()
    selector = make(model, optimizers)
    assert torch.isfinite(selector.select(tokens(9), tokens(4)).weights).all()
    assert steps(selector) == 0


def test_batches_that_fit_together():
    x, y = torch.zeros(2, 3), torch.ones(1, 3)
    assert batches.concatenated(x, y).shape == (3, 3)
    assert batches.concatenated({"x": x, "n": 3}, {"x": y, "n": 3})["x"].shape == (3, 3)
    assert batches.concatenated((x, [x]), (y, [y]))[1][0].shape == (3, 3)
    for other in (y[:, :2], y.double(), {"x": y}, [y], y[0, 0]):
        assert batches.concatenated(x, other) is None
    assert batches.concatenated({"x": x, "n": 3}, {"x": y, "n": 4}) is None
    assert batches.concatenated({"x": x, "names": ["a", "b"]}, {"x": y, "names": ["c"]}) is None


def test_a_response_of_numbers_and_diagonals():
    like = torch.ones(2, 3, 4, dtype=torch.float64)
    values = stacks.elementwise([ftw.Scale(2.0), ftw.Diagonal(3 * like[0])], like)
    torch.testing.assert_close(values, torch.stack([2 * like[0], 3 * like[0]]))
    with pytest.raises(TypeError, match="not elementwise"):
        stacks.elementwise([ftw.Kronecker(torch.eye(3), torch.eye(4))], like[:1])
