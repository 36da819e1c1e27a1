"""Layers that run every rule of the PyTorch adapter, each by the functions that the rule stands for.

Functions of the same form (sums, products, forms of a matrix product) are read from the adapter's own registry, so that
a new one is in the table by itself, or has no row and fails the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from ftw_torch.capture import registry
from torch import Tensor, nn

__all__ = ["VOCABULARY", "D", "Layer", "every_layer"]

D, VOCABULARY = 6, 11


class Layer(NamedTuple):
    """One layer of the table."""

    make: Callable[[], nn.Module]
    inputs: str = "floats"  # (n, t, D); "words" (n, t); "images" (n, 3, 6, 5)
    by_token: bool = True  # whether a token's output depends on nothing but the token
    autocast: bool = True  # whether PyTorch runs it in 16 bits
    narrow: bool = False  # whether it has no float64
    packed: bool = True  # whether its rule takes documents side by side; if not, they are exact and slow
    function: Any = None  # the one that it calls: PyTorch may pass the call on to another of the same form


class Call(nn.Module):
    """Parameters and modules by name, and a forward that is a function of (self, x)."""

    def __init__(
        self, run: Callable[[Any, Tensor], Tensor], shapes: dict[str, Any] | None = None, **modules: Any
    ) -> None:
        super().__init__()
        self.run = run
        for name, shape in (shapes or {}).items():
            setattr(self, name, nn.Parameter(torch.randn(shape) / 2))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer."""
        return self.run(self, x)


def every_layer() -> dict[str, Layer]:
    """Return the layers by name."""
    return {**_products(), **_pointwise(), **_norms(), **_lookups(), **_convolutions(), **_mixing()}


def _products() -> dict[str, Layer]:
    def call(run: Any, shapes: Any = None, **options: Any) -> Layer:
        return Layer(lambda: Call(run, shapes), **options)

    table = {
        "linear": Layer(lambda: nn.Linear(D, 5)),
        "linear, no bias": Layer(lambda: nn.Linear(D, 5, bias=False)),
        "linear of columns": call(lambda m, x: F.linear(x[..., :4], m.w[:, 2:], m.b), {"w": (5, D), "b": (5,)}),
        "linear, low rank": call(lambda m, x: F.linear(x, m.w + m.a @ m.b), {"w": (5, D), "a": (5, 2), "b": (2, D)}),
        "bilinear": Layer(lambda: Call(lambda m, x: m.b(x[..., :4], x.tanh()), b=nn.Bilinear(4, D, 2)), autocast=False),
        "x @ w": call(lambda m, x: x @ m.w, {"w": (D,)}),
        "W @ x": call(lambda m, x: (m.w @ x.mT).mT, {"w": (5, D)}),
        "a product for each head": Layer(
            lambda: Call(lambda m, x: (x[:, None] @ m.w).movedim(1, 2), {"w": (3, D, 2)}), packed=False
        ),
        "einsum, a matrix": call(lambda m, x: torch.einsum("nti,oi->nto", x, m.w), {"w": (3, D)}),
        "einsum, heads": call(lambda m, x: torch.einsum("nti,ihk->nthk", x, m.w), {"w": (D, 2, 3)}),
        "einsum, products": Layer(
            lambda: Call(
                lambda m, x: torch.einsum("nthi,hio->ntho", x.reshape(*x.shape[:-1], 2, 3), m.w), {"w": (2, 3, 4)}
            ),
            packed=False,
        ),
    }
    for f in _functions("ftw_torch.capture.rules.linear"):
        word, home = _word(f), "Tensor" if _of_tensor(f) else "torch"
        if word == "addmm":
            table[f"{home}.addmm"] = call(
                lambda m, x, f=f: _flat(x, lambda y: f(m.b, y, m.w)), {"w": (D, 5), "b": (5,)}, function=f
            )
        elif word == "mm":
            table[f"{home}.mm"] = call(lambda m, x, f=f: _flat(x, lambda y: f(y, m.w)), {"w": (D, 5)}, function=f)
        elif word in ("matmul", "__matmul__"):
            table[f"{home}.{word}"] = call(lambda m, x, f=f: f(x, m.w), {"w": (D, 5)}, function=f)
        elif word == "bmm":
            table[f"{home}.bmm"] = call(
                lambda m, x, f=f: f(x, m.w.expand(len(x), -1, -1)), {"w": (D, 3)}, function=f, packed=False
            )
    return table


