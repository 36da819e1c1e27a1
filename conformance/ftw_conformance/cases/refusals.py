"""Calls that must raise, eager and under a trace alike: shapes, names, dtypes and ranges, each with what the message says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ftw
import numpy as np
from ftw.constraints import project
from ftw.gram import squared_norms
from ftw.guard import signal

from ..table import Refusal

Array = Any
WRONG = (ValueError, TypeError)


def cases() -> list[Refusal]:
    """Return the table's part."""
    return [*records(), *models_that_do_not_fit(), *filters(), *weights(), *selections(), *others()]


def ones(*shape: int) -> Array:
    return np.ones(shape)


def refuse(name: str, call: Callable[..., Any], inputs: tuple[Any, ...], says: str, error: Any = WRONG) -> Refusal:
    """Return a row of the table."""
    return Refusal(f"refuses/{name}", call, inputs, error, says)


def scored(x: Any, g: Any, p: Any) -> Any:
    return ftw.scores(x, g, p)


def combined(x: Any) -> Any:
    first = ftw._array.leaves(x)[0]
    xp = ftw._array.namespace(first)
    return ftw.combine(x, xp.ones(4, dtype=xp.float64, device=ftw._array.device(first)))


def records() -> list[Refusal]:
    """Records that do not hold together, by the first function that sees them."""
    bad: dict[str, tuple[Any, str]] = {
        "inputs of two axes": (ftw.OuterProduct(ones(4, 3), ones(4, 2, 3)), r"\(n, t, d_in\)"),
        "output gradients of two axes": (ftw.OuterProduct(ones(4, 2, 3), ones(4, 3)), r"\(n, t, d_in\)"),
        "tokens differ": (ftw.OuterProduct(ones(4, 2, 3), ones(4, 3, 3)), "'w'"),
        "samples of factors differ": (ftw.OuterProduct(ones(3, 2, 3), ones(4, 2, 3)), "'w'"),
        "rows of three axes": (ftw.Rows(np.ones((4, 2, 1), dtype=int), ones(4, 2, 3), 5), "indices"),
        "rows of other tokens": (ftw.Rows(np.ones((4, 3), dtype=int), ones(4, 2, 3), 5), "indices"),
        "row gradients of two axes": (ftw.Rows(np.ones((4, 2), dtype=int), ones(4, 2), 5), "indices"),
        "row numbers are floats": (ftw.Rows(ones(4, 2), ones(4, 2, 3), 5), "integers"),
        "dense without samples": (ftw.Dense(np.asarray(1.0)), "0-d"),
        "integers": (ftw.Dense(np.ones((4, 3), dtype=int)), "real floating"),
        "integers in a sum": (ftw.Sum((ftw.Dense(np.ones((4, 3), dtype=int)),)), "real floating"),
        "row gradients are integers": (ftw.Rows(np.ones((4, 2), dtype=int), np.ones((4, 2, 3), dtype=int), 5), "real floating"),  # fmt: skip
        "parts disagree": (ftw.Sum((ftw.Dense(ones(4, 3)), ftw.Dense(ones(4, 2)))), "disagree"),
        "parts of other samples": (ftw.Sum((ftw.Dense(ones(4, 3)), ftw.Dense(ones(3, 3)))), "disagree"),
        "a part is wrong": (ftw.Sum((ftw.OuterProduct(ones(4, 3), ones(4, 3)),)), r"\(n, t, d_in\)"),
    }
    out = [refuse(f"record/{name}", combined, ({"w": x},), says) for name, (x, says) in bad.items()]
    out.append(refuse("record/samples of parameters differ", combined, ({"w": ftw.Dense(ones(4, 3)), "v": ftw.Dense(ones(3, 3))},), "number of samples"))  # fmt: skip
    eager: dict[str, tuple[Callable[..., Any], str]] = {
        "size is a float": (lambda x: combined({"w": ftw.Rows(x.indices, x.output_grads, 5.0)}), "size"),
        "size is a truth value": (lambda x: combined({"w": ftw.Rows(x.indices, x.output_grads, True)}), "size"),
        "no parts": (lambda x: combined({"x": x, "w": ftw.Sum(())}), "at least one part"),
        "an array in place of a record": (lambda x: combined({"w": x.output_grads}), "expected OuterProduct"),
        "no parameters": (lambda x: ftw.combine({}, x.output_grads), "non-empty mapping"),
        "not a mapping": (lambda x: ftw.combine([x], x.output_grads), "mapping"),
    }
    good = ftw.Rows(np.ones((4, 2), dtype=int), ones(4, 2, 3), 5)
    out += [refuse(f"record/{name}", call, (good,), says) for name, (call, says) in eager.items()]
    x = {"w": ftw.Dense(ones(4, 3))}
    out.append(refuse("combine/weights of another length", ftw.combine, (x, ones(3)), r"\(4,\)"))
    out.append(refuse("combine/weights of two axes", ftw.combine, (x, ones(4, 1)), r"\(4,\)"))
    out.append(refuse("combine/integer weights", ftw.combine, (x, np.ones(4, dtype=int)), "real floating"))
    out.append(refuse("take/indices of two axes", ftw.take, (x, np.ones((2, 1), dtype=int)), "vector of integers"))
    out.append(refuse("take/indices are floats", ftw.take, (x, ones(2)), "vector of integers"))
    return out


