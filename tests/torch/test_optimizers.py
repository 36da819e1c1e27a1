"""The predicted next change of every optimizer against its real step(), and what is refused."""

import copy
import warnings

import pytest
import torch
import torch_models as models
from ftw_torch import FilterThenWeight, geometry, linear_update, register_optimizer
from torch import nn

SHAPES = [(6, 9), (9, 6), (5,), (), (2, 3, 4), (2, 3, 2, 2)]
MATRICES = [(8, 12), (12, 8), (6, 6)]
STEPS = 12

RECIPES = {
    "SGD": [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
        {"momentum": 0.9, "foreach": True},
        {"momentum": 0.9, "fused": True, "nesterov": True},
    ],
    "Adam": [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"amsgrad": True, "betas": (0.5, 0.6)},
        {"foreach": True, "eps": 1e-3},
        {"fused": True, "amsgrad": True},
    ],
    "AdamW": [
        {},
        {"amsgrad": True},
        {"maximize": True},
        {"fused": True},
        {"foreach": True},
        {"lr": torch.tensor(0.02)},
    ],
    "NAdam": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True}],
    "RAdam": [{}, {"betas": (0.9, 0.9), "weight_decay": 0.1}, {"decoupled_weight_decay": True, "weight_decay": 0.1}],
    "Adamax": [{}, {"weight_decay": 0.1}, {"maximize": True, "weight_decay": 0.1}, {"foreach": True}],
    "Adagrad": [{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.3, "weight_decay": 0.1}, {"fused": True}],
    "RMSprop": [
        {},
        {"centered": True},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"centered": True, "momentum": 0.9, "maximize": True, "alpha": 0.8},
    ],
    "Adadelta": [{}, {"weight_decay": 0.1, "rho": 0.8}, {"maximize": True, "weight_decay": 0.1}],
    "ASGD": [{}, {"weight_decay": 0.1, "lambd": 0.1}, {"maximize": True}],
    "Adafactor": [{}, {"weight_decay": 0.1}, {"lr": 0.5, "d": 1.5}, {"maximize": True}],
}
TABLE = [(name, options) for name, rows in RECIPES.items() for options in rows]


