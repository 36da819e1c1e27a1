"""Bad input: a clear error, and everything as it was: gradients, flags, hooks, optimizer state, buffers, modes."""

import copy
import warnings

import pytest
import torch
import torch_models as models
from ftw_torch import FilterThenWeight
from torch import nn


class Held(nn.Module):
    """An MLP with a buffer, a frozen parameter, dropout-free, and one spare parameter that nothing uses."""

    def __init__(self):
        super().__init__()
        self.body = models.mlp()
        self.body[0].bias.requires_grad_(False)
        self.spare = nn.Parameter(torch.ones(2))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return self.body(x)


def batch(n, bad=()):
    x = torch.randn(n, 5)
    x[list(bad)] = float("nan")
    return x, torch.randint(0, 3, (n,))


class Case:
    """A model one step into training, and a record of all that must not change."""

    def __init__(self, model=None, optimizer=None, loss=models.classifier_loss, **options):
        torch.manual_seed(0)
        self.model = model or Held()
        self.optimizer = optimizer or torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.selector = FilterThenWeight(self.model, self.optimizer, loss, **{"keep": 2, **options})
        for i, p in enumerate(self.model.parameters()):
            if i % 2 and p.requires_grad:
                p.grad = torch.full_like(p, 0.5)
        self.before = self.picture()

    def picture(self):
        hooks = [
            [len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m.training, m.forward.__func__]
            for m in self.model.modules()
        ]
        return copy.deepcopy(
            {
                "grad": {name: p.grad for name, p in self.model.named_parameters()},
                "flags": {name: p.requires_grad for name, p in self.model.named_parameters()},
                "tensors": dict(self.model.state_dict()),
                "parameter hooks": [
                    (p._backward_hooks, p._post_accumulate_grad_hooks) for p in self.model.parameters()
                ],
                "hooks": hooks,
                "state": {i: dict(s) for i, s in enumerate(self.optimizer.state.values())},
                "groups": [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups],
                "modes": torch._C._len_torch_function_stack(),
                "grad mode": torch.is_grad_enabled(),
            }
        )

    def refuses(self, kind, match, pool, target, call="backward"):
        with pytest.raises(kind, match=match):
            getattr(self.selector, call)(pool, target)
        same(self.before, self.picture())


def same(a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for k in a:
            same(a[k], b[k])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


both = pytest.mark.parametrize("call", ["backward", "select"])


@both
@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda m, b: models.classifier_loss(m, b).mean(), r"one loss for each of the \d samples .*got a tensor \(\)"),
        (lambda m, b: models.classifier_loss(m, b)[:, None], r"got a tensor \(\d, 1\)"),
        (lambda m, b: models.classifier_loss(m, b)[:-1], r"got a tensor \(\d,\)"),
        (lambda m, b: float(models.classifier_loss(m, b).sum().detach()), "got a float"),
        (lambda m, b: None, "got a NoneType"),
        (lambda m, b: models.classifier_loss(m, b).detach(), "do not depend on any parameter"),
        (lambda m, b: b[0].sum(1), "do not depend on any parameter"),
    ],
)
def test_losses_are_not_per_sample(loss, match, call):
    Case(loss=loss).refuses(ValueError, match, batch(8), batch(3), call)


@both
@pytest.mark.parametrize(
    "loss",
    [
        lambda m, b: models.classifier_loss(m, b).mean().expand(len(b[1])),
        lambda m, b: nn.functional.cross_entropy((h := m(b[0])) - h.mean(0), b[1], reduction="none"),
        lambda m, b: models.classifier_loss(m, b).flip(0),
    ],
    ids=["a mean in disguise", "centred by the batch", "another sample's"],
)
def test_losses_that_depend_on_other_samples(loss, call):
    Case(loss=loss).refuses(RuntimeError, "other samples of the batch", batch(8), batch(3), call)


@pytest.mark.parametrize(("keep", "kind"), [(0, ValueError), (-1, ValueError), (2.0, ValueError), (True, ValueError)])
def test_keep_out_of_range(keep, kind):
    with pytest.raises(kind, match=r"keep=.* must be an int >= 1"):
        Case(keep=keep)


