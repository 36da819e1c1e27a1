"""Calls that must raise, eager and under a trace alike: shapes, names, dtypes, ranges, and what the message says."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import ftw
from ftw import spi
from ftw.constraints import project
from ftw.guard import signal
from ftw_conformance.verify.table import Refusal

from .refused_models import models_that_do_not_fit, ones, records, refuse

api: Any = ftw  # untyped, so that what a type checker would refuse can be written
Array = Any
nearest: Any = project
statistic: Any = signal


def cases() -> list[Refusal]:
    """Return the table's part."""
    return [*records(), *models_that_do_not_fit(), *filters(), *weights(), *selections(), *others()]


def _plain(function: Any, b: Any, k: Any) -> Any:
    return function(b, k)


def _squared(function: Any, b: Any, k: Any) -> Any:
    return function(b, b[:, None] * b[None, :], k)


def _with_gram(function: Any, b: Any, K: Any) -> Any:
    return function(b, K, 2)


def filters() -> list[Refusal]:
    """Return filters, resampling."""
    b, K, u = ones(4), np.eye(4), ones(4) / 2
    f = api.filters
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {}
    every: dict[str, Callable[..., Any]] = {
        "threshold": lambda b, k: f.threshold(b, k, value=0.0),
        "boltzmann": lambda b, k: f.boltzmann(b, k, temperature=1.0, uniforms=b),
    }
    for name, rule in spi.NAMED.items():
        every[name] = partial(_squared if rule.needs_gram else _plain, getattr(f, name))
        if rule.needs_gram:
            call = partial(_with_gram, getattr(f, name))
            calls[f"{name}/another gram"] = (call, (b, np.eye(3)), "gram")
    for name, function in every.items():
        for k, what in (
            (0, "lie in 1"),
            (5, "lie in 1"),
            (-1, "lie in 1"),
            (2.0, "k must be an int"),
            (True, "k must be an int"),
        ):
            calls[f"{name}/k={k}"] = (lambda b, function=function, k=k: function(b, k), (b,), what)
        calls[f"{name}/integers"] = (lambda b, function=function: function(b, 2), (np.ones(4, dtype=int),), "floats")
        if name not in spi.NAMED or not spi.NAMED[name].needs_gram:
            calls[f"{name}/two axes"] = (lambda b, function=function: function(b, 2), (ones(4, 1),), "vector of floats")
    calls |= {
        "matching/negative ridge": (lambda b, K: f.matching(b, K, 2, ridge=-0.1), (b, K), "ridge"),
        "greedy_utility/negative redundancy": (
            lambda b, K: f.greedy_utility(b, K, 2, redundancy=-1.0),
            (b, K),
            "redundancy",
        ),
        "threshold/neither": (lambda b: f.threshold(b, 2), (b,), "exactly one"),
        "threshold/both": (lambda b: f.threshold(b, 2, value=0.0, quantile=0.5), (b,), "exactly one"),
        "threshold/quantile above 1": (lambda b: f.threshold(b, 2, quantile=1.1), (b,), "quantile"),
        "threshold/quantile below 0": (lambda b: f.threshold(b, 2, quantile=-0.1), (b,), "quantile"),
        "matching/ridge NaN": (lambda b, K: f.matching(b, K, 2, ridge=float("nan")), (b, K), "ridge=nan"),
        "boltzmann/temperature 0": (lambda b, u: f.boltzmann(b, 2, temperature=0.0, uniforms=u), (b, u), "temperature"),
        "boltzmann/temperature NaN": (
            lambda b, u: f.boltzmann(b, 2, temperature=float("nan"), uniforms=u),
            (b, u),
            "temperature",
        ),
        "boltzmann/uniforms of another length": (
            lambda b, u: f.boltzmann(b, 2, temperature=1.0, uniforms=u),
            (b, u[:3]),
            "uniforms",
        ),
        "resample/uniforms of another length": (lambda b, u: api.resample(b, 3, u), (b, u), "uniforms"),
        "resample/size 0": (lambda b, u: api.resample(b, 0, u), (b, u), "size"),
        "resample/size 1.5": (lambda b, u: api.resample(b, 1.5, u), (b, u), "size"),
        "resample/integer uniforms": (lambda b, u: api.resample(b, 4, u), (b, np.ones(4, dtype=int)), "uniforms"),
        "matching/integer gram": (lambda b, K: f.matching(b, K, 2), (b, np.eye(4, dtype=int)), "gram must be floating"),
        "resample/two axes": (lambda b, u: api.resample(b, 4, u), (ones(2, 2), u), "vector of floats"),
        "resample/integers": (lambda b, u: api.resample(b, 4, u), (np.ones(4, dtype=int), u), "floats"),
    }
    return [refuse(f"filters/{name}", *rest) for name, rest in calls.items()]


