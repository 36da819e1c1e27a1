"""Records and models that must be refused: shapes, names, dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import ftw
from ftw import spi
from ftw.constraints import project
from ftw.guard import signal
from ftw.inner_products import squared_norms
from ftw_conformance.verify.table import Refusal

api: Any = ftw  # untyped, so that what a type checker would refuse can be written
Array = Any
WRONG = (ValueError, TypeError)
nearest: Any = project
statistic: Any = signal


def ones(*shape: int) -> Array:
    """Return ones."""
    return np.ones(shape)


def refuse(name: str, call: Callable[..., Any], inputs: tuple[Any, ...], says: str, error: Any = WRONG) -> Refusal:
    """Return a row of the table."""
    return Refusal(f"refuses/{name}", call, inputs, error, says)


def scored(x: Any, g: Any, p: Any) -> Any:
    """Return the scores: the first function that sees a whole model."""
    return api.scores(x, g, p)


def combined(x: Any) -> Any:
    """Return four samples combined: the first function that sees a record."""
    first = spi.leaves(x)[0]
    xp = spi.namespace(first)
    return api.combine(x, xp.ones(4, dtype=xp.float64, device=spi.device(first)))


def records() -> list[Refusal]:
    """Return records that do not hold together, by the first function that sees them."""
    bad: dict[str, tuple[Any, str]] = {
        "inputs of two axes": (api.OuterProduct(ones(4, 3), ones(4, 2, 3)), r"\(n, t, d_in\)"),
        "output gradients of two axes": (api.OuterProduct(ones(4, 2, 3), ones(4, 3)), r"\(n, t, d_in\)"),
        "tokens differ": (api.OuterProduct(ones(4, 2, 3), ones(4, 3, 3)), "'w'"),
        "samples of factors differ": (api.OuterProduct(ones(3, 2, 3), ones(4, 2, 3)), "'w'"),
        "rows of three axes": (api.Rows(np.ones((4, 2, 1), dtype=int), ones(4, 2, 3), 5), "indices"),
        "rows of other tokens": (api.Rows(np.ones((4, 3), dtype=int), ones(4, 2, 3), 5), "indices"),
        "row gradients of two axes": (api.Rows(np.ones((4, 2), dtype=int), ones(4, 2), 5), "indices"),
        "row numbers are floats": (api.Rows(ones(4, 2), ones(4, 2, 3), 5), "integers"),
        "dense without samples": (api.Dense(np.asarray(1.0)), "0-d"),
        "integers": (api.Dense(np.ones((4, 3), dtype=int)), "real floating"),
        "integers in a sum": (api.Sum((api.Dense(np.ones((4, 3), dtype=int)),)), "real floating"),
        "row gradients are integers": (
            api.Rows(np.ones((4, 2), dtype=int), np.ones((4, 2, 3), dtype=int), 5),
            "real floating",
        ),
        "parts disagree": (api.Sum((api.Dense(ones(4, 3)), api.Dense(ones(4, 2)))), "disagree"),
        "parts of other samples": (api.Sum((api.Dense(ones(4, 3)), api.Dense(ones(3, 3)))), "disagree"),
        "a part is wrong": (api.Sum((api.OuterProduct(ones(4, 3), ones(4, 3)),)), r"\(n, t, d_in\)"),
    }
    out = [refuse(f"record/{name}", combined, ({"w": x},), says) for name, (x, says) in bad.items()]
    out.append(
        refuse(
            "record/samples of parameters differ",
            combined,
            ({"w": api.Dense(ones(4, 3)), "v": api.Dense(ones(3, 3))},),
            "number of samples",
        )
    )
    eager: dict[str, tuple[Callable[..., Any], str]] = {
        "size is a float": (lambda x: combined({"w": api.Rows(x.indices, x.output_grads, 5.0)}), "size"),
        "size is a truth value": (lambda x: combined({"w": api.Rows(x.indices, x.output_grads, True)}), "size"),
        "no parts": (lambda x: combined({"x": x, "w": api.Sum(())}), "at least one part"),
        "an array in place of a record": (lambda x: combined({"w": x.output_grads}), "expected OuterProduct"),
        "no parameters": (lambda x: api.combine({}, x.output_grads), "non-empty mapping"),
        "not a mapping": (lambda x: api.combine([x], x.output_grads), "mapping"),
    }
    good = api.Rows(np.ones((4, 2), dtype=int), ones(4, 2, 3), 5)
    out += [refuse(f"record/{name}", call, (good,), says) for name, (call, says) in eager.items()]
    x = {"w": api.Dense(ones(4, 3))}
    out.append(refuse("combine/weights of another length", api.combine, (x, ones(3)), r"\(4,\)"))
    out.append(refuse("combine/weights of two axes", api.combine, (x, ones(4, 1)), r"\(4,\)"))
    out.append(refuse("combine/integer weights", api.combine, (x, np.ones(4, dtype=int)), "real floating"))
    out.append(refuse("take/indices of two axes", api.take, (x, np.ones((2, 1), dtype=int)), "vector of integers"))
    out.append(refuse("take/indices are floats", api.take, (x, ones(2)), "vector of integers"))
    return out


def models_that_do_not_fit() -> list[Refusal]:
    """Gradients, target and geometry that disagree, by every function that takes them."""
    x = {"w": api.OuterProduct(ones(4, 2, 3), ones(4, 2, 5)), "b": api.Dense(ones(4, 5))}
    g = {"w": ones(5, 3), "b": ones(5)}
    p: dict[str, Any] = {"w": api.Diagonal(ones(5, 3)), "b": api.Scale(np.asarray(1.0))}
    out = []

    def change(mapping: Mapping[str, Any], **new: Any) -> dict[str, Any]:
        return {name: x for name, x in {**mapping, **new}.items() if x is not None}

    targets = {
        "target lacks a name": (change(g, b=None), r"lacks \['b'\]"),
        "target has a name too many": (change(g, c=ones(3)), r"besides \['c'\]"),
        "target of another shape": (change(g, b=ones(4)), "target of 'b'"),
        "integer target": (change(g, b=np.ones(5, dtype=int)), "target of 'b'"),
    }
    for name, (bad, says) in targets.items():
        out.append(refuse(f"model/{name}", scored, (x, bad, p), says))
        out.append(
            refuse(f"selection/{name}", lambda x, g, p: api.filter_then_weight(x, g, p, keep=2), (x, bad, p), says)
        )
    u, s, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(5, 3)), full_matrices=False)
    Q, R = np.eye(5), np.eye(3)
    geometries = {
        "geometry lacks a name": (change(p, b=None), r"lacks \['b'\]"),
        "geometry has a name too many": (change(p, c=api.Scale(np.asarray(1.0))), r"besides \['c'\]"),
        "Diagonal of another shape": (change(p, w=api.Diagonal(ones(3, 5))), "Diagonal of 'w'"),
        "integer Diagonal": (change(p, b=api.Diagonal(np.ones(5, dtype=int))), "floating"),
        "Scale of a vector": (change(p, b=api.Scale(ones(5))), "Scale for 'b'"),
        "Kronecker side not square": (change(p, w=api.Kronecker(ones(5, 4), ones(3, 3))), "Kronecker for 'w'"),
        "Kronecker side of three axes": (change(p, w=api.Kronecker(ones(5, 5), ones(3, 3, 3))), "Kronecker for 'w'"),
        "Kronecker of another shape": (change(p, w=api.Kronecker(ones(3), ones(5))), "Kronecker of 'w'"),
        "Rotated bases do not fit": (change(p, w=api.Rotated(Q, ones(5, 2), R)), "Rotated for 'w'"),
        "Rotated left does not fit": (change(p, w=api.Rotated(Q, ones(4, 3), R)), "Rotated for 'w'"),
        "Rotated of another shape": (change(p, w=api.Rotated(R, ones(3, 5), Q)), "Rotated of 'w'"),
        "Rotated values are a vector": (change(p, w=api.Rotated(Q, ones(5), R)), "Rotated for 'w'"),
        "Polar without a thin SVD": (change(p, w=api.Polar(u[:, :2], s[:2], vt[:2])), "Polar for 'w'"),
        "Polar values do not fit": (change(p, w=api.Polar(u, s[:2], vt)), "Polar for 'w'"),
        "Polar of vectors": (change(p, w=api.Polar(u[:, 0], s, vt)), "Polar for 'w'"),
        "Polar of another shape": (change(p, w=api.Polar(vt.T, s, u.T)), "Polar of 'w'"),
        "Polar rows do not fit": (change(p, w=api.Polar(u, s, vt[:2])), "Polar for 'w'"),
    }
    for name, (bad, says) in geometries.items():
        out.append(refuse(f"model/{name}", scored, (x, g, bad), says))
    for what, function in (
        ("gram", api.gram),
        ("cross_gram", lambda x, p: api.cross_gram(x, x, p)),
        ("squared_norms", squared_norms),
    ):
        out.append(refuse(f"{what}/geometry lacks a name", function, (x, change(p, b=None)), r"lacks \['b'\]"))
    y = change(x, b=api.Dense(ones(3, 5)))
    out.append(
        refuse(
            "cross_gram/the others disagree", lambda x, y, p: api.cross_gram(x, y, p), (x, y, p), "number of samples"
        )
    )
    z = {"w": api.OuterProduct(ones(2, 2, 3), ones(2, 2, 4)), "b": api.Dense(ones(2, 5))}
    out.append(
        refuse("cross_gram/the others have another shape", lambda x, y, p: api.cross_gram(x, y, p), (x, z, p), "'w'")
    )
    for size, says in ((0, "max_bytes"), (-1, "max_bytes"), (1.5, "max_bytes"), (True, "max_bytes"), (8, "too small")):
        out.append(
            refuse(f"gram/max_bytes={size}", lambda x, p, size=size: api.gram(x, p, max_bytes=size), (x, p), says)
        )
        out.append(
            refuse(
                f"cross_gram/max_bytes={size}",
                lambda x, p, size=size: api.cross_gram(x, x, p, max_bytes=size),
                (x, p),
                says,
            )
        )
    eager: dict[str, Callable[..., Any]] = {
        "an array in place of an operator": lambda x, g, p: api.scores(x, g, {**p, "b": g["b"]}),
        "a number in place of a target": lambda x, g, p: api.scores(x, {**g, "b": 1.0}, p),
        "a negative scale": lambda x, g, p: api.scores(x, g, {**p, "b": api.Scale(-1.0)}),
        "geometry is not a mapping": lambda x, g, p: api.scores(x, g, list(p)),
        "target is not a mapping": lambda x, g, p: api.scores(x, list(g.values()), p),
    }
    messages = {
        "an array in place of an operator": "operator of 'b'",
        "a number in place of a target": "target of 'b'",
        "a negative scale": "not be negative",
        "geometry is not a mapping": "geometry must be a mapping",
        "target is not a mapping": "target must be a mapping",
    }
    out += [refuse(f"model/{name}", call, (x, g, p), messages[name]) for name, call in eager.items()]
    return out
