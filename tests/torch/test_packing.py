"""Packed batches against one document at a time: per-document autograd in float64."""

import math

import ftw_torch
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ftw_torch import FilterThenWeight, PackedBatch, SelectionError, documents
from torch import nn

import ftw

VOCABULARY, WIDTH, HEADS = 23, 12, 3
LENGTHS = ((5, 3, 4), (2, 6), (7, 1, 1, 3))  # of the documents in each row; rows are padded to 12


class Block(nn.Module):
    """Attention with norms of both kinds, biases, and a gain after heads have been split off."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.RMSNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=i != 1) for i in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)
        self.head_gain = nn.Parameter(torch.ones(WIDTH // HEADS))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.down_a, self.down_b = nn.Linear(2 * WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)  # LoRA

    def forward(self, x, mask, eager):
        rows, t, _ = x.shape
        y = self.before(x)
        q, k, v = (f(y).view(rows, t, HEADS, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        q = q * self.head_gain
        if eager:
            weights = (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])
            y = torch.softmax(weights.masked_fill(~mask, -1e9), -1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o(y.transpose(1, 2).reshape(rows, t, -1))
        h = F.gelu(self.up(self.after(x)).view(rows * t, -1))
        return x + (self.down(h) + self.down_b(self.down_a(h))).view(rows, t, -1)


class Model(nn.Module):
    def __init__(self, *, tied=True, blind=True, eager=False):
        super().__init__()
        self.blind, self.eager = blind, eager  # blind: to other documents
        self.embed, self.place = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(16, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input_ids, position_ids):
        t = input_ids.shape[1]
        number = (position_ids == 0).cumsum(1)
        causal = torch.ones(t, t, dtype=torch.bool).tril()
        mask = (number[:, :, None] == number[:, None, :]) & causal if self.blind else causal.expand(len(number), t, t)
        x = self.embed(input_ids) + self.place(position_ids)
        for block in self.blocks:
            x = block(x, mask[:, None], self.eager)
        return self.head(x)


def model(seed=0, **options):
    torch.manual_seed(seed)
    out = Model(**options).double()
    for p in out.parameters():
        p.data.add_(torch.randn_like(p), alpha=0.3)
    return out


def packed(lengths=LENGTHS, width=12, seed=0):
    """Rows of documents, and the documents one by one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (len(lengths), width), generator=generator)
    places, samples = torch.zeros_like(ids), torch.full_like(ids, -1)
    alone, n = [], 0
    for row, found in enumerate(lengths):
        start = 0
        for length in found:
            part = slice(start, start + length)
            places[row, part], samples[row, part] = torch.arange(length), n
            alone.append((ids[row : row + 1, part], places[row : row + 1, part]))
            start, n = start + length, n + 1
    return PackedBatch({"input_ids": ids, "position_ids": places}, samples), alone


def loss(model, batch):
    """The mean over a document's tokens of a loss that looks at each of them."""
    if not isinstance(batch, PackedBatch):
        values = model(**batch)
        return (
            F.cross_entropy(values.flatten(0, 1), batch["input_ids"].flip(1).flatten(), reduction="none")
            .view(len(values), -1)
            .mean(1)
        )
    logits = model(**batch.tensors)
    goal = (batch.tensors["input_ids"] * 5 + 3) % VOCABULARY
    values = F.cross_entropy(logits.flatten(0, 1), goal.flatten(), reduction="none").view_as(goal)
    return batch.mean(values)