def weights() -> list[Refusal]:
    """Return the QP and the projections."""
    K, c = np.eye(4), ones(4)
    simplex = api.Simplex(1.0)

    def solve(constraint: Any = simplex, **options: Any) -> Callable[..., Any]:
        return lambda K, c: api.solve_qp(K, c, constraint, **options)

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
        "a class for a constraint": (solve(api.NonNegative), (K, c), r"write NonNegative\(...\)"),
        "no constraint": (solve("simplex"), (K, c), "constraint must be"),
        "a total that is a word": (solve(api.Simplex("one")), (K, c), "builtins.str"),
        "a total that is a truth value": (solve(api.Simplex(True)), (K, c), "total must be"),
        "a cap of another length": (
            lambda K, c: api.solve_qp(K, c, api.CappedSimplex(c[:3], 1.0)),
            (K, c),
            "cap: shape",
        ),
        "a lower bound of another length": (
            lambda K, c: api.solve_qp(K, c, api.Box(c[:3], 1.0)),
            (K, c),
            "lower: shape",
        ),
        "an upper bound of another length": (
            lambda K, c: api.solve_qp(K, c, api.Box(0.0, c[:3])),
            (K, c),
            "upper: shape",
        ),
        "a vector of totals": (lambda K, c: api.solve_qp(K, c, api.Simplex(c)), (K, c), "total: shape"),
        "a vector of ridges": (lambda K, c: api.solve_qp(K, c, simplex, ridge=c), (K, c), "ridge: shape"),
        "a start of another length": (lambda K, c: api.solve_qp(K, c, simplex, start=c[:3]), (K, c), "start must have"),
        "an integer start": (
            lambda K, c, s: api.solve_qp(K, c, simplex, start=s),
            (K, c, np.ones(4, dtype=int)),
            "start must be floating",
        ),
        "a total that is complex": (solve(api.Simplex(1j)), (K, c), "total must be"),
    }
    out = [refuse(f"qp/{name}", *rest) for name, rest in calls.items()]
    spots: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
        "integers": (lambda v: nearest(simplex, v), (np.ones(4, dtype=int),), "float array"),
        "a number": (lambda v: nearest(simplex, v), (np.asarray(1.0),), "float array"),
        "no constraint": (lambda v: nearest("simplex", v), (c,), "constraint must be"),
        "a class": (lambda v: nearest(api.Simplex, v), (c,), "write Simplex"),
        "a cap of another length": (lambda v: nearest(api.CappedSimplex(v[:3], 1.0), v), (c,), "cap: shape"),
    }
    return out + [refuse(f"project/{name}", *rest) for name, rest in spots.items()]