def models_that_do_not_fit() -> list[Refusal]:
    """Gradients, target and geometry that disagree, by every function that takes them."""
    x = {"w": ftw.OuterProduct(ones(4, 2, 3), ones(4, 2, 5)), "b": ftw.Dense(ones(4, 5))}
    g = {"w": ones(5, 3), "b": ones(5)}
    p: dict[str, Any] = {"w": ftw.Diagonal(ones(5, 3)), "b": ftw.Scale(np.asarray(1.0))}
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
        out.append(refuse(f"selection/{name}", lambda x, g, p: ftw.filter_then_weight(x, g, p, keep=2), (x, bad, p), says))
    u, s, vt = np.linalg.svd(np.random.default_rng(0).normal(size=(5, 3)), full_matrices=False)
    Q, R = np.eye(5), np.eye(3)
    geometries = {
        "geometry lacks a name": (change(p, b=None), r"lacks \['b'\]"),
        "geometry has a name too many": (change(p, c=ftw.Scale(np.asarray(1.0))), r"besides \['c'\]"),
        "Diagonal of another shape": (change(p, w=ftw.Diagonal(ones(3, 5))), "Diagonal of 'w'"),
        "integer Diagonal": (change(p, b=ftw.Diagonal(np.ones(5, dtype=int))), "floating"),
        "Scale of a vector": (change(p, b=ftw.Scale(ones(5))), "Scale for 'b'"),
        "Kronecker side not square": (change(p, w=ftw.Kronecker(ones(5, 4), ones(3, 3))), "Kronecker for 'w'"),
        "Kronecker side of three axes": (change(p, w=ftw.Kronecker(ones(5, 5), ones(3, 3, 3))), "Kronecker for 'w'"),
        "Kronecker of another shape": (change(p, w=ftw.Kronecker(ones(3), ones(5))), "Kronecker of 'w'"),
        "Rotated bases do not fit": (change(p, w=ftw.Rotated(Q, ones(5, 2), R)), "Rotated for 'w'"),
        "Rotated left does not fit": (change(p, w=ftw.Rotated(Q, ones(4, 3), R)), "Rotated for 'w'"),
        "Rotated of another shape": (change(p, w=ftw.Rotated(R, ones(3, 5), Q)), "Rotated of 'w'"),
        "Rotated values are a vector": (change(p, w=ftw.Rotated(Q, ones(5), R)), "Rotated for 'w'"),
        "Polar without a thin SVD": (change(p, w=ftw.Polar(u[:, :2], s[:2], vt[:2])), "Polar for 'w'"),
        "Polar values do not fit": (change(p, w=ftw.Polar(u, s[:2], vt)), "Polar for 'w'"),
        "Polar of vectors": (change(p, w=ftw.Polar(u[:, 0], s, vt)), "Polar for 'w'"),
        "Polar of another shape": (change(p, w=ftw.Polar(vt.T, s, u.T)), "Polar of 'w'"),
        "Polar rows do not fit": (change(p, w=ftw.Polar(u, s, vt[:2])), "Polar for 'w'"),
    }
    for name, (bad, says) in geometries.items():
        out.append(refuse(f"model/{name}", scored, (x, g, bad), says))
    for what, function in (("gram", ftw.gram), ("cross_gram", lambda x, p: ftw.cross_gram(x, x, p)), ("squared_norms", squared_norms)):  # fmt: skip  # noqa: E501
        out.append(refuse(f"{what}/geometry lacks a name", function, (x, change(p, b=None)), r"lacks \['b'\]"))
    y = change(x, b=ftw.Dense(ones(3, 5)))
    out.append(refuse("cross_gram/the others disagree", lambda x, y, p: ftw.cross_gram(x, y, p), (x, y, p), "number of samples"))
    z = {"w": ftw.OuterProduct(ones(2, 2, 3), ones(2, 2, 4)), "b": ftw.Dense(ones(2, 5))}
    out.append(refuse("cross_gram/the others have another shape", lambda x, y, p: ftw.cross_gram(x, y, p), (x, z, p), "'w'"))
    for size, says in ((0, "max_bytes"), (-1, "max_bytes"), (1.5, "max_bytes"), (True, "max_bytes"), (8, "too small")):
        out.append(refuse(f"gram/max_bytes={size}", lambda x, p, size=size: ftw.gram(x, p, max_bytes=size), (x, p), says))
        out.append(refuse(f"cross_gram/max_bytes={size}", lambda x, p, size=size: ftw.cross_gram(x, x, p, max_bytes=size), (x, p), says))  # fmt: skip  # noqa: E501
    eager: dict[str, Callable[..., Any]] = {
        "an array in place of an operator": lambda x, g, p: ftw.scores(x, g, {**p, "b": g["b"]}),
        "a number in place of a target": lambda x, g, p: ftw.scores(x, {**g, "b": 1.0}, p),
        "a negative scale": lambda x, g, p: ftw.scores(x, g, {**p, "b": ftw.Scale(-1.0)}),
        "geometry is not a mapping": lambda x, g, p: ftw.scores(x, g, list(p)),
        "target is not a mapping": lambda x, g, p: ftw.scores(x, list(g.values()), p),
    }
    says = {
        "an array in place of an operator": "operator of 'b'",
        "a number in place of a target": "target of 'b'",
        "a negative scale": "not be negative",
        "geometry is not a mapping": "geometry must be a mapping",
        "target is not a mapping": "target must be a mapping",
    }
    out += [refuse(f"model/{name}", call, (x, g, p), says[name]) for name, call in eager.items()]
    return out