def one_by_one(net, alone):
    """Gradients (n, p) of each document in a batch of its own, by autograd."""
    rows, values = [], []
    for ids, places in alone:
        value = F.cross_entropy(net(ids, places)[0], ((ids * 5 + 3) % VOCABULARY)[0])
        grads = torch.autograd.grad(value, list(net.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
        values.append(value.detach())
    return torch.stack(rows), torch.stack(values)


def flat_grad(net):
    return torch.cat([p.grad.reshape(-1) for p in net.parameters()])


def selector(net, keep=4, **options):
    return FilterThenWeight(net, torch.optim.AdamW(net.parameters(), lr=1e-2), loss, keep=keep, **options)


def close(got, wanted, tol=1e-10):
    got, wanted = got.detach(), wanted.detach()
    assert float((got - wanted).norm()) <= tol * float(wanted.norm())


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_the_update_is_that_of_one_document_at_a_time(tied, eager, optimizer):
    net = model(tied=tied, eager=eager)
    pool, alone = packed()
    goal, goals = packed(((3, 4), (6,)), seed=1)
    G, losses = one_by_one(net, alone)
    T, _ = one_by_one(net, goals)
    chooser = FilterThenWeight(net, optimizer(net.parameters(), lr=1e-2), loss, keep=4, shortlist=None, guard=0.0)
    selection = chooser.backward(pool, goal)
    close(flat_grad(net), selection.weights.double() @ G[selection.indices])
    close(selection.losses, losses)
    if optimizer is torch.optim.SGD:  # P is a number: scores and weights by the definition
        candidates = {"": ftw.Dense(G.numpy())}
        one = {"": ftw.Scale(1.0)}
        wanted = ftw.filter_then_weight(candidates, {"": T.mean(0).numpy()}, one, keep=4, guard=0.0)
        assert selection.indices.tolist() == wanted.indices.tolist()
        np.testing.assert_allclose(selection.weights, wanted.weights, rtol=1e-7, atol=1e-9)
        ratio = selection.scores.double() / (G @ T.mean(0))
        close(ratio, ratio[0].expand(len(ratio)), 1e-9)


def test_no_parameter_takes_a_slow_route():
    """A warning would be an error here."""
    net = model()
    pool, _ = packed()
    chooser = selector(net)
    chooser.select(pool, packed(seed=2)[0])
    assert not chooser.memory.slow


@pytest.mark.parametrize(
    "options", [{}, {"mode": "two_pass"}, {"micro_batch": 4}, {"micro_batch": 3, "mode": "two_pass"}]
)
@pytest.mark.parametrize("weight", ["qp", "uniform"])
def test_every_way_through_a_pool_gives_the_same(options, weight):
    net = model()
    (pool, alone), (goal, _) = packed(), packed(((3, 4), (6,)), seed=1)
    G, _ = one_by_one(net, alone)
    first = selector(net, weight=weight).select(pool, goal)
    selection = selector(net, weight=weight, **options).backward(pool, goal)
    assert selection.indices.tolist() == first.indices.tolist()
    np.testing.assert_allclose(selection.scores, first.scores, rtol=1e-9)
    np.testing.assert_allclose(selection.weights, first.weights, rtol=1e-7, atol=1e-9)
    close(flat_grad(net), selection.weights.double() @ G[selection.indices])


def test_the_target_may_be_an_ordinary_batch_and_the_pool_its_own_target():
    net = model()
    pool, alone = packed()
    G, _ = one_by_one(net, alone)
    ids = torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(3))
    plain = {"input_ids": ids, "position_ids": torch.arange(6).expand(4, 6)}
    for target in (plain, None):
        net.zero_grad()
        selection = selector(net).backward(pool, target)
        close(flat_grad(net), selection.weights.double() @ G[selection.indices])
    net.zero_grad()
    selection = selector(net, keep=2).backward(plain, pool)
    close(selection.target_loss, one_by_one(net, alone)[1].mean())


def test_scores_do_not_depend_on_how_documents_lie():
    net = model()
    goal, _ = packed(((3, 4), (6,)), seed=1)
    pool, alone = packed()
    first = selector(net).select(pool, goal)
    line = PackedBatch(  # one row, documents in reverse, as padding-free training has it
        {
            "input_ids": torch.cat([ids for ids, _ in alone[::-1]], 1),
            "position_ids": torch.cat([places for _, places in alone[::-1]], 1),
        },
        torch.cat([torch.full((ids.shape[1],), i) for i, (ids, _) in list(enumerate(alone))[::-1]])[None],
    )
    again = selector(net).select(line, goal)
    assert again.indices.tolist() == first.indices.tolist()
    np.testing.assert_allclose(again.scores, first.scores, rtol=1e-9)


@pytest.mark.parametrize("eager", [False, True])
def test_documents_that_look_at_each_other_are_refused(eager):
    net = model(blind=False, eager=eager)
    with pytest.raises(SelectionError, match=r"documents of the packed pool look at each other: .* position_ids"):
        selector(net).backward(packed()[0], {k: v[:2] for k, v in packed()[0].tensors.items()})
    assert all(p.grad is None for p in net.parameters())


def test_they_are_refused_when_they_first_share_a_row():
    net = model(blind=False)
    chooser = selector(net, keep=2)
    apart, _ = packed(((6,), (6,)), width=6)
    plain = dict(apart.tensors)
    chooser.backward(plain, plain)
    chooser.backward(apart, plain)  # one document in each row looks at nobody else
    with pytest.raises(SelectionError, match="look at each other"):
        chooser.backward(packed(((3, 3), (6,)), width=6)[0], plain)


def test_a_layer_across_borders_is_refused():
    class Convolved(Model):
        def __init__(self):
            super().__init__()
            self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, input_ids, position_ids):
            x = self.embed(input_ids) + self.place(position_ids)
            return self.head(self.mix(x.mT).mT)

    torch.manual_seed(0)
    net = Convolved().double()
    with pytest.raises(SelectionError, match="look at each other"):
        selector(net).backward(packed()[0], packed(seed=1)[0])