def selections() -> list[Refusal]:
    """Return the composed selection's options."""
    x = {"w": api.Dense(ones(4, 5))}
    g, p = {"w": ones(5)}, {"w": api.Diagonal(ones(5))}
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
        "a filter that returns too many": (
            {"keep": 2, "filter": lambda b, K, k: api.filters.top_k(b, 3)},
            "must return Filtered",
        ),
    }
    out = []
    for name, (option, says) in options.items():
        call = lambda x, g, p, option=option: api.filter_then_weight(x, g, p, **option)  # noqa: E731
        out.append(refuse(f"selection/{name}", call, (x, g, p), says))
    out.append(
        refuse(
            "selection/scores of another length",
            lambda x, g, p: api.filter_then_weight(x, g, p, keep=2, scores=g["w"]),
            (x, g, p),
            "scores",
        )
    )
    for name, make in {
        "a cap of the kept alone": lambda v: api.CappedSimplex(v[:2], 1.0),
        "a lower bound of the kept alone": lambda v: api.Box(v[:2], 1.0),
        "an upper bound of the kept alone": lambda v: api.Box(0.0, v[:2]),
    }.items():
        call = lambda x, g, p, make=make: api.filter_then_weight(x, g, p, keep=2, constraint=make(g["w"]))  # noqa: E731
        out.append(refuse(f"selection/{name}", call, (x, g, p), "one a candidate"))
    samples = {"v": api.Dense(ones(2, 5))}
    out.append(
        refuse(
            "selection/target samples of other names",
            lambda x, g, p, s: api.filter_then_weight(x, g, p, keep=2, target_samples=s),
            (x, g, p, samples),
            "target_samples",
        )
    )
    out.append(
        refuse(
            "selection/target samples of another shape",  # a Scale fits any
            lambda x, g, s: api.filter_then_weight(x, g, {"w": api.Scale(1.0)}, keep=2, target_samples=s),
            (x, g, {"w": api.Dense(ones(2, 6))}),
            r"target_samples: gradients of 'w' are \(6,\), the candidates' \(5,\)",
        )
    )
    out.append(
        refuse(
            "cross_gram/others of another shape",
            lambda x, y: api.cross_gram(x, y, {"w": api.Scale(1.0)}),
            (x, {"w": api.Dense(ones(2, 6))}),
            r"others: gradients of 'w' are \(6,\)",
        )
    )
    return out