def filters() -> list[Refusal]:
    """Filters, resampling."""
    b, K, u = ones(4), np.eye(4), ones(4) / 2
    f = ftw.filters
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {}
    every: dict[str, Callable[..., Any]] = {
        "top_k": lambda b, k: f.top_k(b, k),
        "threshold": lambda b, k: f.threshold(b, k, value=0.0),
        "matching": lambda b, k: f.matching(b, b[:, None] * b[None, :], k),
        "greedy_utility": lambda b, k: f.greedy_utility(b, b[:, None] * b[None, :], k),
        "boltzmann": lambda b, k: f.boltzmann(b, k, temperature=1.0, uniforms=b),
    }
    for name, function in every.items():
        for k, what in ((0, "lie in 1"), (5, "lie in 1"), (-1, "lie in 1"), (2.0, "k must be an int"), (True, "k must be an int")):
            calls[f"{name}/k={k}"] = (lambda b, function=function, k=k: function(b, k), (b,), what)
        calls[f"{name}/integers"] = (lambda b, function=function: function(b, 2), (np.ones(4, dtype=int),), "floats")
        if name not in ("matching", "greedy_utility"):
            calls[f"{name}/two axes"] = (lambda b, function=function: function(b, 2), (ones(4, 1),), "vector of floats")
    calls |= {
        "matching/another gram": (lambda b, K: f.matching(b, K, 2), (b, np.eye(3)), "gram"),
        "greedy_utility/another gram": (lambda b, K: f.greedy_utility(b, K, 2), (b, np.eye(3)), "gram"),
        "matching/negative ridge": (lambda b, K: f.matching(b, K, 2, ridge=-0.1), (b, K), "ridge"),
        "greedy_utility/negative redundancy": (lambda b, K: f.greedy_utility(b, K, 2, redundancy=-1.0), (b, K), "redundancy"),
        "threshold/neither": (lambda b: f.threshold(b, 2), (b,), "exactly one"),
        "threshold/both": (lambda b: f.threshold(b, 2, value=0.0, quantile=0.5), (b,), "exactly one"),
        "threshold/quantile above 1": (lambda b: f.threshold(b, 2, quantile=1.1), (b,), "quantile"),
        "threshold/quantile below 0": (lambda b: f.threshold(b, 2, quantile=-0.1), (b,), "quantile"),
        "boltzmann/temperature 0": (lambda b, u: f.boltzmann(b, 2, temperature=0.0, uniforms=u), (b, u), "temperature"),
        "boltzmann/temperature NaN": (lambda b, u: f.boltzmann(b, 2, temperature=float("nan"), uniforms=u), (b, u), "temperature"),  # fmt: skip  # noqa: E501
        "boltzmann/uniforms of another length": (lambda b, u: f.boltzmann(b, 2, temperature=1.0, uniforms=u), (b, u[:3]), "uniforms"),  # fmt: skip  # noqa: E501
        "resample/uniforms of another length": (lambda b, u: ftw.resample(b, 3, u), (b, u), "uniforms"),
        "resample/two axes": (lambda b, u: ftw.resample(b, 4, u), (ones(2, 2), u), "vector of floats"),
        "resample/integers": (lambda b, u: ftw.resample(b, 4, u), (np.ones(4, dtype=int), u), "floats"),
    }
    return [refuse(f"filters/{name}", *rest) for name, rest in calls.items()]