def run(make, shapes, dtype, steps=STEPS, sign=1.0, tolerance=2e-4):
    """Largest relative error of the predicted change over all parameters and steps."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    optimizer = make(parameters)
    worst = 0.0
    for step in range(steps):
        for p in parameters:
            p.grad = torch.randn_like(p) * (0.3 + step % 3)
        keys = {id(p): set(optimizer.state.get(p, {})) for p in parameters}
        predicted = []
        for p in parameters:
            update = linear_update(optimizer, p, anticipate=p.grad.clone())
            predicted.append(-(update.offset + update.operator.apply(sign * p.grad)))
        assert keys == {id(p): set(optimizer.state.get(p, {})) for p in parameters}  # reading inserts nothing
        before = [p.detach().clone() for p in parameters]
        optimizer.step()
        for p, old, change in zip(parameters, before, predicted, strict=True):
            real = p.detach() - old
            rounding = torch.finfo(dtype).eps * old.norm()  # of the parameter, from which the change is read off
            error = (change - real).norm() - rounding
            worst = max(worst, float(error / real.norm().clamp_min(1e-30)))
    assert worst < tolerance, worst
    return worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options"), TABLE, ids=[f"{n}-{i}" for i, (n, _) in enumerate(TABLE)])
def test_the_real_step(name, options, dtype):
    if options.get("foreach") is None and "fused" not in options:
        options = {**options, "foreach": False}
    sign = -1.0 if options.get("maximize") else 1.0
    options = {"lr": 0.01, **options}
    run(lambda ps: getattr(torch.optim, name)(ps, **options), SHAPES, dtype, sign=sign)


def test_every_class_of_torch_is_known_or_refused_with_a_reason():
    from ftw_torch.optim.torch_optim import READERS, REFUSED

    classes = {
        c
        for c in vars(torch.optim).values()
        if isinstance(c, type) and issubclass(c, torch.optim.Optimizer) and c is not torch.optim.Optimizer
    }
    assert classes == {*READERS, *REFUSED}


@pytest.mark.parametrize("name", ["LBFGS", "Rprop", "SparseAdam"])
def test_refused_with_the_reason(name):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match=f"{name} has no linearised step: it .*register_optimizer"):
        linear_update(getattr(torch.optim, name)([p], lr=0.1), p)


# ---------------------------------------------------------------------------------------------------------------------
# Muon: the linearisation in direction


def spectrum(shape, power):
    u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    return u * torch.arange(1, min(shape) + 1) ** -float(power) @ v.T


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}])
@pytest.mark.parametrize("shape", [(24, 24), (16, 32), (32, 16)])
def test_muon_points_where_its_newton_schulz_steps_do(shape, options, power):
    """Cosine with the derivative of the real step, by differences in float64, at momenta of decaying spectra.

    Of square matrices of slow decay more falls short: Newton-Schulz leaves singular values between 0.7 and 1.2, and
    what these oscillations do to the symmetric part of a change is in part negative, which no PSD operator can hold.
    """
    from torch.optim import _muon

    torch.manual_seed(0)
    cosines = []
    for _ in range(STEPS):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = torch.optim.Muon([p], lr=1.0, **options)
        optimizer.state[p]["momentum_buffer"] = spectrum(shape, power)
        a, direction = 0.1 * spectrum(shape, power), torch.randn(shape)
        operator = linear_update(optimizer, p, anticipate=a).operator
        group = optimizer.param_groups[0]
        mu = group["momentum"]

        def polynomial(g, buffer=optimizer.state[p]["momentum_buffer"], group=group, mu=mu):
            """Five Newton-Schulz steps as torch takes them, without their rounding to 16 bits."""
            buffer = buffer.double().lerp(g, 1 - mu)
            x = g.lerp(buffer, mu) if group["nesterov"] else buffer
            transposed = x.shape[0] > x.shape[1]
            x = x.T if transposed else x
            x = x / x.norm().clamp(min=group["eps"])
            c0, c1, c2 = group["ns_coefficients"]
            for _ in range(group["ns_steps"]):
                gram = x @ x.T
                x = c0 * x + (c1 * gram + c2 * gram @ gram) @ x
            return x.T if transposed else x

        assert _muon is not None
        h = 1e-6
        exact = (polynomial(a.double() + h * direction) - polynomial(a.double() - h * direction)) / (2 * h)
        ours = operator.apply(direction).double()
        cosines.append(float((exact * ours).sum() / exact.norm() / ours.norm()))
    assert sum(cosines) / len(cosines) >= (0.78 if shape == (24, 24) and power == 1 else 0.92)


def test_muon_takes_matrices_beside_an_adam_for_the_rest():
    """Two optimizers are two selectors' worth of state; one group of each in one wrapper is not a torch optimizer."""
    p = nn.Parameter(torch.randn(4, 3))
    update = linear_update(torch.optim.Muon([p], lr=0.1), p, anticipate=torch.randn(4, 3))
    assert bool(torch.isfinite(update.operator.apply(torch.randn(4, 3))).all())


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers of other packages


def outside(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}])
def test_lion(options):
    package = outside("lion_pytorch")
    run(lambda ps: package.Lion(ps, lr=0.01, **options), SHAPES, torch.float32)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "warmup_steps": 5}, {"r": 1.0, "betas": (0.8, 0.9)}])
def test_schedule_free(options, foreach):
    package = outside("schedulefree")

    def make(ps):
        optimizer = package.AdamWScheduleFree(ps, lr=0.01, foreach=foreach, **options)
        optimizer.train()
        return optimizer

    run(make, SHAPES[:3], torch.float32)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "warmup_steps": 5}, {"r": 1.0, "momentum": 0.8}])
def test_schedule_free_sgd(options, foreach):
    package = outside("schedulefree")

    def make(ps):
        optimizer = package.SGDScheduleFree(ps, lr=0.1, foreach=foreach, **options)
        optimizer.train()
        return optimizer

    run(make, SHAPES[:3], torch.float32)