def test_a_parameter_without_a_rule_is_exact():
    """A learned place added by slice: no rule knows it beside documents, autograd does."""

    class Added(Model):
        def __init__(self):
            super().__init__()
            self.row = nn.Parameter(torch.randn(12, WIDTH))

        def forward(self, input_ids, position_ids):
            x = self.embed(input_ids) + self.place(position_ids) + self.row[: input_ids.shape[1]]
            return self.head(torch.tanh(x))

    torch.manual_seed(0)
    net = Added().double()
    pool, _ = packed()
    rows = [
        torch.autograd.grad(value, list(net.parameters()), retain_graph=True, allow_unused=True)
        for value in loss(net, pool)
    ]
    with pytest.warns(ftw_torch.CaptureWarning, match="row"):
        selection = selector(net).backward(pool, packed(seed=1)[0])
    for p, *grads in zip(net.parameters(), *rows, strict=True):
        if grads[0] is not None:
            stacked = torch.stack([grads[i] for i in selection.indices])
            close(p.grad, torch.tensordot(selection.weights.double(), stacked, 1))


def test_as_many_heads_as_tokens_are_not_confused():
    net = model()
    pool, alone = packed(((2, 1), (1, 2), (3,)), width=HEADS)
    G, _ = one_by_one(net, alone)
    selection = selector(net, keep=3).backward(pool, packed(seed=1)[0])
    close(flat_grad(net), selection.weights.double() @ G[selection.indices])


def test_micro_batches_need_documents_that_keep_to_rows():
    net = model()
    pool, _ = packed(((6,), (6,)), width=6)
    places = torch.tensor([[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]])
    crossing = PackedBatch(
        {**pool.tensors, "position_ids": places}, torch.tensor([[0, 0, 0, 0, 1, 1], [1, 1, 2, 2, 2, 2]])
    )
    with pytest.raises(ValueError, match="crosses rows"):
        selector(net, keep=2, micro_batch=2).select(crossing, pool)
    turned = PackedBatch(pool.tensors, torch.tensor([[1] * 6, [0] * 6]))
    with pytest.raises(ValueError, match="numbered row by row"):
        list(turned.split(1))
    lengths = PackedBatch({**pool.tensors, "cu_seqlens": torch.tensor([0, 6, 12])}, pool.samples)
    with pytest.raises(ValueError, match="no axis of rows"):
        list(lengths.split(1))
    pieces = list(packed()[0].split(4))
    assert [piece.n for piece in pieces] == [3, 2, 4]
    assert [piece.n for piece in packed()[0].split(5)] == [5, 4]


def test_take():
    pool, _ = packed()
    some = pool.take(torch.tensor([7, 3]))
    assert some.n == 2
    assert some.samples.tolist() == [[1, 1] + [-1] * 10, [-1] * 8 + [0] + [-1] * 3]
    assert torch.equal(some.tensors["input_ids"], pool.tensors["input_ids"][[1, 2]])
    twice = pool.take(torch.tensor([4, 4]))
    assert twice.samples.tolist() == [[-1, -1] + [i] * 6 + [-1] * 4 for i in range(2)]


@pytest.mark.parametrize(
    ("samples", "error", "match"),
    [
        (torch.zeros(3, 12), TypeError, "integers"),
        ([[0]], TypeError, "list"),
        (torch.zeros(12, dtype=torch.int64), ValueError, "rows, T"),
        (torch.zeros(3, 5, dtype=torch.int64), ValueError, "no tensor has the leading axes"),
        (torch.full((3, 12), -1), ValueError, "0 .. n - 1"),
        (torch.full((3, 12), -2), ValueError, "0 .. n - 1"),
        (torch.full((3, 12), 2), ValueError, "\\[0, 1\\] have no token"),
    ],
)
def test_wrong_numbers_are_named(samples, error, match):
    with pytest.raises(error, match=match):
        PackedBatch(packed()[0].tensors, samples)


def test_several_losses_a_document_are_refused():
    net = model()
    chooser = FilterThenWeight(net, torch.optim.SGD(net.parameters()), lambda m, b: m(**b.tensors).mean((1, 2)), keep=2)
    with pytest.raises(ValueError, match="one loss for each"):
        chooser.select(packed()[0], packed(seed=1)[0])


