"""Every layer and every way to use a parameter, against per-sample autograd: scores, Gram matrix, weighted gradient."""

import pytest
import torch
import torch.nn.functional as F
import torch_models as models
from torch import nn
from torch.utils.checkpoint import checkpoint

N = 4


class Model(nn.Module):
    """Parameters by name, modules by name, and a forward given as a function of (self, batch)."""

    def __init__(self, forward, parameters=None, **modules):
        super().__init__()
        self.run = forward
        for name, shape in (parameters or {}).items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 2))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def squares(model, batch):
    """A loss that depends on every output entry in its own way: (n,)."""
    out = model(batch)
    out = out[0] if isinstance(out, tuple) else out
    n = batch.shape[0] if isinstance(batch, torch.Tensor) else batch[0].shape[0]
    flat = out.reshape(n, -1)
    return (torch.sin(flat) * torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)).sum(1)


def tokens(t, vocabulary=11):
    return torch.randint(0, vocabulary, (N, t))


def table(padding=None):
    return nn.Embedding(11, 6, padding_idx=padding)


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is (d_in, d_out)."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) / 3)
        self.bias = nn.Parameter(torch.randn(d_out) / 3)

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Norm(nn.Module):
    """RMS normalisation as transformers writes it; Gemma adds one to the gain."""

    def __init__(self, d, plus_one=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d) / 3)
        self.plus_one = plus_one

    def forward(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        h = x.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + self.weight.to(wide))).type_as(x) if self.plus_one else self.weight * h.to(x.dtype)


class GatedLoRA(nn.Module):
    """A frozen layer and a low-rank update with a gain and a scaling of its own."""

    def __init__(self, d):
        super().__init__()
        self.base = nn.Linear(d, d).requires_grad_(False)
        self.a, self.b = nn.Linear(d, 2, bias=False), nn.Linear(2, d, bias=False)
        self.gain = nn.Parameter(torch.randn(d))

    def forward(self, x):
        return self.base(x) + self.b(self.a(x)) * self.gain * 0.5


class Experts(nn.Module):
    """A mixture: tokens are gathered for their expert, and put back by index_add."""

    def __init__(self, d, fused, dense_first=False):
        super().__init__()
        self.router = nn.Linear(d, 3)
        self.fused = fused
        if fused:
            self.up = nn.Parameter(torch.randn(3, d, d) / 2)
        else:
            self.up = nn.ModuleList(nn.Linear(d, d) for _ in range(3))

    def forward(self, x):
        h = x.reshape(-1, x.shape[-1])  # (n t, d)
        gates = self.router(h).softmax(-1)
        weight, choice = gates.topk(2, -1)
        hits = F.one_hot(choice, 3).permute(2, 1, 0)  # (3, 2, n t)
        out = torch.zeros_like(h)
        for e in range(3):
            slot, token = torch.where(hits[e])
            mine = h[token]
            y = F.linear(mine, self.up[e]) if self.fused else self.up[e](mine)
            out.index_add_(0, token, torch.tanh(y) * weight[token, slot, None])
        return out.reshape(x.shape)


def masked_expert(self, x):
    h = x.reshape(-1, x.shape[-1])
    mask = h[:, 0] > 0
    out = torch.zeros_like(h)
    out[mask] = torch.tanh(self.up(h[mask]))
    return out.view_as(x)


def labels(x):
    return x.argmax(-1) % 3


def sorted_experts(self, x):
    h = x.reshape(-1, x.shape[-1])
    choice = h.detach().argmax(1) % 2
    order = choice.argsort(stable=True)
    parts = h[order].split(torch.bincount(choice, minlength=2).tolist())
    y = torch.cat([torch.tanh(layer(part)) for layer, part in zip((self.up, self.down), parts, strict=True)])
    y = torch.cat([self.own(y[:2]), self.own(y.narrow(0, 2, len(y) - 2))])
    return torch.zeros_like(y).index_copy(0, order, y).view(*x.shape[:-1], -1)