def test_schedule_free_in_eval_mode():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"eval mode; call optimizer.train\(\)"):
        linear_update(outside("schedulefree").AdamWScheduleFree([p]), p)


BITS = [
    ("Adam8bit", {}),
    ("AdamW8bit", {}),
    ("AdamW", {"optim_bits": 8}),
    ("PagedAdamW", {}),
    ("Lion8bit", {}),
    ("Lion", {}),
]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("kind", "options"), BITS)
def test_eight_bits_or_more(kind, options):
    package = outside("bitsandbytes")
    run(
        lambda ps: getattr(package.optim, kind)(ps, lr=0.01, weight_decay=0.1, min_8bit_size=512, **options),
        [(16, 64), (5, 7), (1024,)],
        torch.float32,
    )


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.01, "scale_parameter": False, "relative_step": False},  # the Trainer's
        {"lr": 0.01, "scale_parameter": False, "relative_step": False, "beta1": 0.9, "weight_decay": 0.1},
        {"warmup_init": True},
        {"clip_threshold": 0.2, "decay_rate": -0.5},
    ],
)
def test_adafactor_of_transformers(options):
    package = outside("transformers.optimization")
    run(lambda ps: package.Adafactor(ps, **options), SHAPES, torch.float32)


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 3.0, "precondition_frequency": 2}, {"max_precondition_dim": 8}]
)
@pytest.mark.parametrize("correct", [True, False])
def test_soap(options, correct):
    package = outside("pytorch_optimizer")

    def make(ps):
        optimizer = package.SOAP(ps, lr=0.01, correct_bias=correct, **options)
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()  # only sets up the bases
        return optimizer

    run(make, [(6, 9), (9, 6), (5,)], torch.float32)


