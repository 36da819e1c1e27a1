"""What is no array that the core can compute with is refused by name, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import ftw

G, X = np.ones((4, 3)), np.ones((4, 1, 3))


def pandas_frame() -> Any:
    return pytest.importorskip("pandas").DataFrame(G)


def bfloat16() -> Any:
    return G.astype(pytest.importorskip("ml_dtypes").bfloat16)


def float8() -> Any:
    return G.astype(pytest.importorskip("ml_dtypes").float8_e4m3fn)


def torch_float8() -> Any:
    torch = pytest.importorskip("torch")
    return torch.ones(4, 3).to(torch.float8_e4m3fn)


def jax_float8() -> Any:
    jnp = pytest.importorskip("jax.numpy")
    return jnp.ones((4, 3), jnp.float8_e4m3fn)


KINDS: dict[str, tuple[Callable[[], Any], str]] = {
    "masked": (lambda: np.ma.masked_array(G, G > 2), "MaskedArray; fill it first"),
    "matrix": (lambda: G.view(np.matrix), "matrix; convert it with numpy.asarray"),
    "list": (G.tolist, "list; convert it to an array"),
    "pandas": (pandas_frame, "pandas.DataFrame; convert it to an array"),
    "longdouble": (lambda: G.astype(np.longdouble), "of dtype float128; .* cast it to float64"),
    "objects": (lambda: G.astype(object), "of dtype object; expected float16"),
    "ml_dtypes": (bfloat16, "of dtype bfloat16; .* cast it to float32"),
    "float8": (float8, "of dtype float8.*cast it to float32"),
    "torch float8": (torch_float8, "of dtype torch.float8.*cast it to float32"),
    "jax float8": (jax_float8, "of dtype float8.*cast it to float32"),
    "text": (lambda: "abc", "str; expected an array"),
}
CALLS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "Dense": (lambda x: ftw.gram({"w": ftw.Dense(x)}, {"w": ftw.Scale(1.0)}), "gram: grads in the Dense of 'w' is"),
    "a part of a Sum": (
        lambda x: ftw.combine({"w": ftw.Sum((ftw.Dense(G), ftw.Dense(x)))}, np.ones(4)),
        "combine: grads in the Dense of 'w' is",
    ),
    "inputs": (
        lambda x: ftw.combine({"w": ftw.OuterProduct(x, X)}, np.ones(4)),
        "combine: inputs in the OuterProduct of 'w' is",
    ),
    "output_grads": (
        lambda x: ftw.combine({"w": ftw.Rows(np.zeros((4, 1), int), x, 3)}, np.ones(4)),
        "combine: output_grads in the Rows of 'w' is",
    ),
    "weights": (lambda x: ftw.combine({"w": ftw.Dense(G)}, x), "combine: weights is"),
    "target": (
        lambda x: ftw.scores({"w": ftw.Dense(G)}, {"w": x}, {"w": ftw.Scale(1.0)}),
        "scores: target of 'w' is",
    ),
    "an operator": (
        lambda x: ftw.gram({"w": ftw.Dense(G)}, {"w": ftw.Diagonal(x)}),
        "gram: values in the Diagonal of 'w' is",
    ),
    "the QP's gram": (lambda x: ftw.solve_qp(x, np.ones(4), ftw.NonNegative()), "solve_qp: gram is"),
    "the QP's linear": (lambda x: ftw.solve_qp(np.eye(4), x, ftw.NonNegative()), "solve_qp: linear is"),
    "a bound": (lambda x: ftw.solve_qp(np.eye(3), np.ones(3), ftw.Box(0.0, x)), "solve_qp: upper of Box is"),
    "project": (lambda x: ftw.constraints.project(ftw.Simplex(1.0), x), "project: v is"),
    "scores": (lambda x: ftw.filters.top_k(x, 2), "top_k: scores is"),
    "a filter's gram": (lambda x: ftw.filters.matching(np.ones(4), x, 2), "matching: gram is"),
    "an optimizer": (lambda x: ftw.optimizers.adam(x, np.ones((4, 3)), 1, lr=0.1), "adam: exp_avg is"),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("call", list(CALLS))
def test_kinds(call: str, kind: str) -> None:
    if (call, kind) == ("a bound", "text"):
        pytest.skip("a word for a number has a message of its own")
    make, says = KINDS[kind]
    run, name = CALLS[call]
    with pytest.raises(TypeError, match=f"({name}).*{says}"):
        run(make())


def test_inside_vmap_of_torch() -> None:
    torch = pytest.importorskip("torch")
    K, c = torch.eye(3).expand(2, 3, 3), torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"gram is a tensor inside torch.func.vmap, .* call it outside"):
        torch.func.vmap(lambda K, c: ftw.solve_qp(K, c, ftw.NonNegative()).weights)(K, c)
    with pytest.raises(TypeError, match=r"grads in the Dense of 'w' is a tensor inside torch.func.vmap"):
        torch.func.vmap(lambda g: ftw.gram({"w": ftw.Dense(g)}, {"w": ftw.Scale(1.0)}))(torch.ones(2, 4, 3))


def test_subclasses_that_compute_alike_are_taken(tmp_path: Any) -> None:
    held = np.memmap(tmp_path / "grads", np.float64, "w+", shape=(4, 3))
    held[:] = G
    assert ftw.combine({"w": ftw.Dense(held)}, np.ones(4))["w"].tolist() == [4.0, 4.0, 4.0]