def split_qkv(self, x):
    q, k, v = (F.linear(x, w, b) for w, b in zip(self.w.chunk(3), self.b.split(6), strict=True))
    return F.scaled_dot_product_attention(q, k, v)


def grouped_queries(self, x):
    n, t, _ = x.shape
    q = self.q(x).view(n, t, 4, 3).transpose(1, 2)
    k, v = (y.view(n, t, 2, 3).transpose(1, 2).repeat_interleave(2, dim=1) for y in (self.k(x), self.v(x)))
    return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(n, t, -1))


def written_in_place(self, x):
    s = self.s.clone()
    s[0] = 2.0
    s.mul_(3.0)
    both = self.s.new_zeros(2, 6)
    both[0], both[1] = self.b, self.b * s
    w = self.w.clone()
    w.tril_()
    return F.linear(x * s + both[1], w) * both[0]


def time_major(self, x):
    h = self.first(x.transpose(0, 1))  # (t, n, d)
    h = self.norm(h) * self.gain + self.shift[: h.shape[0], None]
    return self.second(h.reshape(-1, 6)).view(*h.shape).transpose(0, 1)


def rounds(self, x):
    n = x.shape[0]
    h = self.a(x.repeat(3, 1, 1)).view(3, n, *x.shape[1:])
    h = h * torch.arange(1.0, 4.0, dtype=x.dtype)[:, None, None, None]
    g = self.b(x.repeat_interleave(2, 0).sin()).view(n, 2, *x.shape[1:])
    both = torch.stack([h.sum(0), g[:, 0] - 2 * g[:, 1]])
    return self.c(torch.cat([x, x.cos()], 0)[n:]) + both[0] * both[1]


def cells(self, x):
    state, pair = None, isinstance(self.cell, nn.LSTMCell)
    for t in range(3):
        state = self.cell(x[:, t], state)
        if t == 0 and not pair:
            state = state + self.h0(x[:, 0])
    return state[0] * state[1] if pair else state


def twins(self, x):
    a, b = self.tower(torch.cat([x, x.flip(1)], 0)).chunk(2, 0)
    return a * torch.sigmoid(b)