def test_documents_are_read_from_what_trainers_give():
    places = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    wanted = [[0, 0, 0, 1, 1], [2, 3, 3, 3, 3]]
    ids = torch.zeros(2, 5, dtype=torch.int64)
    assert documents({"input_ids": ids, "position_ids": places}).tolist() == wanted
    index = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=torch.int32)
    assert documents({"seq_idx": index, "position_ids": torch.zeros(2, 5)}).tolist() == wanted
    cumulated = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    for name in ("cu_seq_lens_q", "cu_seqlens"):
        assert documents({"input_ids": ids[:1, :1].expand(1, 6), name: cumulated}).tolist() == [[0, 0, 0, 1, 1, 2]]
        assert documents({name: cumulated}).tolist() == [[0, 0, 0, 1, 1, 2]]
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 0, 1]])
    padded = {"position_ids": torch.tensor([[0, 1, 0, 1, 0], [0, 0, 1, 0, 2]]), "attention_mask": mask}
    assert documents(padded).tolist() == [[0, 0, 1, 1, -1], [-1, 2, 2, -1, 3]]
    with pytest.raises(ValueError, match="says nothing about its documents"):
        documents({"input_ids": ids})
    with pytest.raises(ValueError, match="position_ids"):
        documents({"input_ids": ids, "position_ids": places[0]})
    with pytest.raises(ValueError, match="one row"):
        documents({"input_ids": ids, "cu_seqlens": cumulated})


def test_gains_and_shifts_of_every_shape():
    class Gains(Model):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(shape)) for shape in ((), (HEADS, 1), (1, 1, WIDTH)))
            self.d, self.e, self.f = nn.Parameter(torch.randn(WIDTH)), nn.Linear(WIDTH, 1), nn.Parameter(torch.randn(4))

        def forward(self, input_ids, position_ids):
            x = self.embed(input_ids) + self.place(position_ids)
            x = torch.tanh(self.a * x + self.c) * torch.tanh(self.e(x) * self.d)
            x = x.unflatten(-1, (HEADS, -1)) * self.b
            x = (x.transpose(1, 2) - self.f).transpose(1, 2).flatten(2)
            return self.head(x)

    torch.manual_seed(0)
    net = Gains().double()
    pool, alone = packed()
    G = [torch.autograd.grad(v, list(net.parameters()), retain_graph=True, allow_unused=True) for v in loss(net, pool)]
    for i, document in enumerate(alone):  # the losses of the packed batch are those of documents alone
        one = PackedBatch(
            dict(zip(("input_ids", "position_ids"), document, strict=True)), torch.zeros_like(document[0])
        )
        close(loss(net, one)[0], loss(net, pool)[i])
    chooser = selector(net)
    selection = chooser.backward(pool, packed(seed=1)[0])
    assert not chooser.memory.slow
    for p, *grads in zip(net.parameters(), *G, strict=True):
        if grads[0] is not None:
            close(
                p.grad,
                torch.tensordot(selection.weights.double(), torch.stack([grads[i] for i in selection.indices]), 1),
            )


def causal_loss(net, batch):
    """What a causal language model is trained on, each document for itself."""
    ids, samples = batch.tensors["input_ids"], batch.samples
    logits = net(**batch.tensors, use_cache=False).logits
    values = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none").view_as(samples)
    follows = samples == samples.roll(-1, 1)
    follows[:, -1] = False
    return batch.mean(values, follows)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # by peft
@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_transformers_pack_by_position_ids(kind):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    size = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **size)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    else:
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
        config = transformers.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, **heads, **size)
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if kind == "lora":
        net = peft.get_peft_model(
            net, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        )
    net = net.double().train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    pool, alone = packed(((5, 3, 4), (2, 10), (7, 2, 3)))
    rows = []
    for ids, _ in alone:
        value = F.cross_entropy(net(input_ids=ids, use_cache=False).logits[0, :-1], ids[0, 1:])
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters)]))
    chooser = FilterThenWeight(net, torch.optim.AdamW(parameters, lr=1e-3), causal_loss, keep=3)
    selection = chooser.backward(pool, packed(((4, 6), (8, 2)), width=10, seed=1)[0])
    assert not chooser.memory.slow
    wanted = selection.weights.double() @ torch.stack(rows)[selection.indices]
    close(torch.cat([p.grad.reshape(-1) for p in parameters]), wanted)


def test_transformers_without_positions_are_refused():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").double()
    pool, _ = packed(((5, 3, 4), (2, 10)))
    blind = PackedBatch({"input_ids": pool.tensors["input_ids"]}, pool.samples)
    with pytest.raises(SelectionError, match="documents of the packed target look at each other"):
        FilterThenWeight(net, torch.optim.SGD(net.parameters(), lr=1.0), causal_loss, keep=2).backward(blind, blind)


def test_documents_of_the_collators():
    transformers = pytest.importorskip("transformers")
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    texts = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5]}]
    packs = [{"input_ids": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]}, {"input_ids": [6, 7], "seq_lengths": [1, 1]}]
    free = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    assert documents(free(texts)).tolist() == [[0, 0, 0, 1, 1]]
    assert documents(free(packs)).tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(texts)
    assert documents(flat).tolist() == [[0, 0, 0, 1, 1]]
