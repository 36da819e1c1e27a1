"""Training as it is done: accumulation, checkpointing, 16 bits, clipping, dropout, compilation, pieces, many steps.

Traps of other implementations, each with its test (here unless another file is named):

 1  sums of A and B over target rows before the outer product     test_several_targets
 2  tied weights overwrite each other, no cross term              test_torch_layers: tied
 3  gradients leak, frozen parameters thaw, tensors change        test_nothing_leaks
 4  everything cast to 16 bits                                    test_dtypes_are_kept
 5  a route chosen once, on the first batch                       test_batches_of_other_sizes
 6  compiled models captured as nothing, all scores zero          test_compiled, test_torch_errors: all scores zero
 7  the optimizer guessed from its groups                         test_torch_optimizers: unknown raises
 8  redundancy in raw units                                       test_scale_changes_nothing
 9  more picks than candidates                                    test_torch_errors: keep
10  negative weights, a free sum of weights                       test_weights_are_a_distribution
11  hard-coded betas, eps in the root, t of the last step         test_torch_optimizers: the real step
12  null directions amplified, other rotations for the target     test_torch_optimizers: muon, soap
14  a target larger than the pool; an index twice; NaN hidden     test_more_targets_than_candidates, test_torch_errors
15  forwards swapped on the model                                 test_nothing_leaks, test_state_dicts_keep_their_keys
"""

import functools
import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
import torch_models as models
from ftw_torch import FilterThenWeight
from torch import nn
from torch.utils.checkpoint import checkpoint


def tokens(n, t=8):
    return torch.randint(0, 11, (n, t))


