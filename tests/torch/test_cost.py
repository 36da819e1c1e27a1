"""The ways to walk a pool give the same answer, and keep what they say: records, Gram matrices, solver, benchmark."""

import json
import logging
import warnings

import ftw_compiled
import pytest
import torch
import torch.nn.functional as F
import torch_models as models
from ftw_torch import FilterThenWeight
from ftw_torch.records.blocks import add_gram, lengths
from ftw_torch.records.join import join
from ftw_torch.records.pool import Pool
from ftw_torch.step.solver import best_solver, compiled
from ftw_torch.step.stream import Stream, worth_writing, written
from torch import nn
from torch.utils.checkpoint import checkpoint

import ftw
from ftw import Dense, OuterProduct, Rows, Sum

torch.set_num_threads(1)


def tokens(n, t=20):
    return torch.randint(0, 11, (n, t))


def gpt(**options):
    torch.manual_seed(0)
    return models.GPT(**options).double()


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.head = nn.Embedding(11, 8), nn.Linear(8, 16), nn.Linear(16, 11)

    def forward(self, x):
        return self.head(F.dropout(F.gelu(self.up(F.dropout(self.words(x), 0.2))), 0.3))


def answer(model, pool, target, seed=3, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = None
    options = {"keep": 4, "guard": 0.3} | options
    selector = FilterThenWeight(model, optimizer, models.lm_loss, **options)
    torch.manual_seed(seed)
    selector.select(pool, target)  # the audit draws random numbers: not in the pass that is compared
    torch.manual_seed(seed)
    selection = selector.backward(pool, target)
    return selection, torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None]), selector


def same(got, expected, tol=1e-10):
    assert got[0].indices.tolist() == expected[0].indices.tolist()
    for name in ("weights", "scores", "match", "predicted_decrease", "shrinkage"):
        torch.testing.assert_close(getattr(got[0], name), getattr(expected[0], name), rtol=tol, atol=tol)
    torch.testing.assert_close(got[1], expected[1], rtol=tol, atol=tol)


WAYS = [
    {},
    {"filter": "top_k", "weight": "uniform"},
    {"filter": "top_k"},
    {"filter": "greedy_utility", "shortlist": None},
]


@pytest.mark.parametrize("t", [3, 20])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_one_pass_pieces_and_two_passes_agree(way, tied, t):
    """t = 3 keeps factors, 20 writes gradients out; a tied head is used twice, so that its Gram has a cross term."""
    model = gpt(tied=tied)
    pool, target = tokens(10, t), tokens(4, t)
    whole = answer(model, pool, target, **way)
    same(answer(model, pool, target, micro_batch=3, **way), whole)
    same(answer(model, pool, target, mode="two_pass", **way), whole)
    same(answer(model, pool, target, mode="two_pass", micro_batch=3, **way), whole)


@pytest.mark.parametrize("micro_batch", [None, 3])
@pytest.mark.parametrize("way", WAYS[:2])
def test_the_second_pass_applies_the_masks_that_were_scored(way, micro_batch):
    torch.manual_seed(0)
    model = Dropped().double().train()
    pool, target = tokens(10), tokens(4)
    one = answer(model, pool, target, micro_batch=micro_batch, **way)
    same(answer(model, pool, target, micro_batch=micro_batch, mode="two_pass", **way), one)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["one_pass", "two_pass"])