@both
def test_keep_exceeds_the_pool(call):
    Case(keep=9).refuses(ValueError, "keep=9 exceeds the pool of 8 samples", batch(8), batch(3), call)


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"on_nonfinite": "skip"}, ValueError, "on_nonfinite='skip'"),
        ({"micro_batch": 0}, ValueError, "micro_batch=0"),
        ({"damping": -0.1}, ValueError, "damping=-0.1 must be a finite number"),
        ({"filtre": "top_k"}, TypeError, "unexpected keyword.*filtre"),
        ({"mode": "three"}, ValueError, "mode='three'"),
        ({"solver": 3}, TypeError, "solver is a int"),
        ({"filter": "best"}, ValueError, "filter='best' is not one of"),
        ({"weight": "some"}, ValueError, "weight='some'"),
        ({"ridge": -1.0}, ValueError, "ridge=-1.0"),
        ({"guard": 2.0}, ValueError, "guard=2.0"),
        ({"shortlist": 0}, ValueError, "shortlist=0"),
        ({"constraint": 1.0}, TypeError, "constraint is a float"),
    ],
)
def test_options(options, kind, match):
    with pytest.raises(kind, match=match):
        Case(**options)


@both
@pytest.mark.parametrize(
    ("pool", "target", "match"),
    [
        (batch(0), batch(3), "the pool is empty"),
        (batch(8), batch(0), "the target is empty"),
        ({}, batch(3), "the pool holds no tensor"),
        (batch(8), "text", "the target holds no tensor.*got a str"),
        (
            (torch.randn(8, 5), torch.zeros(7, dtype=torch.long)),
            batch(3),
            r"the pool disagree.*pool\[0\]': 8, 'pool\[1\]': 7",
        ),
    ],
)
def test_batches(pool, target, match, call):
    Case().refuses((ValueError, RuntimeError), match, pool, target, call)


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}, {"mode": "two_pass", "micro_batch": 3}], ids=str)
def test_lists_and_arrays_are_cut_with_the_samples(options):
    numpy = pytest.importorskip("numpy")
    sources, sizes = "abcdefgh", numpy.arange(8.0, dtype=numpy.float32)

    def loss(m, b):
        assert b["name"] == "all of it"
        scale = torch.tensor([ord(s) - 96 for s in b["source"]]) + torch.as_tensor(b["size"])  # (n,)
        return models.classifier_loss(m, b["xy"]) * scale

    def given(b):
        n = len(b[1])
        return {"xy": b, "source": list(sources[:n]), "size": sizes[:n], "name": "all of it"}

    def plain(m, b):
        return models.classifier_loss(m, b[:2]) * b[2]

    pool, target = batch(8), batch(3)
    scaled = [(*b, torch.arange(len(b[1])) * 2.0 + 1) for b in (pool, target)]
    one, two = Case(loss=loss, guard=0.0, **options), Case(loss=plain, guard=0.0)
    got, expected = one.selector.backward(given(pool), given(target)), two.selector.backward(*scaled)
    assert got.indices.tolist() == expected.indices.tolist()
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@both
def test_target_on_another_device(call):
    target = tuple(x.to("meta") for x in batch(3))
    Case().refuses(ValueError, r"the pool lives on \['cpu'\], the target on \['meta'\]", batch(8), target, call)


@both
def test_nonfinite_losses(call):
    case = Case()
    case.refuses(FloatingPointError, "the loss of pool sample 2, 5 is not finite", batch(8, bad=(2, 5)), batch(3), call)
    case.refuses(FloatingPointError, "the loss of target sample 1 is not finite", batch(8), batch(3, bad=(1,)), call)
    Case(guard=0.0).refuses(FloatingPointError, "loss of target sample 1", batch(8), batch(3, bad=(1,)), call)
    case.selector.on_nonfinite = "drop"
    case.refuses(FloatingPointError, "the loss of target sample 1 is not finite", batch(8), batch(3, bad=(1,)), call)
    case.refuses(
        FloatingPointError, "the loss of pool sample 0, 1, .*, 7 is not", batch(8, bad=range(8)), batch(3), call
    )


def rooted(m, b):
    """A loss that is finite and has no finite gradient for a sample of zeros."""
    return models.classifier_loss(m, b) + (m.body[0].weight.sum() * b[0]).square().sum(1).sqrt()