def weights() -> list[Refusal]:
    """The QP and the projections."""
    K, c = np.eye(4), ones(4)
    simplex = ftw.Simplex(1.0)

    def solve(constraint: Any = simplex, **options: Any) -> Callable[..., Any]:
        return lambda K, c: ftw.solve_qp(K, c, constraint, **options)

    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
        "gram not square": (solve(), (ones(4, 3), c), "gram must be"),
        "gram a vector": (solve(), (c, c), "gram must be"),
        "gram of no samples": (solve(), (ones(0, 0), ones(0)), "n >= 1"),
        "linear of another length": (solve(), (K, ones(3)), "linear must be"),
        "linear not batched": (solve(), (ones(2, 4, 4), c), "linear must be"),
        "integer gram": (solve(), (np.eye(4, dtype=int), c), "gram must be floating"),
        "integer linear": (solve(), (K, np.ones(4, dtype=int)), "linear must be floating"),
        "negative ridge": (solve(ridge=-1.0), (K, c), "ridge"),
        "NaN ridge": (solve(ridge=float("nan")), (K, c), "ridge"),
        "tol 0": (solve(tol=0.0), (K, c), "tol"),
        "tol NaN": (solve(tol=float("nan")), (K, c), "tol"),
        "max_steps 0": (solve(max_steps=0), (K, c), "max_steps"),
        "max_steps 1.5": (solve(max_steps=1.5), (K, c), "max_steps"),
        "max_steps True": (solve(max_steps=True), (K, c), "max_steps"),
        "a class for a constraint": (solve(ftw.NonNegative), (K, c), r"write NonNegative\(...\)"),
        "no constraint": (solve("simplex"), (K, c), "constraint must be"),
        "a total that is a word": (solve(ftw.Simplex("one")), (K, c), "builtins.str"),
        "a total that is a truth value": (solve(ftw.Simplex(True)), (K, c), "total must be"),
        "a cap of another length": (lambda K, c: ftw.solve_qp(K, c, ftw.CappedSimplex(c[:3], 1.0)), (K, c), "cap: shape"),
        "a lower bound of another length": (lambda K, c: ftw.solve_qp(K, c, ftw.Box(c[:3], 1.0)), (K, c), "lower: shape"),
        "an upper bound of another length": (lambda K, c: ftw.solve_qp(K, c, ftw.Box(0.0, c[:3])), (K, c), "upper: shape"),
        "a vector of totals": (lambda K, c: ftw.solve_qp(K, c, ftw.Simplex(c)), (K, c), "total: shape"),
        "a vector of ridges": (lambda K, c: ftw.solve_qp(K, c, simplex, ridge=c), (K, c), "ridge: shape"),
        "a start of another length": (lambda K, c: ftw.solve_qp(K, c, simplex, start=c[:3]), (K, c), "start must have"),
        "an integer start": (lambda K, c, s: ftw.solve_qp(K, c, simplex, start=s), (K, c, np.ones(4, dtype=int)), "start must be floating"),  # fmt: skip  # noqa: E501
        "a total that is complex": (solve(ftw.Simplex(1j)), (K, c), "total must be"),
    }
    out = [refuse(f"qp/{name}", *rest) for name, rest in calls.items()]
    spots: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
        "integers": (lambda v: project(simplex, v), (np.ones(4, dtype=int),), "float array"),
        "a number": (lambda v: project(simplex, v), (np.asarray(1.0),), "float array"),
        "no constraint": (lambda v: project("simplex", v), (c,), "constraint must be"),  # type: ignore[arg-type]
        "a class": (lambda v: project(ftw.Simplex, v), (c,), "write Simplex"),  # type: ignore[arg-type]
        "a cap of another length": (lambda v: project(ftw.CappedSimplex(v[:3], 1.0), v), (c,), "cap: shape"),
    }
    return out + [refuse(f"project/{name}", *rest) for name, rest in spots.items()]