def test_known_by_path_without_an_import():
    import subprocess
    import sys

    code = (
        "import sys, ftw_torch;"
        "bad = {'lion_pytorch', 'schedulefree', 'bitsandbytes', 'pytorch_optimizer', 'transformers', 'peft'};"
        "sys.exit(bool(bad & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# Groups, missing state, checkpoints, the registry


def test_groups_have_their_own_options():
    torch.manual_seed(0)
    a, b = (nn.Parameter(torch.randn(3, 4)) for _ in range(2))
    groups = [{"params": [a], "lr": 0.3, "betas": (0.5, 0.6)}, {"params": [b], "weight_decay": 0.5}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    for _ in range(4):
        predicted = []
        for p in (a, b):
            p.grad = torch.randn_like(p)
            update = linear_update(optimizer, p, anticipate=p.grad)
            predicted.append(-(update.offset + update.operator.apply(p.grad)))
        old = [p.detach().clone() for p in (a, b)]
        optimizer.step()
        for p, o, change in zip((a, b), old, predicted, strict=True):
            torch.testing.assert_close(p.detach() - o, change, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("counted", ["host", "device"])
@pytest.mark.parametrize("options", RECIPES["Adam"] + RECIPES["AdamW"], ids=str)
def test_adams_of_all_parameters_together(options, counted, monkeypatch):
    """The formula written out in float64, for groups, decay, an untouched parameter and steps counted on a device."""
    if counted == "device":
        monkeypatch.setattr("ftw_torch.optim.batched_adam.number", lambda x: x)
    torch.manual_seed(0)
    ps = {f"p{i}": nn.Parameter(torch.randn(shape)) for i, shape in enumerate([*SHAPES, (4,)])}
    groups = [{"params": list(ps.values())[:3]}, {"params": list(ps.values())[3:], "lr": 0.3, "betas": (0.5, 0.6)}]
    optimizer = torch.optim.Adam(groups, **{"lr": 0.02, **options})
    for _ in range(3):
        for p in ps.values():
            p.grad = torch.randn_like(p) if p is not ps["p6"] else torch.zeros_like(p)
        optimizer.step()
    if options.get("weight_decay"):
        optimizer.state[ps["p6"]]["exp_avg_sq"].zero_()
    goal = {name: torch.randn_like(p) * (name != "p6") for name, p in ps.items()}
    if options.get("weight_decay") and not options.get("decoupled_weight_decay"):
        ps["p6"].data.zero_()
    matrices = {name: g.reshape(g.shape if g.ndim < 3 else (-1, g.shape[2]) if g.ndim == 3 else (g.shape[0], -1))
                for name, g in goal.items()}  # fmt: skip
    found = geometry(optimizer, ps, matrices, damping=0.1)
    assert list(found) == list(ps)
    for (name, p), i in zip(ps.items(), [0, 0, 0, 1, 1, 1, 1], strict=True):
        group, state = optimizer.param_groups[i], optimizer.state[p]
        b1, b2 = group["betas"]
        a = goal[name].double() * (-1 if group["maximize"] else 1)
        if group["weight_decay"] and not group["decoupled_weight_decay"]:
            a = a + group["weight_decay"] * p.detach().double()
        v = b2 * state["exp_avg_sq"].double() + (1 - b2) * a * a
        if group["amsgrad"]:
            v = torch.maximum(v, state["max_exp_avg_sq"].double())
        v = v / (1 - b2**4)
        root = v.sqrt() + group["eps"] + 0.1 * v.mean().sqrt()
        want = (float(group["lr"]) * (1 - b1) / (1 - b1**4)) / root * bool(v.any())
        g = torch.randn_like(p).reshape(matrices[name].shape)
        got = found[name].apply(g)
        torch.testing.assert_close(got.double(), want.reshape(g.shape) * g.double(), rtol=3e-6, atol=0)


def test_rates_of_zero_are_those_of_initial_lr_or_one():
    a, b = (nn.Parameter(torch.randn(3)) for _ in range(2))
    g = {"a": torch.ones(3), "b": torch.ones(3)}
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.2}, {"params": [b], "lr": 0.1}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    found = geometry(optimizer, {"a": a, "b": b}, g)
    assert [float(op.value) for op in found.values()] == pytest.approx([0.2, 0.1])
    for _ in range(2):
        optimizer.step()
        schedule.step()
    found = geometry(optimizer, {"a": a, "b": b}, g)
    assert [float(op.value) for op in found.values()] == pytest.approx([0.1, 0.05])
    plain = torch.optim.SGD([{"params": [a], "lr": 0.0}, {"params": [b], "lr": 0.0}])
    assert [float(op.value) for op in geometry(plain, {"a": a, "b": b}, g).values()] == [1.0, 1.0]


@pytest.mark.parametrize("name", [*RECIPES, "Muon"])
def test_state_from_a_checkpoint_and_parameters_without_state(name):
    torch.manual_seed(0)
    shapes = MATRICES if name == "Muon" else [(4, 3), (5,)]
    parameters = [nn.Parameter(torch.randn(s)) for s in shapes]
    optimizer = getattr(torch.optim, name)(parameters, lr=0.01)
    for _ in range(3):
        for p in parameters[1:]:  # the first has no gradient, hence no state, yet
            p.grad = torch.randn_like(p)
        optimizer.step()
    others = [nn.Parameter(p.detach().clone()) for p in parameters]
    restored = getattr(torch.optim, name)(others, lr=0.5)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(parameters, others, strict=True):
        g = torch.randn_like(p)
        one, two = (linear_update(o, x, anticipate=g) for o, x in ((optimizer, p), (restored, q)))
        torch.testing.assert_close(one.operator.apply(g), two.operator.apply(g))
        torch.testing.assert_close(torch.as_tensor(one.offset), torch.as_tensor(two.offset))
    assert optimizer.state_dict()["state"].keys() == restored.state_dict()["state"].keys()


def test_registered_by_hand():
    import ftw

    class Signed(torch.optim.SGD):
        pass

    model = models.mlp()
    optimizer = Signed(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="Signed is not known"):
        geometry(optimizer, dict(model.named_parameters()), None)
    seen = []

    def read(p, state, group, *, lr, anticipate, damping):
        seen.append((tuple(p.shape), state, lr, anticipate is not None, damping))
        return ftw.LinearUpdate(0.0, ftw.Scale(lr))

    register_optimizer(Signed, read)
    batch = lambda n: (torch.randn(n, 5), torch.randint(0, 3, (n,)))  # noqa: E731
    FilterThenWeight(model, optimizer, models.classifier_loss, keep=2).select(batch(8), batch(3))
    assert seen[0] == ((7, 5), {}, 0.1, True, 0.1)


def test_a_wrapped_optimizer():
    accelerate = pytest.importorskip("accelerate")
    p = nn.Parameter(torch.randn(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = accelerate.Accelerator(cpu=True).prepare(torch.optim.SGD([p], lr=0.25))
    assert float(linear_update(wrapped, p).operator.value) == 0.25


def test_not_an_optimizer():
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, got object"):
        linear_update(object(), nn.Parameter(torch.ones(1)))


def test_selection_with_every_optimizer_is_exact():
    """Scores through the whole selector against the optimizer's own response applied to explicit gradients."""
    for name in ["SGD", "Adam", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Adadelta", "Adafactor", "ASGD"]:
        torch.manual_seed(0)
        model = models.mlp().double()
        optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01)
        draw = lambda n: (torch.randn(n, 5, dtype=torch.float64), torch.randint(0, 3, (n,)))  # noqa: E731
        pool, target = draw(8), draw(3)
        for _ in range(2):
            models.classifier_loss(model, draw(4)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        one = lambda batch, i: tuple(x[i : i + 1] for x in batch)  # noqa: E731
        explicit, goal = (models.per_sample_gradients(model, models.classifier_loss, b, one) for b in (pool, target))
        g_t = {n: g.mean(0) for n, g in goal.items()}
        operators = geometry(optimizer, dict(model.named_parameters()), g_t)
        expected = sum((explicit[n] * operators[n].apply(g_t[n])).flatten(1).sum(1) for n in g_t)
        got = FilterThenWeight(model, optimizer, models.classifier_loss, keep=3).select(pool, target)
        torch.testing.assert_close(got.scores, expected, rtol=1e-9, atol=1e-12)


def test_several_optimizers_share_the_parameters():
    """As one optimizer of several groups, where they are of one class; each parameter belongs to one."""
    from ftw_torch.optim.geometry import geometry

    torch.manual_seed(0)
    shapes = {"a": (4, 3), "b": (5,), "c": (3, 4)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    a, b, c = parameters.values()
    one = torch.optim.AdamW([{"params": [a, c]}, {"params": [b], "lr": 1e-2}], lr=1e-3)
    two = [torch.optim.AdamW([b], lr=1e-2), torch.optim.AdamW([a, c], lr=1e-3)]
    goal = {name: torch.randn(shape) for name, shape in shapes.items()}
    for rate in (1.0, 0.0):  # all zero in a warm-up's first step
        for optimizer in (one, *two):
            for group in optimizer.param_groups:
                group.setdefault("initial_lr", group["lr"])
                group["lr"] *= rate
        expected, got = (geometry(optimizer, parameters, goal) for optimizer in (one, two))
        assert list(got) == list(shapes)
        for name in shapes:
            torch.testing.assert_close(got[name].apply(goal[name]), expected[name].apply(goal[name]))
    muon = torch.optim.Muon([a, c], lr=1e-2)
    mixed = geometry((muon, two[0]), parameters, goal)
    alone = geometry(muon, {"a": a, "c": c}, goal)
    torch.testing.assert_close(mixed["c"].apply(goal["c"]), alone["c"].apply(goal["c"]))
    with pytest.raises(ValueError, match="in several of the optimizers: a, c"):
        geometry((muon, two[1], two[0]), parameters, goal)
    with pytest.raises(ValueError, match=r"none of the optimizer's groups: b; .*all optimizers as a tuple"):
        geometry(muon, parameters, goal)


def test_wrappers_are_looked_through():
    lightning = pytest.importorskip("lightning")
    from ftw_torch.optim.geometry import unwrap
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    assert unwrap(LightningOptimizer(optimizer)) is optimizer
    _, wrapped = lightning.Fabric(accelerator="cpu").setup(model, optimizer)
    assert unwrap(wrapped) is optimizer