@both
def test_nonfinite_gradients(call):
    pool, target = batch(8), batch(3)
    pool[0][3] = 0
    case = Case(loss=rooted)
    case.refuses(FloatingPointError, "the gradient of pool sample 3 is not finite", pool, target, call)
    target[0][1] = 0
    case = Case(loss=rooted)
    case.refuses(FloatingPointError, "the gradient of target sample 1 is not finite", batch(8), target, call)
    case = Case(loss=rooted, guard=0.0)
    case.refuses(FloatingPointError, "the gradient of the target is not finite", batch(8), target, call)


@pytest.mark.parametrize("loss", [models.classifier_loss, rooted])
def test_drop_goes_on_without_the_sample(loss):
    pool, target = batch(8), batch(3)
    pool[0][3] = 0
    if loss is not rooted:
        pool[0][3] = float("inf")
    rest = tuple(torch.cat([x[:3], x[4:]]) for x in pool)
    dropped, without = (Case(loss=loss, on_nonfinite="drop", shortlist=None) for _ in range(2))
    a, b = dropped.selector.backward(pool, target), without.selector.backward(rest, target)
    assert [i - (i > 3) for i in a.indices.tolist()] == b.indices.tolist()
    torch.testing.assert_close(a.weights, b.weights)
    assert torch.isnan(a.scores[3])
    for p, q in zip(dropped.model.parameters(), without.model.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad)


def test_drop_keeps_fewer_when_too_few_are_left():
    case = Case(on_nonfinite="drop", keep=6)
    assert sorted(case.selector.backward(batch(8, bad=(0, 1, 2, 3)), batch(3)).indices.tolist()) == [4, 5, 6, 7]


@both
@pytest.mark.parametrize("stats", [True, False])
def test_batch_norm_in_training_mode(call, stats):
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=stats), nn.Linear(4, 3))
    match = "BatchNorm1d '1' in training mode couples the samples"
    Case(model).refuses(ValueError, match, batch(8), batch(3), call)
    if stats:
        model.eval()
        Case(model).selector.backward(batch(8), batch(3))


@both
def test_batch_norm_as_a_function(call):
    def loss(m, b):
        return models.classifier_loss(
            m, (torch.nn.functional.batch_norm(m.body[0](b[0]), None, None, training=True)[:, :5], b[1])
        )

    class Gained(Held):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(5))

        def forward(self, x):
            return self.body(torch.nn.functional.batch_norm(x, None, None, self.gain, training=True))

    Case(loss=loss).refuses(ValueError, "training=True couples the samples", batch(8), batch(3), call)
    Case(Gained()).refuses(ValueError, "training=True couples the samples", batch(8), batch(3), call)


@both
def test_embedding_scaled_by_frequency(call):
    model = nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(20, 3))
    pool, target = ((torch.randint(0, 9, (n, 5)), torch.randint(0, 3, (n,))) for n in (8, 3))
    Case(model).refuses(ValueError, "Embedding '0' has scale_grad_by_freq=True", pool, target, call)


@both
def test_all_scores_zero(call):
    case = Case(loss=lambda m, b: models.classifier_loss(m, b) * (len(b[1]) != 3))
    case.refuses(RuntimeError, "scores of all candidates are exactly zero", batch(8), batch(3), call)


@both
def test_unknown_optimizer(call):
    class Mine(torch.optim.SGD):
        pass

    model = Held()
    case = Case(model, Mine(model.parameters(), lr=0.1))
    case.refuses(TypeError, r"Mine is not known.*AdamW.*register_optimizer\(Mine, reader\)", batch(8), batch(3), call)


@both
def test_parameter_in_no_group(call):
    model = Held()
    some = [p for name, p in model.named_parameters() if name != "body.4.weight"]
    case = Case(model, torch.optim.SGD(some, lr=0.1))
    case.refuses(ValueError, "none of the optimizer's groups: body.4.weight; freeze", batch(8), batch(3), call)


@both
def test_nothing_to_train(call):
    case = Case()
    case.model.requires_grad_(False)
    case.before = case.picture()
    case.refuses(ValueError, "no parameter of the model requires a gradient", batch(8), batch(3), call)