_METHODS = {id(f): word for kind in reversed(Tensor.__mro__) for word, f in vars(kind).items()}


def _of_tensor(f: Any) -> bool:
    return id(f) in _METHODS


def _word(f: Any) -> str:
    """Return a function's name: of two methods that are one function, what it is called in the class."""
    return str(_METHODS.get(id(f), f.__name__))


def _flat(x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return function(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


def _functions(module: str) -> list[Any]:
    """Return the functions whose rules live in a module of the adapter."""
    return [f for f, handler in registry.every_rule().items() if handler.__module__ == module]


_ARGUMENTS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {  # of functions that are no f(x, p)
    "where": lambda f, x, p: f(x, x > 0, p) if _of_tensor(f) else f(x > 0, p, x),
    "lerp": lambda f, x, p: f(x, p, 0.3),
    "addcmul": lambda f, x, p: f(x, x, p),
    "pow": lambda f, x, p: f(x.abs() + 1, p),
    "__pow__": lambda f, x, p: f(x.abs() + 1, p),
    "__rpow__": lambda f, x, p: f(p, x.abs() + 1),
    "div": lambda f, x, p: f(x, 3 + p.tanh()),
    "cat": lambda f, x, p: f([x, p.expand(*x.shape[:2], -1)], -1),
    "prelu": lambda f, x, p: f(x.reshape(-1, D), p).view(x.shape),
}
_ARGUMENTS |= dict.fromkeys(("concat", "concatenate"), _ARGUMENTS["cat"])
_ARGUMENTS |= dict.fromkeys(("divide", "true_divide", "__truediv__"), _ARGUMENTS["div"])
_ARGUMENTS |= dict.fromkeys(("__rdiv__", "__rtruediv__"), lambda f, x, p: f(3 + x.tanh(), p))


def _entry(f: Any, x: Tensor, p: Tensor) -> Tensor:
    word = _word(f)
    out: Tensor
    if (word.endswith("_") and not word.startswith("__")) or word.startswith("__i"):
        out = f(x * 1.0, 3 + p.tanh() if "div" in word else p)
    elif word in _ARGUMENTS:
        out = _ARGUMENTS[word](f, x, p)
    else:  # x - p of p.__rsub__(x)
        out = f(p, x) if word.startswith("__r") else f(x, p)
    return out


def _call_of(f: Any, name: str) -> Layer:
    return Layer(
        lambda: Call(lambda m, x: _entry(f, x, m.p), {"p": (D,)}),
        autocast=False,
        function=f,
        packed="cat" not in name,
    )


def _pointwise() -> dict[str, Layer]:
    """Return a layer for each function that aligns its tensors from the right."""
    table = {}
    for f in _functions("ftw_torch.capture.rules.elementwise"):
        home = "Tensor" if _of_tensor(f) else "torch"
        name = f"{home}.{_word(f)}"
        table[name] = _call_of(f, name)
    table["scale and shift"] = Layer(
        lambda: Call(lambda m, x: m.s * x / (3 + m.d.tanh()) + m.b - m.c, {"s": (), "b": (D,), "c": (1, D), "d": (D,)})
    )
    table["class token"] = Layer(
        lambda: Call(lambda m, x: torch.cat([m.cls.expand(len(x), -1, -1), x], 1), {"cls": (1, 2, D)}), by_token=False
    )
    table["positions"] = Layer(
        lambda: Call(lambda m, x: torch.sin(x + m.pos[: x.shape[1]]), {"pos": (9, D)}), by_token=False
    )
    return table


def _norms() -> dict[str, Layer]:
    def fixed(norm: Any) -> Any:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        return norm.eval()

    return {
        "layer norm": Layer(lambda: nn.LayerNorm(D)),
        "layer norm, gain only": Layer(lambda: nn.LayerNorm(D, bias=False)),
        "layer norm, two axes": Layer(lambda: nn.Sequential(nn.Unflatten(2, (2, 3)), nn.LayerNorm([2, 3]))),
        "rms norm": Layer(lambda: nn.RMSNorm(D)),
        "group norm": Layer(lambda: nn.GroupNorm(3, 3), "images", by_token=False),
        "instance norm": Layer(lambda: nn.InstanceNorm2d(3, affine=True), "images", by_token=False),
        "batch norm, fixed": Layer(lambda: fixed(nn.BatchNorm2d(3)), "images", by_token=False),
        "prelu, a slope a channel": Layer(lambda: nn.PReLU(3), "images", by_token=False),
    }


def _lookups() -> dict[str, Layer]:
    def words(run: Any, shapes: Any = None, **modules: Any) -> Layer:
        return Layer(lambda: Call(run, shapes, **modules), "words")

    return {
        "embedding": Layer(lambda: nn.Embedding(VOCABULARY, D), "words"),
        "embedding, padding_idx": Layer(lambda: nn.Embedding(VOCABULARY, D, padding_idx=3), "words"),
        "F.embedding, negative padding_idx": words(
            lambda m, x: F.embedding(x, m.w, padding_idx=-2), {"w": (VOCABULARY, D)}
        ),
        "W[indices]": words(lambda m, x: m.w[x] * m.w[x - VOCABULARY].tanh(), {"w": (VOCABULARY, D)}),
        "w[indices]": words(lambda m, x: m.w[x], {"w": (VOCABULARY,)}),
        "W[indices, indices]": Layer(
            lambda: Call(lambda m, x: m.w[x % 3, x.flip(1) % 4], {"w": (3, 4)}), "words", by_token=False
        ),
    }


def _convolutions() -> dict[str, Layer]:
    def images(make: Callable[[], nn.Module]) -> Layer:
        return Layer(make, "images", by_token=False)

    def flat(make: Callable[[], nn.Module]) -> Layer:
        return images(lambda: nn.Sequential(nn.Flatten(2), make()))

    def deep(make: Callable[[], nn.Module]) -> Layer:
        return images(lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), make()))

    def last(make: Callable[[], Any]) -> Layer:
        form: Any = torch.channels_last

        def run(m: Any, x: Tensor) -> Tensor:
            out: Tensor = m.c(x.contiguous(memory_format=form))
            return out

        return images(lambda: Call(run, c=make().to(memory_format=form)))

    return {
        "conv1d": flat(lambda: nn.Conv1d(3, 4, 3, stride=2, padding=1, dilation=2)),
        "conv1d, same, even": flat(lambda: nn.Conv1d(3, 4, 4, padding="same")),
        "conv1d, groups": flat(lambda: nn.Conv1d(3, 6, 3, groups=3)),
        "conv2d": images(lambda: nn.Conv2d(3, 4, 3)),
        "conv2d, wide": images(lambda: nn.Conv2d(3, 32, 3, stride=2)),
        "conv2d, same, even": images(lambda: nn.Conv2d(3, 4, (2, 4), padding="same")),
        "conv2d, same, even, wide, dilated": images(lambda: nn.Conv2d(3, 40, (4, 2), padding="same", dilation=(1, 2))),
        "conv2d, valid": images(lambda: nn.Conv2d(3, 4, 2, padding="valid")),
        "conv2d, unequal strides": images(lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1))),
        "conv2d, wide, unequal strides": images(lambda: nn.Conv2d(3, 48, (3, 2), stride=(3, 2), padding=(2, 1))),
        "conv2d, dilated": images(lambda: nn.Conv2d(3, 4, 2, dilation=(2, 3))),
        "conv2d, wide, dilated": images(lambda: nn.Conv2d(3, 64, 2, dilation=(4, 3))),
        "conv2d, groups": images(lambda: nn.Conv2d(3, 6, 3, groups=3)),
        "conv2d, channels last": last(lambda: nn.Conv2d(3, 4, 3, padding=1)),
        "conv2d, channels last, wide": last(lambda: nn.Conv2d(3, 48, 3, stride=2)),
        "conv2d, channels last, groups": last(lambda: nn.Conv2d(3, 6, 2, groups=3)),
        "conv2d, circular": images(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")),
        "conv3d": deep(lambda: nn.Conv3d(1, 2, (3, 2, 2), padding=1, stride=(1, 2, 1))),
        "conv3d, same, even": deep(lambda: nn.Conv3d(1, 2, (2, 2, 4), padding="same")),
        "transposed 1d": flat(lambda: nn.ConvTranspose1d(3, 2, 3, stride=2, output_padding=1)),
        "transposed 2d": images(lambda: nn.ConvTranspose2d(3, 2, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2))),
        "transposed 2d, groups": images(lambda: nn.ConvTranspose2d(3, 6, 2, groups=3)),
        "transposed 2d, channels last": last(lambda: nn.ConvTranspose2d(3, 2, 3, stride=2)),
        "transposed 3d": deep(lambda: nn.ConvTranspose3d(1, 2, 2, stride=2)),
    }