FLOATS = {
    "linear": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)),
    "conv1d of gpt2": lambda: nn.Sequential(Conv1D(6, 5), nn.GELU(), Conv1D(5, 6)),
    "layer norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2)),
    "layer norm, bias only": lambda: nn.Sequential(nn.Linear(6, 6), _frozen(nn.LayerNorm(6), "weight")),
    "layer norm over two axes": lambda: nn.Sequential(nn.Linear(6, 6), nn.Unflatten(2, (2, 3)), nn.LayerNorm((2, 3))),
    "rms norm": lambda: nn.Sequential(nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 2)),
    "rms norm, transformers": lambda: nn.Sequential(nn.Linear(6, 6), Norm(6), nn.Linear(6, 2)),
    "rms norm, gemma": lambda: nn.Sequential(nn.Linear(6, 6), Norm(6, plus_one=True), nn.Linear(6, 2)),
    "first layer is a norm": lambda: nn.Sequential(nn.LayerNorm(6), Norm(6)),
    "lora by hand": lambda: nn.Sequential(GatedLoRA(6), nn.Tanh(), GatedLoRA(6)),
    "used twice": lambda: _twice(nn.Linear(6, 6), nn.LayerNorm(6)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
    "prelu": lambda: nn.Sequential(nn.Linear(6, 6), nn.PReLU()),
    "grouped queries": lambda: Model(
        grouped_queries, q=nn.Linear(6, 12), k=nn.Linear(6, 6), v=nn.Linear(6, 6), o=nn.Linear(12, 6)
    ),
    "x @ W": lambda: Model(lambda m, x: torch.tanh(x @ m.w) @ m.v, {"w": (6, 5), "v": (5, 3)}),
    "x @ W.T": lambda: Model(lambda m, x: torch.tanh(x @ m.w.T) @ m.v.t(), {"w": (5, 6), "v": (3, 5)}),
    "matmul, mT": lambda: Model(lambda m, x: torch.matmul(x, m.w.mT), {"w": (5, 6)}),
    "x @ w": lambda: Model(lambda m, x: x @ m.w, {"w": (6,)}),
    "W @ x": lambda: Model(lambda m, x: m.w @ x.mT, {"w": (5, 6)}),
    "scale and shift": lambda: Model(
        lambda m, x: m.s * x / m.d + m.b - m.c, {"s": (), "b": (6,), "c": (1, 6), "d": (6,)}
    ),
    "in place": lambda: Model(lambda m, x: (x * 1.0).mul_(m.s).add_(m.b), {"s": (6,), "b": (6,)}),
    "a constant less a weight": lambda: Model(
        lambda m, x: x * (torch.ones(6, dtype=x.dtype) - m.s) + torch.add(torch.ones(6, dtype=x.dtype), m.b, alpha=2),
        {"s": (6,), "b": (6,)},
    ),
    "a weight written in place": lambda: Model(written_in_place, {"s": (6,), "b": (6,), "w": (6, 6)}),
    "powers": lambda: Model(
        lambda m, x: torch.exp(m.s) * x**2 + torch.where(x > 0, m.b, m.c), {"s": (6,), "b": (6,), "c": ()}
    ),
    "a frozen weight, its bias trained": lambda: _frozen(nn.Linear(6, 5), "weight"),
    "a trained weight, its bias frozen": lambda: _frozen(nn.Linear(6, 5), "bias"),
    "class token": lambda: Model(
        lambda m, x: m.mix(torch.cat([m.cls.expand(x.shape[0], -1, -1), x], 1) + m.pos[:, : x.shape[1] + 1]),
        {"cls": (1, 1, 6), "pos": (1, 99, 6)},
        mix=nn.Linear(6, 6),
    ),
    "class token, repeated": lambda: Model(
        lambda m, x: torch.cat([m.cls.repeat(x.shape[0], 1, 1), x], 1), {"cls": (1, 1, 6)}
    ),
    "prompt": lambda: Model(
        lambda m, x: m.mix(torch.cat((m.prompt[None].expand(x.shape[0], *m.prompt.shape), x), dim=-2)),
        {"prompt": (3, 6)},
        mix=nn.Linear(6, 6),
    ),
    "positions": lambda: Model(
        lambda m, x: torch.sin(x + m.pos[: x.shape[1]]) * m.gain[:, None], {"pos": (99, 6), "gain": (1,)}
    ),
    "position numbers (1, t)": lambda: Model(
        lambda m, x: torch.sin(x + m.pos(torch.arange(x.shape[1])[None])), pos=nn.Embedding(99, 6)
    ),
    "position numbers (n, t)": lambda: Model(
        lambda m, x: torch.sin(x + m.pos(torch.arange(x.shape[1]).expand(x.shape[0], -1))), pos=nn.Embedding(99, 6)
    ),
    "position numbers (t,)": lambda: Model(
        lambda m, x: torch.sin(x + m.norm(m.pos(torch.arange(x.shape[1])))),
        pos=nn.Embedding(99, 6),
        norm=nn.LayerNorm(6),
    ),
    "relative positions": lambda: Model(
        lambda m, x: (
            (x @ x.mT + m.pos(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1]) + 50).permute(2, 0, 1)[0])
            @ x
        ),
        pos=nn.Embedding(99, 2),
    ),
    "a network of the positions": lambda: Model(
        lambda m, x: x * torch.tanh(m.make(torch.linspace(0, 1, x.shape[1], dtype=x.dtype)[:, None])),
        make=nn.Linear(1, 6),
    ),
    "blocks of a weight": lambda: Model(split_qkv, {"w": (18, 6), "b": (18,)}),
    "columns of a weight": lambda: Model(lambda m, x: torch.tanh(x @ m.w[:, :3]) @ m.w[:3, 3:], {"w": (6, 8)}),
    "merged low rank": lambda: Model(
        lambda m, x: F.linear(x, m.w + m.b @ m.a), {"w": (5, 6), "b": (5, 2), "a": (2, 6)}
    ),
    "cast weights": lambda: Model(lambda m, x: F.linear(x, m.w.to(x.dtype), m.b.to(x.dtype)), {"w": (5, 6), "b": (5,)}),
    "an unused parameter": lambda: Model(lambda m, x: x @ m.w, {"w": (6, 2), "other": (3, 3)}),
    "time first": lambda: Model(
        time_major,
        {"gain": (6,), "shift": (99, 6)},
        first=nn.Linear(6, 6),
        second=nn.Linear(6, 6),
        norm=nn.LayerNorm(6),
    ),
    "two towers in one batch": lambda: Model(twins, tower=nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))),
    "several rounds through the batch": lambda: Model(rounds, a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 6)),
    "attention, batch first": lambda: Model(
        lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(6, 2, batch_first=True)
    ),
    "attention, time first": lambda: Model(
        lambda m, x: m.a(x.transpose(0, 1), x.transpose(0, 1).tanh(), x.transpose(0, 1), need_weights=False)[
            0
        ].transpose(0, 1),
        a=nn.MultiheadAttention(6, 2),
    ),
    "cross attention, own widths": lambda: Model(
        lambda m, x: m.a(x, x[..., :4].tanh(), x[..., 2:])[0],
        a=nn.MultiheadAttention(6, 3, kdim=4, vdim=4, batch_first=True, bias=False),
    ),
    "encoder layer": lambda: nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True, norm_first=True),
    "encoder layer, time first": lambda: Model(
        lambda m, x: m.a(x.transpose(0, 1)).transpose(0, 1),
        a=nn.TransformerEncoderLayer(6, 2, 8, 0.0, activation="gelu"),
    ),
    "decoder layer": lambda: Model(
        lambda m, x: m.a(
            x, x.flip(1), tgt_is_causal=True, tgt_mask=nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        ),
        a=nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True),
    ),
    "learned queries": lambda: Model(
        lambda m, x: F.scaled_dot_product_attention(m.q.expand(x.shape[0], -1, -1), x, x), {"q": (1, 3, 6)}
    ),
    "learned queries of a module": lambda: Model(
        lambda m, x: m.n(m.a(m.q.expand(len(x), -1, -1), x, x)[0] + m.b(m.q.repeat(len(x), 1, 1), x, x)[0]),
        {"q": (1, 3, 6)},
        a=nn.MultiheadAttention(6, 2, batch_first=True),
        b=nn.MultiheadAttention(6, 2, batch_first=True),
        n=nn.LayerNorm(6),
    ),
    "decoder of learned queries": lambda: Model(
        lambda m, x: m.a(m.q.weight.expand(len(x), -1, -1), x),
        a=nn.TransformerDecoderLayer(6, 2, 8, 0.0, batch_first=True),
        q=nn.Embedding(3, 6),
    ),
    **{
        f"cell, {kind.__name__} {options}": lambda kind=kind, options=options: Model(
            cells, cell=kind(6, 3, **options), h0=None if kind is nn.LSTMCell else nn.Linear(6, 3)
        )
        for kind, options in (
            (nn.RNNCell, {}),
            (nn.RNNCell, {"nonlinearity": "relu", "bias": False}),
            (nn.GRUCell, {}),
            (nn.LSTMCell, {}),
        )
    },
    "learned queries, written out": lambda: Model(
        lambda m, x: torch.softmax(m.q[None].expand(x.shape[0], -1, -1) @ x.mT, -1) @ x, {"q": (3, 6)}
    ),
    "experts, modules": lambda: Experts(6, fused=False),
    "experts, one parameter": lambda: Experts(6, fused=True),
    "experts, masked": lambda: Model(masked_expert, up=nn.Linear(6, 6)),
    "instance norm": lambda: Model(
        lambda m, x: m.norm(m.a(x).transpose(1, 2)), a=nn.Linear(6, 6), norm=nn.InstanceNorm1d(6, affine=True)
    ),
    "changed in place": lambda: nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
    "a sum kept on the side": lambda: Model(
        lambda m, x: m.a(x) + 0 * torch.zeros((), dtype=x.dtype).add_(x.detach().sum()), a=nn.Linear(6, 3)
    ),
    "a product named in full": lambda: Model(
        lambda m, x: torch.mm(x.reshape(-1, 6), mat2=m.w).view(len(x), -1, 3), {"w": (6, 3)}
    ),
    "a product for each head": lambda: Model(lambda m, x: x[:, None] @ m.w, {"w": (3, 6, 2)}),
    "bilinear": lambda: Model(lambda m, x: m.b(x[..., :4], x.tanh()), b=nn.Bilinear(4, 6, 2)),
    "einsum, a matrix": lambda: Model(lambda m, x: torch.einsum("nti,oi->nto", x, m.w), {"w": (3, 6)}),
    "einsum, heads in and out": lambda: Model(
        lambda m, x: torch.einsum("nthk,hko -> nto", torch.einsum("nti,ihk->nthk", x, m.w).tanh(), m.v),
        {"w": (6, 2, 3), "v": (2, 3, 4)},
    ),
    "einsum, turned": lambda: Model(
        lambda m, x: torch.einsum("hio,tni->nhto", (m.w, x.transpose(0, 1))), {"w": (2, 6, 3)}
    ),
    "einsum, a batch of products": lambda: Model(
        lambda m, x: torch.einsum("nthi,hio->ntho", x.unflatten(-1, (2, 3)), m.w), {"w": (2, 3, 4)}
    ),
    "einsum, a batch of products, in another order": lambda: Model(
        lambda m, x: torch.einsum("hgoi,itngh->notgh", m.w, x.transpose(0, 1).unflatten(-1, (3, 2, 1)).movedim(2, 0)),
        {"w": (1, 2, 5, 3)},
    ),
    "einsum, a product for each token": lambda: Model(
        lambda m, x: torch.einsum("nti,tio->nto", x[:, :3], m.w), {"w": (3, 6, 2)}
    ),
    "experts, sorted tokens": lambda: Model(
        sorted_experts, up=nn.Linear(6, 3), down=nn.Linear(6, 3), own=nn.Linear(3, 3)
    ),
    "single entries": lambda: Model(
        lambda m, x: (
            m.table[labels(x)[:, 1:], labels(x)[:, :-1] - 3] + m.line[labels(x)[:, 1:]] + m.line[-labels(x)[:, :1]]
        ),
        {"table": (3, 3), "line": (3,)},
    ),
    "a state of zeros": lambda: Model(
        lambda m, x: m.b(m.a(x.new_zeros(len(x), 3)) + x[:, 0]), a=nn.Linear(3, 6), b=nn.Linear(6, 3)
    ),
    "a product for each sample": lambda: Model(lambda m, x: torch.bmm(x, m.w.expand(len(x), -1, -1)), {"w": (6, 3)}),
}