def test_a_refused_sample_does_not_reach_the_update(mode, dropout):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(dropout), nn.GELU(), nn.Linear(8, 3)).double().train()
    x, y = torch.randn(10, 5).double(), torch.randint(0, 3, (10,))
    target = torch.randn(4, 5).double(), torch.randint(0, 3, (4,))
    x[3] = torch.nan
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    selector = FilterThenWeight(model, optimizer, loss, keep=4, mode=mode, on_nonfinite="drop")
    selection = selector.backward((x, y), target)
    assert 3 not in selection.indices.tolist()
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters())


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_budget_turns_one_pass_into_two(way, caplog):
    model = gpt()
    pool, target = tokens(10), tokens(4)
    one = answer(model, pool, target, **way)
    with caplog.at_level(logging.INFO, "ftw_torch"):
        got = answer(model, pool, target, memory_budget=30_000, **way)
    assert "two passes" in caplog.text
    assert got[2].memory.two_passes
    same(got, one)
    caplog.clear()
    with caplog.at_level(logging.INFO, "ftw_torch"):
        assert not answer(model, pool, target, memory_budget=10**9, **way)[2].memory.two_passes
    assert not caplog.text


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.words, self.block, self.head = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.reentrant = reentrant

    def forward(self, x):
        h = self.words(x)
        return self.head(checkpoint(lambda h: F.gelu(self.block(h)), h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_turns_one_pass_into_two(reentrant, caplog):
    torch.manual_seed(0)
    model = Checkpointed(reentrant).double()
    pool, target = tokens(10), tokens(4)
    with caplog.at_level(logging.INFO, "ftw_torch"):
        got = answer(model, pool, target)  # its second step: two passes
    assert "checkpoints its activations" in caplog.text
    assert got[2].memory.two_passes
    same(got, answer(model, pool, target, mode="one_pass"))


def test_the_open_guard_agrees():
    """A target that is memorised: F < 1, and the pool's mean is asked for."""
    model = gpt()
    torch.manual_seed(5)
    pool, target = tokens(12), tokens(9)
    memorise = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        memorise.zero_grad()
        models.lm_loss(model, target).mean().backward()
        memorise.step()
    one = answer(model, pool, target)
    assert one[0].signal < 1
    assert one[0].shrinkage > 0
    for options in ({"micro_batch": 5}, {"mode": "two_pass"}, {"mode": "two_pass", "micro_batch": 5}):
        same(answer(model, pool, target, **options), one)


def test_modes_are_checked():
    model = gpt()
    for bad in ({"mode": "three"}, {"memory_budget": 0}, {"gram_sketch": 40_000}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            answer(model, tokens(6), tokens(2), **bad)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def records(n, seed=0):
    """Every kind of record of one matrix (30, 6), and a vector."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    rows = Rows(torch.randint(0, 30, (n, 5), generator=g), normal(n, 5, 6), 30)
    many = Rows(torch.randint(0, 30, (n, 40), generator=g), normal(n, 40, 6), 30)
    outer = OuterProduct(normal(n, 7, 6), normal(n, 7, 30))
    return {
        "rows": rows,
        "many": many,
        "outer": outer,
        "dense": Dense(normal(n, 30, 6)),
        "sum": Sum((rows, outer)),
        "vector": Dense(normal(n, 9)),
    }


@pytest.mark.parametrize("kind", ["diagonal", "scale", "kronecker"])
@pytest.mark.parametrize("name", list(records(1)))
def test_blocks_are_the_core_s_products(name, kind):
    a, b = records(4)[name], records(3, 1)[name]
    shape = a.shape
    g = torch.Generator().manual_seed(2)
    positive = lambda *size: torch.rand(*size, generator=g, dtype=torch.float64)  # noqa: E731
    if kind == "kronecker":
        if len(shape) == 1:
            pytest.skip("a vector")
        operator = ftw.Kronecker(positive(shape[0]), positive(shape[1]))
    else:
        operator = ftw.Scale(0.3) if kind == "scale" else ftw.Diagonal(positive(*shape))
    p = torch.zeros(shape, dtype=torch.float64)
    both = join([{"p": a}, {"p": b}], [4, 3], {"p": p})
    K = ftw.gram(both, {"p": operator})
    torch.testing.assert_close(add_gram([a, b], operator), K, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lengths([a, b], operator), K.diagonal(), rtol=1e-10, atol=1e-10)
    pool = Pool({"p": p}, [{"p": a}, {"p": b}], [4, 3])
    some = torch.tensor([5, 0, 3])
    torch.testing.assert_close(pool.gram({"p": operator}, some), K[some][:, some], rtol=1e-10, atol=1e-10)
    weights = torch.tensor([0.5, 0.0, -2.0], dtype=torch.float64)
    expected = ftw.combine(ftw.take(both, some), weights)["p"]
    torch.testing.assert_close(pool.combine(some.tolist(), weights.tolist())["p"], expected, rtol=1e-10, atol=1e-10)
    m = torch.randn(shape, generator=g, dtype=torch.float64)
    expected = ftw.scores(both, {"p": m}, {"p": ftw.Scale(1.0)})
    torch.testing.assert_close(pool.scores({"p": m}), expected, rtol=1e-10, atol=1e-10)


def test_a_sample_of_zero_weight_does_not_enter():
    for name, record in records(3).items():
        b = record.grads if isinstance(record, Dense) else getattr(record, "output_grads", None)
        if b is None:
            continue
        b[1] = torch.nan
        pool = Pool({name: torch.zeros(record.shape, dtype=torch.float64)}, [{name: record}], [3])
        assert bool(torch.isfinite(pool.combine([0, 1], [1.0, 0.0])[name]).all())


def test_the_smaller_of_factors_and_gradients_is_kept():
    few, many = (OuterProduct(torch.ones(2, t, 8), torch.ones(2, t, 8)) for t in (3, 4))
    assert not worth_writing(few)
    assert worth_writing(many)
    assert isinstance(Stream({"p": torch.ones(8, 8)}, {"p": ftw.Scale(1.0)})("p", many), Dense)
    half = OuterProduct(many.inputs.bfloat16(), many.output_grads.bfloat16())
    assert not worth_writing(half)
    assert written(half).grads.dtype == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_sketched_gram(tied):
    """As wrong as its size says, and the same whichever way the pool is walked."""
    model = gpt(tied=tied)
    pool, target = tokens(10), tokens(4)
    seen = []

    def spy(scores, gram, k):
        seen.append(gram)
        return ftw.filters.matching(scores, gram, k)

    size = 1024
    exact = answer(model, pool, target, filter=spy)
    walks = [{}, {"micro_batch": 3}, {"mode": "two_pass"}, {"mode": "two_pass", "micro_batch": 3}]
    walks.append({"memory_budget": 30_000})
    found = [answer(model, pool, target, filter=spy, gram_sketch=size, **walk) for walk in walks]
    for other in found[1:]:
        same(other, found[0])
    K, *sketched = seen[1::2]  # of the second of each answer's two choices
    assert len(sketched) == len(walks)
    for other in sketched:
        torch.testing.assert_close(other, sketched[0])
    lengths = K.diagonal().sqrt()
    errors = (sketched[0] - K) / lengths / lengths[:, None] * size**0.5
    assert 0.2 < errors.square().mean().sqrt() < 2.0  # between coordinates that share a bucket: of the order of one
    torch.testing.assert_close(found[0][0].scores, exact[0].scores)


# ---------------------------------------------------------------------------------------------------------------------
# Solver, benchmark


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "constraint",
    [
        ftw.NonNegative(),
        ftw.Simplex(2.0),
        ftw.CappedSimplex(torch.full((6,), 0.4), 1.0),
        ftw.Box(0.0, 0.5),
    ],
)
def test_the_compiled_solver_is_the_core_s(constraint, dtype):
    pytest.importorskip("numba")
    ftw_compiled.compile_kernels()  # at once where `make test` did it
    assert best_solver() is compiled
    torch.manual_seed(0)
    x = torch.randn(6, 9, dtype=dtype)
    K, c = x @ x.T, torch.randn(6, dtype=dtype)
    constraint = type(constraint)(*(v.to(dtype) if isinstance(v, torch.Tensor) else v for v in constraint))
    ours, core = (solve(K, c, constraint, ridge=torch.tensor(0.1, dtype=dtype)) for solve in (compiled, ftw.solve_qp))
    assert ours.weights.dtype == dtype
    assert int(ours.status) == int(core.status) == 0
    tol = 1e-8 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours.weights, core.weights, rtol=tol, atol=tol)


def test_the_benchmark_runs():
    from ftw_conformance.bench.torch_models import GPT, Llama, add_lora, lm_loss
    from ftw_conformance.bench.torch_variants import STEPS, Setup, limits

    torch.manual_seed(0)
    for model in (GPT(20, 8, 1, 6), Llama(20, 8, 1, 4, 2, 16), add_lora(GPT(20, 8, 1, 6), 2)):
        updates = {}
        start = {name: x.clone() for name, x in model.state_dict().items()}
        for name, make in STEPS.items():
            model.load_state_dict(start)
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
            setup = Setup(model, optimizer, lm_loss, 2, 4)
            torch.manual_seed(1)
            make(setup)(torch.randint(0, 20, (8, 7)), torch.randint(0, 20, (2, 7)))
            updates[name] = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])
            limits(name, "gpt", 8, 2, 2, 4, 6, {})
        for name in ("top_k_pieces", "two_pass", "vmap_grad", "loop"):
            torch.testing.assert_close(updates[name], updates["top_k"], rtol=1e-4, atol=1e-5)
        for name in ("default_pieces", "two_pass_default", "loop_default"):
            torch.testing.assert_close(updates[name], updates["default"], rtol=1e-4, atol=1e-5)


def test_the_benchmark_for_a_gpu_runs(tmp_path, capsys):
    from ftw_conformance.bench import torch_gpu

    with warnings.catch_warnings():
        assert torch_gpu.main(["--tiny", "--rounds", "1", "--json", str(tmp_path / "figures.json")]) == 0
    printed = capsys.readouterr().out
    assert all(f"tiny{kind}, T=8" in printed for kind in ("", "-lora", "-encoder"))
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    ops = {(row["model"], row["step"], row["n"]): row["calls"]["ops"] for row in rows}
    for model, n in (("tiny", 32), ("tiny-lora", 4), ("tiny-encoder", 64)):
        assert ops[model, "top_k", n] < ops[model, "top_k_discovered", n]
    assert torch_gpu.main(["--tiny", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.count("left out") == 4