def others() -> list[Refusal]:
    """Return the guard and the optimizers."""
    a = np.asarray(1.0)
    v = ones(3)
    o = api.optimizers
    calls: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
        "guard/m=0": (lambda a: api.guard.shrinkage(a, a, a, 0), (a,), "number of target samples"),
        "guard/m=1.5": (lambda a: statistic(a, a, 1.5), (a,), "number of target samples"),
        "guard/cap 1.5": (lambda a: api.guard.shrinkage(a, a, a, 3, cap=1.5), (a,), "cap"),
        "guard/cap -0.1": (lambda a: api.guard.shrinkage(a, a, a, 3, cap=-0.1), (a,), "cap"),
        "guard/slope -1": (lambda a: api.guard.shrinkage(a, a, a, 3, slope=-1.0), (a,), "slope"),
        "optimizers/sgd without param": (lambda v: o.sgd(v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/adam without param": (lambda v: o.adam(v, v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/nadam without param": (lambda v: o.nadam(v, v, 0.5, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/radam without param": (lambda v: o.radam(v, v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/adamax without param": (lambda v: o.adamax(v, v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/adagrad without param": (lambda v: o.adagrad(v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/rmsprop without param": (lambda v: o.rmsprop(v, 1, lr=0.1, weight_decay=0.1), (v,), "param="),
        "optimizers/rmsprop centered, no mean": (lambda v: o.rmsprop(v, 1, lr=0.1, centered=True), (v,), "grad_avg="),
        "optimizers/adafactor without variance": (
            lambda v: o.adafactor(None, None, None, 1, lr=0.1, param=v),
            (v,),
            "variance=",
        ),
        "optimizers/adafactor without rows": (
            lambda v: o.adafactor(None, v, None, 1, lr=0.1, param=v[:, None]),
            (v,),
            "row_var",
        ),
        "optimizers/adafactor without columns": (
            lambda v: o.adafactor(v, None, None, 1, lr=0.1, param=v[:, None]),
            (v,),
            "col_var",
        ),
        "optimizers/soap of a vector": (lambda v: o.soap(v, v, None, None, 1, lr=0.1), (v,), "matrix"),
        "optimizers/muon of a vector": (lambda v: o.muon(v, lr=0.1), (v,), "matrix"),
        "optimizers/moments of two shapes": (lambda v: o.adam(v, v[:2], 1, lr=0.1), (v,), r"exp_avg_sq \(2,\)"),
        "optimizers/a target of another shape": (
            lambda v: o.lion(v, 1, lr=0.1, anticipate=v[:, None]),
            (v,),
            r"anticipate \(3, 1\)",
        ),
        "optimizers/a parameter of another shape": (
            lambda v: o.adamw(v, v, 1, lr=0.1, param=v[:1]),
            (v,),
            r"param \(1,\)",
        ),
        "optimizers/moments of integers": (
            lambda v: o.adagrad(v, 1, lr=0.1),
            (np.ones(3, dtype=int),),
            "real floating",
        ),
        "optimizers/step -1": (lambda v: o.adam(v, v, -1, lr=0.1), (v,), "step=-1"),
        "optimizers/lr -0.1": (lambda v: o.sgd(v, 1, lr=-0.1), (v,), "lr=-0.1"),
        "optimizers/lr NaN": (lambda v: o.rmsprop(v, 1, lr=float("nan")), (v,), "lr=nan"),
        "optimizers/betas 1": (lambda v: o.radam(v, v, 1, lr=0.1, betas=(1.0, 0.9)), (v,), r"betas=\(1.0, 0.9\)"),
        "optimizers/eps -1": (lambda v: o.adamax(v, v, 1, lr=0.1, eps=-1.0), (v,), "eps=-1.0"),
        "optimizers/damping -1": (lambda v: o.nadam(v, v, 1.0, 1, lr=0.1, damping=-1.0), (v,), "damping=-1.0"),
        "optimizers/weight decay -1": (
            lambda v: o.soap(v[:, None], v[:, None], None, None, 1, lr=0.1, weight_decay=-1.0),
            (v,),
            "weight_decay=-1.0",
        ),
        "optimizers/muon of nothing": (lambda v: o.muon(None, lr=0.1, param=v), (v,), "anticipate="),
    }
    k = api.sketch
    d, s = {"w": ones(3)}, {"w": api.Scale(1.0)}
    x = {"w": ftw.Dense(ones(2, 3))}
    inputs = (x, d)
    calls |= {
        "sketch/size 0": (lambda x, d: k.count_sketch(x, s, 0), inputs, "size"),
        "sketch/size too large": (lambda x, d: k.count_sketch(x, s, 40000), inputs, "size"),
        "sketch/size True": (lambda x, d: k.count_sketch(x, s, True), inputs, "size"),
        "sketch/seed 0.5": (lambda x, d: k.count_sketch(x, s, 8, seed=0.5), inputs, "seed"),
        "sketch/sizes differ": (lambda x, d: k.gram(x["w"].grads, x["w"].grads[:, :2]), inputs, "one size"),
        "sketch/scores of a vector": (lambda x, d: k.scores(d["w"], d["w"]), inputs, "one size"),
        "sketch/rank 0": (lambda x, d: k.low_rank(d, 0), inputs, "rank"),
        "sketch/iterations -1": (lambda x, d: k.low_rank(d, 1, iterations=-1), inputs, "iterations"),
        "sketch/oversample 1.5": (lambda x, d: k.low_rank(d, 1, oversample=1.5), inputs, "oversample"),
        "sketch/no direction": (lambda x, d: k.low_rank({}, 1), inputs, "non-empty mapping"),
        "sketch/direction lacks a name": (lambda x, d: k.low_rank_scores(x, {"v": d["w"]}), inputs, "lacks"),
        "sketch/direction of another shape": (lambda x, d: k.low_rank_scores(x, {"w": d["w"][:2]}), inputs, "'w'"),
    }
    return [refuse(name, *rest) for name, rest in calls.items()]