def _mixing() -> dict[str, Layer]:
    def mix(run: Any, shapes: Any = None, **makers: Any) -> Layer:
        return Layer(lambda: Call(run, shapes, **{name: make() for name, make in makers.items()}), by_token=False)

    def cell(kind: Any, **options: Any) -> Layer:
        def run(m: Any, x: Tensor) -> Tensor:
            state: Any = None
            for t in range(x.shape[1]):
                state = m.cell(x[:, t], state)
            out: Tensor = state[0] * state[1] if isinstance(state, tuple) else state
            return out

        return mix(run, cell=lambda: kind(D, 3, **options))

    def experts(grouped: Any, m: Any, x: Tensor) -> Tensor:
        flat = F.pad(x.reshape(-1, D), (0, 2))  # rows of 32 bytes
        choice = (flat[:, 0] > 0).long()
        order = choice.argsort(stable=True)
        offs = torch.bincount(choice, minlength=2).cumsum(0).to(torch.int32)
        y = grouped(flat[order], m.w, offs=offs)
        return torch.zeros_like(y).index_copy(0, order, y).view(*x.shape[:-1], -1)

    attention = nn.MultiheadAttention
    return {
        "rnn cell": cell(nn.RNNCell),
        "rnn cell, relu, no bias": cell(nn.RNNCell, nonlinearity="relu", bias=False),
        "gru cell": cell(nn.GRUCell),
        "lstm cell": cell(nn.LSTMCell),
        "attention": mix(lambda m, x: m.a(x, x, x)[0], a=lambda: attention(D, 2, batch_first=True)),
        "attention, time first": mix(
            lambda m, x: m.a(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1), a=lambda: attention(D, 2)
        ),
        "attention, own widths": mix(
            lambda m, x: m.a(x, x[..., :4].tanh(), x[..., 2:])[0],
            a=lambda: attention(D, 3, kdim=4, vdim=4, batch_first=True, bias=False),
        ),
        "learned queries": mix(
            lambda m, x: F.scaled_dot_product_attention(m.q.expand(len(x), -1, -1), x, x), {"q": (1, 3, D)}
        ),
        **{f"experts, {f.__name__}": _experts(partial(experts, f), f) for f in _functions(_EXPERTS)},
    }


_EXPERTS = "ftw_torch.capture.rules.experts"


def _experts(run: Callable[[Any, Tensor], Tensor], function: Any) -> Layer:
    return Layer(lambda: Call(run, {"w": (2, D + 2, 4)}), autocast=False, narrow=True, function=function)