@both
@pytest.mark.parametrize("when", [1, 2, 3, 4])
def test_an_exception_in_the_users_loss(call, when):
    calls = []

    def loss(m, b):
        calls.append(1)
        out = models.classifier_loss(m, b)
        if len(calls) == when:
            raise ZeroDivisionError("mine")
        return out

    case = Case(loss=loss)
    case.refuses(ZeroDivisionError, "mine", batch(8), batch(3), call)
    case.selector.backward(batch(8), batch(3))  # and goes on


class Hidden(torch.autograd.Function):
    """A scale that no torch function shows."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx, g):
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum(0)


def test_a_parameter_that_capture_does_not_see():
    """Named, left to one backward pass a sample, right, and said once."""

    class Model(Held):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.rand(5))

        def forward(self, x):
            return self.body(Hidden.apply(x, self.scale))

    case = Case(Model(), keep=3)
    pool, target = batch(8), batch(3)
    with pytest.warns(UserWarning, match="'scale'.*one backward pass a sample"):
        got = case.selector.select(pool, target)
    same(case.before, case.picture())
    explicit = models.per_sample_gradients(
        case.model, models.classifier_loss, pool, lambda b, i: [x[i : i + 1] for x in b]
    )
    for p in case.model.parameters():
        p.grad = None
    again = case.selector.backward(pool, target)  # no second warning
    assert again.indices.tolist() == got.indices.tolist()
    expected = (again.weights[:, None] * explicit["scale"][again.indices]).sum(0)
    torch.testing.assert_close(case.model.scale.grad, expected)


def test_a_function_without_a_rule_is_named_once():
    class Model(Held):
        def __init__(self):
            super().__init__()
            self.pair = models.Unruled(5)

        def forward(self, x):
            return self.body(self.pair(x, x))

    case = Case(Model())
    with pytest.warns(UserWarning, match="no rule") as caught:
        case.selector.select(batch(8), batch(3))
    text = [str(w.message) for w in caught]
    assert len(text) == 1
    assert "'pair.weight' enters tensordot, for which there is no rule" in " ".join(text)
    case.selector.select(batch(8), batch(3))


def test_select_leaves_everything_as_it_was():
    case = Case()
    case.selector.select(batch(8), batch(3))
    case.selector.select(batch(8), None)
    same(case.before, case.picture())


@pytest.mark.parametrize("options", [{}, {"mode": "two_pass", "micro_batch": 3}], ids=str)
def test_what_belongs_to_all_samples_is_not_cut(options):
    """Three channels' means are as many as the samples of an audit, or of a piece; two targets as an image's axes."""

    class Odd:
        def __array__(self, dtype=None, copy=None):
            raise AssertionError

    def loss(m, b):
        assert (b["means"], b["size"]) == ([1.0, 2.0, 3.0], (5, 1))
        return models.classifier_loss(m, b["xy"])

    case = Case(loss=loss, guard=0.0, **options)
    pool, target = ({"xy": batch(n), "means": [1.0, 2.0, 3.0], "size": (5, 1), "odd": Odd()} for n in (8, 2))
    case.selector.backward(pool, target)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": lambda x: x}, "model is a function; expected an nn.Module"),
        ({"per_sample_loss": None}, "per_sample_loss is a NoneType; expected"),
        ({"scaler": True}, "scaler is a bool; expected a torch.amp.GradScaler"),
    ],
)
def test_what_is_no_model_no_loss_no_scaler(given, match):
    model = models.mlp()
    right = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters()),
        "per_sample_loss": models.classifier_loss,
    }
    with pytest.raises(TypeError, match=match):
        FilterThenWeight(**{**right, **given}, keep=2)


def test_complex_parameters_are_refused_with_the_way():
    model = models.mlp()
    model.spectrum = nn.Parameter(torch.ones(3, 4, dtype=torch.complex64))
    selector = FilterThenWeight(model, torch.optim.SGD(model.parameters()), models.classifier_loss, keep=2)
    with pytest.raises(TypeError, match=r"'spectrum' \(3, 4\) is complex: .*\(3, 4, 2\) .*view_as_complex"):
        selector.backward(batch(8), batch(3))