AUTOGRAD = {
    "lstm": lambda: Model(lambda m, x: m.r(x)[0], r=nn.LSTM(6, 3, batch_first=True)),
    "tensordot": lambda: Model(lambda m, x: torch.tensordot(x, m.w, ([2], [1])), {"w": (3, 6)}),
    "einsum that repeats": lambda: Model(lambda m, x: torch.einsum("nti,oi->nto", x[..., :1], m.w), {"w": (3, 6)}),
    "made of parameters": lambda: Model(
        lambda m, x: (lambda w: F.linear(x, w) + torch.tensordot(x, m.v + w, ([2], [1])))(m.w * 2),
        {"w": (3, 6), "v": (3, 6)},
    ),
    "mixed uses": lambda: Model(lambda m, x: F.linear(x, m.w) + torch.tensordot(x, m.w, ([2], [1])), {"w": (3, 6)}),
}


def _frozen(module, *names):
    for name in names:
        getattr(module, name).requires_grad_(False)
    return module


def _twice(*modules):
    layers = nn.Sequential(*modules)
    return nn.Sequential(layers, nn.Tanh(), layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [N, 7])
@pytest.mark.parametrize("name", FLOATS)
def test_layers(name, t, dtype):
    torch.manual_seed(0)
    model = FLOATS[name]().to(dtype)
    models.assert_exact(model, squares, torch.randn(N, t, 6, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("name", FLOATS)
def test_one_sample(name):
    torch.manual_seed(0)
    batch = torch.randn(1, 5, 6, dtype=torch.float64)
    models.assert_exact(FLOATS[name]().double(), squares, batch, dtype=torch.float64)


@pytest.mark.parametrize("name", AUTOGRAD)
def test_without_a_rule_autograd_decides(name):
    torch.manual_seed(0)
    model = AUTOGRAD[name]().double()
    every = {name for name, _ in model.named_parameters()}
    models.assert_exact(model, squares, torch.randn(N, 5, 6, dtype=torch.float64), slow=every, dtype=torch.float64)


class Patches(nn.Module):
    """A tiny vision transformer's stem: patches, a class token, positions."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 2, stride=2)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(1, 17, 6))

    def forward(self, x):
        h = self.patch(x).flatten(2).transpose(1, 2)
        return torch.cat((self.cls.expand(x.shape[0], -1, -1), h), dim=1) + self.pos


def frames(self, x):
    """Images of a video, folded into the batch."""
    h = x.reshape(-1, 3, 4, 8).contiguous()
    return self.norm(self.conv(h)).mean((2, 3)).view(x.shape[0], -1)


IMAGES = {
    "conv2d": lambda: nn.Conv2d(3, 4, 3),
    "conv2d, stride padding dilation": lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2)),
    "conv2d, no bias, one by one": lambda: nn.Sequential(nn.Conv2d(3, 5, 1, bias=False), nn.GroupNorm(1, 5)),
    "conv2d, groups": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.GELU(), nn.Conv2d(6, 4, 2, groups=2)),
    "conv2d, same": lambda: nn.Conv2d(3, 4, (1, 3), padding="same", dilation=(1, 2)),
    "conv2d, circular": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "conv2d, wide": lambda: nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.Tanh(), nn.Conv2d(16, 16, 2, stride=2)),
    "conv2d, wide and dilated": lambda: nn.Conv2d(3, 64, 3, stride=2, padding=1, dilation=3),
    "conv2d, frozen weight": lambda: _frozen(nn.Conv2d(3, 4, 3), "weight"),
    "transposed": lambda: nn.ConvTranspose2d(3, 2, 3, stride=2, padding=1, output_padding=1),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.PReLU(6)),
    "batch norm, fixed": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6).eval()),
    "patches": Patches,
    "frames": lambda: Model(frames, conv=nn.Conv2d(3, 6, 3), norm=nn.GroupNorm(3, 6)),
    "conv1d": lambda: nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 6, 3, padding=2, dilation=2), nn.Conv1d(6, 4, 2, groups=2)
    ),
    "conv1d, transposed": lambda: nn.Sequential(nn.Flatten(2), nn.ConvTranspose1d(3, 2, 3, stride=2)),
    "conv1d, same": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 5, padding="same")),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3, padding=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, N])
@pytest.mark.parametrize("name", IMAGES)
def test_convolutions(name, n, dtype):
    torch.manual_seed(0)
    models.assert_exact(IMAGES[name]().to(dtype), squares, torch.randn(n, 3, 8, 8, dtype=dtype), dtype=dtype)


class Words(nn.Module):
    """Embedding, mixing layer, head: tied as a module, tied by a function, or not."""

    def __init__(self, tie, padding=None):
        super().__init__()
        self.words, self.mix, self.tie = table(padding), nn.Linear(6, 6), tie
        if tie != "function":
            self.head = nn.Linear(6, 11)
        if tie == "module":
            self.head.weight = self.words.weight

    def forward(self, x):
        h = torch.tanh(self.mix(self.words(x)))
        return F.linear(h, self.words.weight) if self.tie == "function" else self.head(h)


INTEGERS = {
    "embedding": lambda: nn.Sequential(table(), nn.Linear(6, 3)),
    "embedding, padding_idx": lambda: nn.Sequential(table(3), nn.Linear(6, 3)),
    "embedding, negative padding_idx": lambda: nn.Sequential(table(-2), nn.Linear(6, 3)),
    "embedding of frozen words": lambda: nn.Sequential(table().requires_grad_(False), nn.Linear(6, 3)),
    "not tied": lambda: Words("no"),
    "tied module": lambda: Words("module"),
    "tied module, padding_idx": lambda: Words("module", 2),
    "tied by a function": lambda: Words("function"),
    "table[indices]": lambda: Model(lambda m, x: torch.sin(m.w[x]) * m.w[x - 11].tanh(), {"w": (11, 6)}),
    "flattened": lambda: Model(lambda m, x: m.w(x.reshape(-1)).view(*x.shape, 6), w=table()),
    "last token": lambda: Model(
        lambda m, x: m.head(torch.tanh(m.w(x))[torch.arange(x.shape[0]), (x > 3).sum(1) % x.shape[1]]),
        w=table(),
        head=nn.Linear(6, 3),
    ),
    "mask token": lambda: Model(
        lambda m, x: m.mix(torch.where((x == 3)[..., None], m.mask, m.w(x))),
        {"mask": (6,)},
        w=table(),
        mix=nn.Linear(6, 6),
    ),
    "kinds of tokens": lambda: Model(
        lambda m, x: m.norm(m.w(x) + m.kind(torch.zeros(x.shape, dtype=torch.long) + (torch.arange(x.shape[1]) > 2))),
        w=table(),
        kind=nn.Embedding(2, 6),
        norm=nn.LayerNorm(6),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t", [1, N, 7])
@pytest.mark.parametrize("name", INTEGERS)
def test_embeddings(name, t, dtype):
    torch.manual_seed(0)
    models.assert_exact(INTEGERS[name]().to(dtype), squares, tokens(t), dtype=dtype)


def test_renormalised_embedding_is_left_to_autograd():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 6, max_norm=1.0), nn.Linear(6, 3)).double()
    model(torch.arange(11))  # renormalises the whole table, so that no order of look-ups matters
    models.assert_exact(model, squares, tokens(7), slow={"0.weight"}, dtype=torch.float64)


def test_parameters_are_never_in_the_graph_of_a_pass():
    """Hooks of parameters (a sharded optimizer's) are not run by a selector's passes, by the slow route either."""
    model, calls = nn.Sequential(nn.Linear(6, 6), models.Unruled(6)), []
    mixed = Model(lambda m, x: m.b(m.a(x), x) * m.s, {"s": (1,)}, a=model[0], b=model[1])
    for p in mixed.parameters():
        p.register_hook(lambda g: calls.append(1))
        p.register_post_accumulate_grad_hook(lambda p: calls.append(2))
    x = torch.randn(N, 6)
    with pytest.warns(UserWarning, match="no rule"), models.Capture(dict(mixed.named_parameters()), N, [x]) as capture:
        capture.backward(squares(mixed, x))
    assert not calls
    assert all(p.grad is None for p in mixed.parameters())


def test_single_entries_out_of_range():
    model = Model(lambda m, x: m.table[x.argmax(-1), x.argmin(-1)], {"table": (6, 5)})
    x = torch.eye(6).flip(-1).repeat(N, 1, 1) - torch.eye(6)
    with pytest.raises(IndexError), models.Capture(dict(model.named_parameters()), N, [x]):
        model(x)


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize(
    "make", [lambda: nn.RMSNorm(6), lambda: Model(lambda m, x: torch.einsum("nti,oi->nto", x, m.w), {"w": (3, 6)})]
)
def test_a_checkpoint_that_ends_within_a_rule(make):
    """It stops its second forward by an exception as soon as the backward has what it needs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Checkpointed(make())).double()
    models.assert_exact(model, squares, torch.randn(N, 5, 6, dtype=torch.float64), dtype=torch.float64)