def selections() -> list[Refusal]:
    """The composed selection's options."""
    x = {"w": ftw.Dense(ones(4, 5))}
    g, p = {"w": ones(5)}, {"w": ftw.Diagonal(ones(5))}
    options: dict[str, tuple[dict[str, Any], str]] = {
        "keep 0": ({"keep": 0}, "keep=0"),
        "keep 5": ({"keep": 5}, "keep=5"),
        "keep 2.0": ({"keep": 2.0}, "keep must be an int"),
        "keep True": ({"keep": True}, "keep must be an int"),
        "an unknown filter": ({"keep": 2, "filter": "best"}, "filter='best'"),
        "threshold by name": ({"keep": 2, "filter": "threshold"}, "callable"),
        "an unknown weight": ({"keep": 2, "weight": "equal"}, "weight='equal'"),
        "no constraint": ({"keep": 2, "constraint": "simplex"}, "constraint"),
        "negative ridge": ({"keep": 2, "ridge": -0.1}, "ridge"),
        "infinite ridge": ({"keep": 2, "ridge": float("inf")}, "ridge"),
        "NaN ridge": ({"keep": 2, "ridge": float("nan")}, "ridge"),
        "guard 1.5": ({"keep": 2, "guard": 1.5}, "guard"),
        "guard -0.1": ({"keep": 2, "guard": -0.1}, "guard"),
        "guard a word": ({"keep": 2, "guard": "on"}, "guard"),
        "shortlist 0": ({"keep": 2, "shortlist": 0}, "shortlist"),
        "shortlist 0.0": ({"keep": 2, "shortlist": 0.0}, "shortlist"),
        "shortlist 1.5": ({"keep": 2, "shortlist": 1.5}, "shortlist"),
        "shortlist True": ({"keep": 2, "shortlist": True}, "shortlist"),
        "shortlist a word": ({"keep": 2, "shortlist": "half"}, "shortlist"),
        "a filter that returns a tuple": ({"keep": 2, "filter": lambda b, K, k: (b, k)}, "must return Filtered"),
        "a filter that returns too many": ({"keep": 2, "filter": lambda b, K, k: ftw.filters.top_k(b, 3)}, "must return Filtered"),
    }
    out = []
    for name, (option, says) in options.items():
        call = lambda x, g, p, option=option: ftw.filter_then_weight(x, g, p, **option)  # noqa: E731
        out.append(refuse(f"selection/{name}", call, (x, g, p), says))
    out.append(refuse("selection/scores of another length", lambda x, g, p: ftw.filter_then_weight(x, g, p, keep=2, scores=g["w"]), (x, g, p), "scores"))  # fmt: skip  # noqa: E501
    for name, make in {
        "a cap of the kept alone": lambda v: ftw.CappedSimplex(v[:2], 1.0),
        "a lower bound of the kept alone": lambda v: ftw.Box(v[:2], 1.0),
        "an upper bound of the kept alone": lambda v: ftw.Box(0.0, v[:2]),
    }.items():
        call = lambda x, g, p, make=make: ftw.filter_then_weight(x, g, p, keep=2, constraint=make(g["w"]))  # noqa: E731
        out.append(refuse(f"selection/{name}", call, (x, g, p), "one a candidate"))
    samples = {"v": ftw.Dense(ones(2, 5))}
    out.append(refuse("selection/target samples of other names", lambda x, g, p, s: ftw.filter_then_weight(x, g, p, keep=2, target_samples=s), (x, g, p, samples), "target_samples"))  # fmt: skip  # noqa: E501
    return out