def gpt(dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    return models.GPT(d=8, t=16, **options).to(dtype)


def make(model, loss=models.lm_loss, optimizer=torch.optim.AdamW, **options):
    options = {"keep": 3, **options}
    return FilterThenWeight(model, optimizer(model.parameters(), lr=1e-2), loss, **options)


def grads(model):
    return torch.cat(
        [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in model.parameters()]
    )


def clear(model):
    for p in model.parameters():
        p.grad = None


def close(a, b, rtol=1e-6):
    assert float((a.double() - b.double()).norm()) <= rtol * float(b.double().norm()), (a - b).norm() / b.norm()


def by_hand(model, loss, pool, selection):
    """The gradient of the weighted losses of the chosen samples, by one ordinary backward."""
    parameters = list(model.parameters())
    chosen = selection.weights @ loss(model, pool)[selection.indices]
    found = torch.autograd.grad(chosen, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).reshape(-1) if g is None else g.reshape(-1)
            for p, g in zip(parameters, found, strict=True)
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Accumulation, pieces, targets


def test_two_backward_calls_add_up():
    model = gpt(torch.float64)
    selector, parts = make(model), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        pool, target = tokens(8), tokens(3)
        clear(model)
        selector.backward(pool, target)
        parts.append(grads(model))
    clear(model)
    for seed in (1, 2):
        torch.manual_seed(seed)
        selector.backward(tokens(8), tokens(3))
    close(grads(model), parts[0] + parts[1], 1e-12)


@pytest.mark.parametrize("target", [True, False])
@pytest.mark.parametrize("piece", [1, 3, 8, 99])
def test_pieces_make_the_whole(piece, target):
    model = gpt(torch.float64)
    pool, target = tokens(8), tokens(5) if target else None
    whole = make(model).backward(pool, target)
    expected = grads(model)
    clear(model)
    got = make(model, micro_batch=piece).backward(pool, target)
    assert got.indices.tolist() == whole.indices.tolist()
    close(got.scores, whole.scores, 1e-12)
    close(grads(model), expected, 1e-12)


class Ragged(nn.Module):
    """Trims padding to the longest sequence of the batch: pieces come with other lengths."""

    def __init__(self):
        super().__init__()
        self.gpt = gpt(torch.float64)

    def forward(self, batch):
        x, lengths = batch["x"], batch["lengths"]
        t = int(lengths.max())
        loss = F.cross_entropy(self.gpt(x[:, : t - 1]).transpose(1, 2), x[:, 1:t], reduction="none")
        mask = torch.arange(1, t) < lengths[:, None]
        return (loss * mask).sum(1) / mask.sum(1)


def test_pieces_of_other_lengths():
    torch.manual_seed(0)
    model = Ragged()
    draw = lambda n: {"x": tokens(n, 9), "lengths": torch.randint(3, 10, (n,))}  # noqa: E731
    pool, target = draw(8), draw(4)
    whole = make(model, lambda m, b: m(b)).backward(pool, target)
    expected = grads(model)
    clear(model)
    got = make(model, lambda m, b: m(b), micro_batch=2).backward(pool, target)
    close(got.scores, whole.scores, 1e-12)
    close(grads(model), expected, 1e-12)


@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("guard", [0.0, 0.3])
def test_several_targets(m, guard):
    """The target's mean gradient is that of its rows, not an outer product of means."""
    model = gpt(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    pool, target = tokens(8), tokens(m)
    guard = guard if m > 1 else 0.0
    got = FilterThenWeight(model, optimizer, models.lm_loss, keep=3, guard=guard).select(pool, target)
    one = lambda batch, i: batch[i : i + 1]  # noqa: E731
    rows, goal = (
        torch.cat([g.flatten(1) for g in models.per_sample_gradients(model, models.lm_loss, b, one).values()], 1)
        for b in (pool, target)
    )
    close(got.scores, rows @ goal.mean(0), 1e-10)


def test_more_targets_than_candidates():
    model = gpt()
    got = make(model).backward(tokens(4), tokens(20))
    assert len(set(got.indices.tolist())) == 3


def test_no_target_takes_the_pools_own_mean():
    model = gpt(torch.float64)
    pool = tokens(8)
    a, b = make(model, guard=0.0).select(pool, None), make(model, guard=0.0).select(pool, pool)
    close(a.scores, b.scores, 1e-10)
    close(a.target_loss, b.target_loss, 1e-12)


def test_batches_of_other_sizes():
    """One selector, pools and targets of any size and length: the answer is that of a fresh selector."""
    model = gpt(torch.float64)
    selector = make(model)
    for n, m, t in [(8, 3, 8), (4, 4, 4), (3, 2, 3), (16, 5, 16), (5, 2, 2)]:
        pool, target = tokens(n, t), tokens(m, t)
        close(selector.select(pool, target).scores, make(model).select(pool, target).scores, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpointing


class Checkpointed(models.GPT):
    def __init__(self, reentrant=None, **options):
        super().__init__(**options)
        self.reentrant = reentrant
        self.gain = nn.Parameter(torch.rand(8))

    def block(self, h, i):
        n, t, _ = h.shape
        b = self.blocks[i]
        q, k, v = b["qkv"](b["norm1"](h)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + b["out"](a.transpose(1, 2).reshape(n, t, -1)) * (1 + self.gain)
        return h + F.dropout(b["down"](F.gelu(b["up"](b["norm2"](h)))), 0.2)

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        for i in range(len(self.blocks)):
            if self.reentrant is None:
                h = self.block(h, i)
            else:
                h = checkpoint(self.block, h, i, use_reentrant=self.reentrant)
        return self.head(self.norm(h))


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("guard", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, guard, micro_batch):
    """Exact, with dropout inside the region, tied weights and parameters that enter it through arithmetic."""
    torch.manual_seed(0)
    model = Checkpointed(d=8, t=16).double()
    pool, target = tokens(8), tokens(4)
    selector = make(model, guard=guard, micro_batch=micro_batch)
    torch.manual_seed(5)
    whole = selector.backward(pool, target)
    expected = grads(model)
    clear(model)
    model.reentrant = reentrant
    torch.manual_seed(5)
    got = make(model, guard=guard, micro_batch=micro_batch).backward(pool, target)
    close(got.scores, whole.scores, 1e-12)
    close(grads(model), expected, 1e-12)


def test_checkpoints_in_checkpoints():
    """Reentrant ones hide the inner region, which then goes one sample at a time; ``.grad`` is added to as ever."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(5, k) for k in (5, 5, 3))
            self.reentrant = None

        def inner(self, h):
            return torch.tanh(self.b(h))

        def forward(self, x):
            if self.reentrant is None:
                return self.c(self.inner(self.a(x)))
            run = functools.partial(checkpoint, use_reentrant=self.reentrant)
            return self.c(run(lambda h: run(self.inner, h), self.a(x)))

    torch.manual_seed(0)
    model = Model().double()
    pool, target = ((torch.randn(n, 5).double(), torch.randint(0, 3, (n,))) for n in (6, 3))
    results = []
    for model.reentrant in (None, False, True):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'b.*' enters a function that PyTorch does not show")
            make(model, models.classifier_loss, guard=0.0).backward(pool, target)
        results.append(grads(model))
    for found in results[1:]:
        close(found, results[0], 1e-12)


def test_checkpointing_and_a_function_without_a_rule():
    class Model(Checkpointed):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.pair = models.Unruled(8)

        def block(self, h, i):
            return super().block(self.pair(h, h), i)

    results = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Model(reentrant, d=8, t=16).double()
        pool, target = tokens(6), tokens(3)
        selector = make(model, guard=0.0)
        torch.manual_seed(5)
        with pytest.warns(UserWarning, match="tensordot"):
            scores = selector.backward(pool, target).scores
        results.append((scores, grads(model)))
        assert all(p.grad is not None for p in model.pair.parameters())
    for scores, g in results[1:]:
        close(scores, results[0][0], 1e-12)
        close(g, results[0][1], 1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_transformers(reentrant):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config).train()

    def loss(m, x):
        return F.cross_entropy(m(input_ids=x).logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)

    pool, target = tokens(6), tokens(3)
    expected = make(model, loss).backward(pool, target).scores
    g = grads(model)
    clear(model)
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    got = make(model, loss).backward(pool, target)
    close(got.scores, expected, 1e-5)
    close(grads(model), g, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# 16 bits


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside):
    """Within the rounding of bfloat16 of per-sample autograd under the same autocast."""
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def loss(m, x):
        if outside:
            return models.lm_loss(m, x)
        with torch.autocast("cpu", torch.bfloat16):
            return models.lm_loss(m, x)

    pool, target = tokens(8), tokens(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=outside):
        got = FilterThenWeight(model, optimizer, loss, keep=3, guard=0.0).backward(pool, target)
        assert torch.is_autocast_enabled("cpu") == outside
        one = lambda batch, i: batch[i : i + 1]  # noqa: E731
        explicit, goal = (models.per_sample_gradients(model, loss, b, one) for b in (pool, target))
    rows, goal = (torch.cat([g.flatten(1) for g in e.values()], 1) for e in (explicit, goal))
    close(got.scores, rows @ goal.mean(0), 0.01)
    weights = torch.zeros(8).index_add(0, got.indices, got.weights)
    close(grads(model), weights @ rows, 0.01)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_a_model_in_sixteen_bits():
    model = gpt(torch.bfloat16)
    wide = gpt()
    wide.load_state_dict(model.state_dict())
    pool, target = tokens(8), tokens(4)
    got = make(model, optimizer=torch.optim.SGD, guard=0.0).backward(pool, target)
    exact = make(wide, optimizer=torch.optim.SGD, guard=0.0).select(pool, target)
    close(got.scores, exact.scores, 0.05)
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}


def test_dtypes_are_kept():
    """A model in float64 is scored in float64; with mixed parameters each record keeps its own dtype."""
    model = gpt(torch.float64)
    assert make(model).select(tokens(8), tokens(3)).scores.dtype == torch.float64
    mixed = gpt()
    mixed.norm.double()

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = mixed

        def forward(self, x):
            h = self.m.tokens(x)
            return self.m.head(self.m.norm(h.double()).float())

    model = Mixed()
    got = make(model).backward(tokens(8), tokens(3))
    assert got.scores.dtype == torch.float64
    assert model.m.norm.weight.grad.dtype == torch.float64
    assert model.m.head.weight.grad.dtype == torch.float32


def test_gradient_scaler():
    """The selection is that without a scaler, and so is the step it makes."""
    results = []
    for enabled in (False, True):
        model = gpt(torch.float64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, enabled=enabled)
        selector = FilterThenWeight(model, optimizer, models.lm_loss, keep=3, scaler=scaler)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            selection = selector.backward(tokens(8), tokens(3))
            scaler.step(optimizer)
            scaler.update()
        results.append((selection, torch.cat([p.detach().reshape(-1) for p in model.parameters()])))
    (a, x), (b, y) = results
    assert a.indices.tolist() == b.indices.tolist()
    close(b.weights, a.weights, 1e-7)
    close(b.losses, a.losses, 1e-10)
    close(b.target_loss, a.target_loss, 1e-10)
    close(y, x, 1e-10)


@pytest.mark.parametrize("where", ["pool", "target"])
def test_a_step_that_overflows_is_skipped_by_the_scaler(where):
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)

    def loss(m, x):
        h = models.lm_loss(m, x)
        return h * (1 + (0 * h if overflow != len(x) else torch.sqrt(0 * h)))  # 0 * inf in the backward

    overflow = None
    selector = FilterThenWeight(model, optimizer, loss, keep=3, scaler=scaler)
    selector.backward(tokens(8), tokens(3))
    optimizer.zero_grad()
    overflow = {"pool": 8, "target": 3}[where]
    before = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    selection = selector.backward(tokens(8), tokens(3))
    assert int(selection.status) == 2
    assert bool(torch.isnan(selection.weights).all())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**13
    torch.testing.assert_close(torch.cat([p.detach().reshape(-1) for p in model.parameters()]), before)
    optimizer.zero_grad()
    overflow = None
    assert int(selector.backward(tokens(8), tokens(3)).status) == 0


# ---------------------------------------------------------------------------------------------------------------------
# Dropout, clipping, compilation


class Dropped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, x):
        return self.head(self.a(F.dropout(self.words(x), 0.2)))


@pytest.mark.parametrize("target", [True, False])
def test_the_mask_that_is_scored_is_the_mask_that_is_applied(target):
    torch.manual_seed(0)
    model = Dropped().double().train()
    pool, target = tokens(8), tokens(3) if target else None
    selector = make(model, guard=0.0)
    selector.select(pool, target)  # the audit of the first use
    torch.manual_seed(3)
    selection = selector.backward(pool, target)
    torch.manual_seed(3)
    if target is not None:
        models.lm_loss(model, target)
    close(grads(model), by_hand(model, models.lm_loss, pool, selection), 1e-10)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_dropout():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = peft.get_peft_model(
        transformers.LlamaForCausalLM(config), peft.LoraConfig(r=2, lora_dropout=0.4, target_modules="all-linear")
    )
    model.train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)

    def loss(m, x):
        return F.cross_entropy(m(input_ids=x).logits[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1)

    trained = nn.ParameterList(p for p in model.parameters() if p.requires_grad)
    selector = FilterThenWeight(model, torch.optim.AdamW(trained, lr=1e-2), loss, keep=3, guard=0.0)
    pool, target = tokens(8), tokens(3)
    selector.select(pool, target)
    torch.manual_seed(3)
    selection = selector.backward(pool, target)
    torch.manual_seed(3)
    loss(model, target)
    chosen = selection.weights @ loss(model, pool)[selection.indices]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(chosen, list(trained))])
    close(grads(trained), expected, 1e-5)


def test_clipping_follows_as_usual():
    model = gpt()
    make(model).backward(tokens(8), tokens(3))
    g = grads(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    close(norm, g.norm())
    close(grads(model), g * 0.01 / g.norm(), 1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    model = gpt()
    pool, target = tokens(8), tokens(3)
    expected = make(model).backward(pool, target)
    g = grads(model)
    clear(model)
    compiled = torch.compile(model, backend=backend)
    models.lm_loss(compiled, pool).mean().backward()  # compiled before the selector's first use
    clear(model)
    got = make(compiled).backward(pool, target)
    assert bool((got.scores != 0).any())
    close(got.scores, expected.scores, 1e-5)
    close(grads(model), g, 1e-5)
    model.compile(backend=backend)
    clear(model)
    close(make(model).backward(pool, target).scores, expected.scores, 1e-5)
    close(grads(model), g, 1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What stays as it was


def test_nothing_leaks():
    """Frozen parameters stay frozen and without gradient; no tensor, buffer or forward is replaced."""
    model = gpt()
    model.tokens.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: (p, p._version, p.data_ptr()) for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    forwards = [m.forward.__func__ for m in model.modules()]
    FilterThenWeight(model, optimizer, models.lm_loss, keep=3).backward(tokens(8), tokens(3))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.forward.__func__ for m in model.modules()] == forwards
    for name, p in model.named_parameters():
        assert (p, p._version, p.data_ptr()) == before[name] or p is before[name][0]
        assert p._version == before[name][1]
        assert (p.grad is None) == (not p.requires_grad)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


def test_what_was_not_used_gets_no_gradient():
    model = gpt()
    model.spare = nn.Linear(3, 3)
    make(model).backward(tokens(8), tokens(3))
    assert model.spare.weight.grad is None
    assert all(p.grad is not None for name, p in model.named_parameters() if "spare" not in name)


def test_state_dicts_keep_their_keys():
    models_, optimizers = zip(*[(m := gpt(), torch.optim.AdamW(m.parameters())) for _ in range(2)], strict=True)
    for model, optimizer in zip(models_, optimizers, strict=True):
        if model is models_[0]:
            FilterThenWeight(model, optimizer, models.lm_loss, keep=3).backward(tokens(8), tokens(3))
        else:
            models.lm_loss(model, tokens(8)).mean().backward()
        optimizer.step()
    assert models_[0].state_dict().keys() == models_[1].state_dict().keys()
    assert models_[0].__dict__.keys() == models_[1].__dict__.keys()
    a, b = (o.state_dict() for o in optimizers)
    assert a["state"].keys() == b["state"].keys()
    assert all(a["state"][i].keys() == b["state"][i].keys() for i in a["state"])
    assert [g.keys() for g in a["param_groups"]] == [g.keys() for g in b["param_groups"]]


def test_weights_are_a_distribution():
    for seed in range(5):
        model = gpt(seed=seed)
        got = make(model, keep=4).select(tokens(12), tokens(3))
        assert bool((got.weights >= 0).all())
        assert float(got.weights.sum()) == pytest.approx(1.0, abs=1e-5)
        assert len(set(got.indices.tolist())) == 4


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_changes_nothing(factor):
    model = gpt(torch.float64)
    pool, target = tokens(10), tokens(3)
    a = make(model, optimizer=torch.optim.SGD).select(pool, target)
    b = make(model, lambda m, x: factor * models.lm_loss(m, x), torch.optim.SGD).select(pool, target)
    assert a.indices.tolist() == b.indices.tolist()
    close(b.weights, a.weights)


def steps(count, **options):
    model = gpt()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    selector = FilterThenWeight(model, optimizer, models.lm_loss, keep=3, **options)
    for _ in range(count):
        optimizer.zero_grad()
        yield selector.backward(tokens(6), tokens(3))
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"guard": 0.0, "micro_batch": 3}])
def test_many_steps_do_not_grow(options):
    """Tensors alive after 10 steps are those alive after 60, and a selection's losses die with it."""
    running = steps(60, **options)
    counts, refs = [], []
    for step, selection in enumerate(running):
        refs.append(weakref.ref(selection.scores))
        del selection
        if step in (10, 59):
            gc.collect()
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[1] <= counts[0] + 5, counts
    assert sum(ref() is not None for ref in refs[:-1]) == 0


def test_graphs_are_freed_without_the_collector():
    """Records hold no history: a step's tensors die when it ends, not when cycles are looked for."""
    gc.collect()
    gc.disable()
    try:
        counts = []
        for step, _ in enumerate(steps(12)):
            if step in (5, 11):
                counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    finally:
        gc.enable()
    assert counts[1] <= counts[0] + 20, counts


@pytest.mark.slow
def test_a_thousand_steps():
    running = steps(1000)
    counts = []
    for step, _ in enumerate(running):
        if step in (50, 999):
            gc.collect()
            counts.append(sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects()))
    assert counts[1] <= counts[0] + 5, counts