def others() -> list[Refusal]:
    """The guard and the optimizers."""
    a = np.asarray(1.0)
    v = ones(3)
    o = ftw.optimizers
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
        "guard/m=0": (lambda a: ftw.guard.shrinkage(a, a, a, 0), (a,), "number of target samples"),
        "guard/m=1.5": (lambda a: signal(a, a, 1.5), (a,), "number of target samples"),  # type: ignore[arg-type]
        "guard/cap 1.5": (lambda a: ftw.guard.shrinkage(a, a, a, 3, cap=1.5), (a,), "cap"),
        "guard/cap -0.1": (lambda a: ftw.guard.shrinkage(a, a, a, 3, cap=-0.1), (a,), "cap"),
        "guard/slope -1": (lambda a: ftw.guard.shrinkage(a, a, a, 3, slope=-1.0), (a,), "slope"),
        "optimizers/sgd without param": (lambda v: o.sgd(v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/adam without param": (lambda v: o.adam(v, v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/nadam without param": (lambda v: o.nadam(v, v, 0.5, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/radam without param": (lambda v: o.radam(v, v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/adamax without param": (lambda v: o.adamax(v, v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/adagrad without param": (lambda v: o.adagrad(v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/rmsprop without param": (lambda v: o.rmsprop(v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/rmsprop centered, no mean": (lambda v: o.rmsprop(v, 1, lr=0.1, centered=True), (v,), "grad_avg="),
        "optimizers/adafactor without variance": (lambda v: o.adafactor(None, None, None, 1, lr=0.1, param=v), (v,), "variance="),
        "optimizers/adafactor without rows": (lambda v: o.adafactor(None, v, None, 1, lr=0.1, param=v[:, None]), (v,), "row_var"),  # fmt: skip  # noqa: E501
        "optimizers/adafactor without columns": (lambda v: o.adafactor(v, None, None, 1, lr=0.1, param=v[:, None]), (v,), "col_var"),  # fmt: skip  # noqa: E501
        "optimizers/soap of a vector": (lambda v: o.soap(v, v, None, None, 1, lr=0.1), (v,), "matrix"),
        "optimizers/muon of a vector": (lambda v: o.muon(v, lr=0.1), (v,), "matrix"),
        "optimizers/muon of nothing": (lambda v: o.muon(None, lr=0.1, param=v), (v,), "anticipate="),
    }
    return [refuse(name, *rest) for name, rest in calls.items()]
