"""Scores, Gram matrices, combinations and the operators, against explicit gradients and matrices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw import spi
from ftw.inner_products import squared_norms
from ftw_conformance.verify.table import Case, Expect, exactly, summed

from . import explicit, models
from .operators import account_acted, account_definite, account_turned, acted, definite, negatives, turned
from .sizes import length, lengths, record_terms, terms

Array = Any
ALL = ("float64", "float32", "bfloat16", "float16")
WIDE = ("float64", "float32")


def products(x: Any, y: Any, g: Any, p: Any) -> dict[str, Any]:
    """Everything that is an inner product, by the route that the planner chooses."""
    K = ftw.gram(x, p)
    return {
        "scores": ftw.scores(x, g, p),
        "gram": K,
        "asymmetry": K - K.T,
        "cross_gram": ftw.cross_gram(x, y, p),
        "of itself": ftw.cross_gram(x, x, p),
    }


@cache
def in_blocks(max_bytes: int) -> Callable[..., dict[str, Any]]:
    """Return the same with little memory, so that blocks of rows and columns, or chunks of samples, must be walked."""

    def call(x: Any, y: Any, g: Any, p: Any) -> dict[str, Any]:
        return {
            "gram": ftw.gram(x, p, max_bytes=max_bytes),
            "cross_gram": ftw.cross_gram(x, y, p, max_bytes=max_bytes),
            "norms": squared_norms(x, p),
        }

    return call


def account(got: Mapping[str, Array], x: Any, y: Any, g: Any, p: Any) -> dict[str, Expect]:
    """Inner products of gradients written out, by the reference."""
    X, Y, P, t = explicit.flat(x), explicit.flat(y), explicit.metric(x, p), explicit.flat_target(g)
    size = np.linalg.norm(P, 2) if P.size else 1.0
    a, b = lengths(x), lengths(y)
    tokens = terms(x) * 64
    K = ref.gram(X, P)
    every = {
        "scores": summed(ref.scores(X, t, P), a * size * np.linalg.norm(t), tokens),
        "gram": summed(K, size * np.outer(a, a), tokens),
        "asymmetry": exactly(np.zeros(K.shape)),
        "cross_gram": summed(ref.cross_gram(X, Y, P), size * np.outer(a, b), tokens),
        "of itself": summed(K, size * np.outer(a, a), tokens),
        "norms": summed(np.diag(K), size * a * a, tokens),
    }
    return {name: every[name] for name in got}


def combined(x: Any, w: Any, i: Any) -> dict[str, Any]:
    """Weighted gradients, all of them and of some samples."""
    out = {f"combine {name}": g for name, g in ftw.combine(x, w).items()}
    some = ftw.take(x, i)
    return out | {f"take {name}": g for name, g in ftw.combine(some, w[: i.shape[0]]).items()}


def account_combined(got: Mapping[str, Array], x: Any, w: Array, i: Array) -> dict[str, Expect]:
    """Sum the gradients written out; a sample of zero weight is left out before anything is multiplied."""
    out = {}
    for name, record in x.items():
        G = explicit.dense(record)  # (n, *shape)
        for what, members, weights in (("combine", np.arange(len(w)), w), ("take", i, w[: len(i)])):
            kept = weights != 0
            G_kept, w_kept = G[members[kept]], weights[kept]
            scale = np.sum(np.abs(w_kept) * length(record)[members[kept]])
            value = np.tensordot(w_kept, G_kept, axes=1)
            out[f"{what} {name}"] = summed(value, scale, 64 * record_terms(record))
    return out


def taken(x: Any, i: Any) -> dict[str, Any]:
    """Return the arrays of the records of some samples."""
    return {str(number): leaf for number, leaf in enumerate(spi.leaves(ftw.take(x, i)))}


def account_taken(got: Mapping[str, Array], x: Any, i: Array) -> dict[str, Expect]:
    """Take them one by one."""
    return {str(k): exactly(np.stack([leaf[j] for j in i])) for k, leaf in enumerate(spi.leaves(x))}


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(1)
    out: list[Case] = []
    for kind in models.KINDS:
        for name in models.RECORDS:
            if kind not in ("scale", "diagonal") and name in ("vector", "kernel", "gain"):
                continue
            out += pair(rng, f"products/{kind}/{name}", {name: kind}, heavy=True)
    for start in range(len(models.KINDS)):  # every record with every operator again, a whole model at a time
        names = tuple(models.RECORDS)
        x, y = models.records(rng, 4, 3, names), models.records(rng, 3, 2, names)
        g, p = models.target(rng, x), models.geometry(rng, x, start)
        out.append(
            Case(
                f"products/model/{start}",
                products,
                (x, y, g, p),
                account,
                ALL,
                heavy=start not in (0, 6),
                narrow=start == 0,
            )
        )
        for size in (1500, 6000):
            blocks = in_blocks(size)
            case = Case(f"products/model/{start}/{size} bytes", blocks, (x, y, g, p), account, WIDE, heavy=True)
            out.append(case)
    out += situations(rng)
    out += combinations(rng)
    for kind in models.KINDS:
        for shape in ((4, 6), (6, 4), (5, 5), (1, 3), (3, 1), (7,), (2, 3, 2)):
            if len(shape) != 2 and kind not in ("scale", "diagonal"):
                continue
            one, h = models.operator(rng, kind, shape), rng.normal(size=(3, *shape))
            heavy = shape not in ((4, 6), (7,)) or kind == "low"
            out.append(Case(f"operators/{kind}/{shape}", acted, (one, h[2], h[:2]), account_acted, WIDE, heavy=heavy))
    for shape in ((4, 6), (6, 4), (5, 5)):
        for name, operator in negatives(rng, shape).items():
            account_of_it = account_definite(shape)
            case = Case(
                f"operators/negative {name}/{shape}", definite, (operator,), account_of_it, WIDE, heavy=shape[0] > 4
            )
            out.append(case)
    return out


def pair(rng: Any, name: str, kinds: Mapping[str, str], *, heavy: bool) -> list[Case]:
    """Return the cases of one record with one operator."""
    names = tuple(kinds)
    x, y = models.records(rng, 5, 3, names), models.records(rng, 3, 2, names)
    g = models.target(rng, x)
    p = {k: models.operator(rng, kind, x[k].shape) for k, kind in kinds.items()}
    inputs = (x, y, g, p)
    return [
        Case(name, products, inputs, account, ALL, heavy=heavy),
        Case(f"{name}/blocks", in_blocks(700), inputs, account, ALL, heavy=heavy),
        Case(f"{name}/small blocks", in_blocks(300), inputs, account, ("float64",), heavy=heavy),
    ]


def situations(rng: Any) -> list[Case]:
    """Return the degenerate ones."""
    out = []
    for start in (1, 4, 7):
        names = models.SMALL
        p = models.geometry(rng, models.records(rng, 1), start)

        def add(what: str, x: Any, y: Any, p: Any = p, start: int = start) -> None:
            g = models.target(rng, x)
            out.append(Case(f"products/{what}/{start}", products, (x, y, g, p), account, ALL, heavy=start != 1))
            call = in_blocks(4000)
            out.append(Case(f"products/{what}/{start}/blocks", call, (x, y, g, p), account, WIDE, heavy=True))

        x, y = models.records(rng, 4, 3, names), models.records(rng, 2, 5, names)
        add("one sample", models.records(rng, 1, 3, names), y)
        add("one token", models.records(rng, 4, 1, names), models.records(rng, 3, 1, names))
        add("duplicates", scaled(x, take=[0, 1, 1, 0]), scaled(x, take=[1, 1]))
        add("zero gradients", scaled(x, factors=[1, 0, 1, 0]), scaled(y, factors=[0, 0]))
        add("rank deficient", models.records(rng, 12, 3, names), y)
    for lie in models.LIES:  # documents, however they lie
        x, y = ({k: models.documents(rng, k, lie) for k in models.PACKED} for _ in range(2))
        for start in (0, 1, 7):
            g, p = models.target(rng, x), models.geometry(rng, x, start)
            name = f"products/documents/{lie}/{start}"
            out.append(Case(name, products, (x, y, g, p), account, ALL, heavy=start != 1 or lie != "padded"))
            out.append(Case(f"{name}/blocks", in_blocks(4000), (x, y, g, p), account, WIDE, heavy=True))
    long = models.records(rng, 2, 4096, ("wide", "rows", "table"))
    p = models.geometry(rng, long, 0)
    inputs = (long, models.records(rng, 2, 100, ("wide", "rows", "table")), models.target(rng, long), p)
    out.append(Case("products/4096 tokens", products, inputs, account, ALL))
    for dtype in ("uint8", "int8", "int16", "uint16", "int32"):  # more rows and samples than a byte can count
        x, y = (
            {"table": ftw.Rows(rng.integers(0, 127, size=(m, 2)).astype(dtype), rng.normal(size=(m, 2, 1)), 300)}
            for m in (40, 3)
        )
        g, p = models.target(rng, x), {"table": ftw.Scale(np.asarray(1.5))}
        name = f"products/narrow integers/{dtype}"
        out.append(Case(name, in_blocks(90_000), (x, y, g, p), account, WIDE, heavy=dtype != "uint8"))
        out.append(Case(f"{name}/all at once", products, (x, y, g, p), account, ("float64",), heavy=True))
    for what, factor in (("huge", 1e9), ("tiny", 1e-9)):
        x, y = (scaled(models.records(rng, n, 3), factors=[factor] * n) for n in (4, 2))
        g = models.target(rng, x)
        out.append(Case(f"products/{what}", products, (x, y, g, models.geometry(rng, x, 1)), account, WIDE, heavy=True))
    return out


def scaled(x: Any, *, factors: Any = None, take: Any = None) -> Any:
    """Return the records with their samples multiplied, or taken, in plain NumPy."""
    if isinstance(x, dict):
        return {name: scaled(r, factors=factors, take=take) for name, r in x.items()}
    if isinstance(x, ftw.Sum):
        return ftw.Sum(tuple(scaled(part, factors=factors, take=take) for part in x.parts))
    n = x.n
    i = np.arange(n) if take is None else np.asarray(take)
    f = np.ones(len(i)) if factors is None else np.asarray(factors, dtype=float)
    if isinstance(x, (ftw.Packed, ftw.PackedRows)):
        at = np.concatenate([np.flatnonzero(x.samples == j) for j in i])  # tokens, document by document
        numbers = np.concatenate([np.full(np.sum(x.samples == j), k) for k, j in enumerate(i)])
        b = x.output_grads[at] * f[numbers][:, None]
        if isinstance(x, ftw.PackedRows):
            return ftw.PackedRows(x.indices[at], b, numbers, len(i), x.height)
        return ftw.Packed(x.inputs[at], b, numbers, len(i))
    if isinstance(x, ftw.Dense):
        return ftw.Dense(x.grads[i] * f.reshape(-1, *[1] * (x.grads.ndim - 1)))
    b = x.output_grads[i] * f[:, None, None]
    return ftw.Rows(x.indices[i], b, x.size) if isinstance(x, ftw.Rows) else ftw.OuterProduct(x.inputs[i], b)


def combinations(rng: Any) -> list[Case]:
    """Return the cases of combine and take."""
    out = []
    for name in models.RECORDS:
        x = models.records(rng, 5, 3, (name,))
        w, i = rng.normal(size=5), np.array([4, 0, 0])
        if name in models.PACKED:  # a trace cannot repeat tokens
            out.append(Case(f"combine/{name}/repeated", combined, (x, w, i), account_combined, ALL, eager=True))
            i = np.array([4, 0, 2])
        else:
            out.append(Case(f"take/{name}", taken, (x, i), account_taken, WIDE))
        out.append(Case(f"combine/{name}", combined, (x, w, i), account_combined, ALL, narrow=name in models.SMALL))
        out.append(Case(f"turned/{name}", turned, (x,), account_turned, WIDE, heavy=True))
        none = np.array([0.5, 0.0, -1.0, 0.0, 2.0])
        spoilt = {key: _spoilt(r, np.array([1, np.nan, 1, np.inf, 1])) for key, r in x.items()}
        out.append(Case(f"combine/{name}/a refused sample is not a number", combined, (spoilt, none, i), spared, ALL))
        out.append(Case(f"combine/{name}/no weight", combined, (spoilt, np.zeros(5), i), spared, WIDE))
    return out


def spared(got: Mapping[str, Array], x: Any, w: Array, i: Array) -> dict[str, Expect]:
    """Return the account of the samples that have a weight; what the others hold is not asked."""
    clean = {name: _cleaned(record) for name, record in x.items()}
    return account_combined(got, clean, w, i)


def _spoilt(record: Any, factors: Array) -> Any:
    """Return the record with every array of values multiplied, sample by sample."""
    if isinstance(record, ftw.Sum):
        return ftw.Sum(tuple(_spoilt(part, factors) for part in record.parts))
    record = scaled(record, factors=factors)
    if isinstance(record, ftw.Packed):
        samples: Any = record.samples
        of_tokens = np.append(factors, np.nan)[samples][:, None]  # nor what padding holds
        return dataclasses.replace(record, inputs=record.inputs * of_tokens)
    if not isinstance(record, ftw.OuterProduct):
        return record
    return ftw.OuterProduct(np.asarray(record.inputs) * factors[:, None, None], record.output_grads)


def _cleaned(record: Any) -> Any:
    if isinstance(record, ftw.Sum):
        return ftw.Sum(tuple(map(_cleaned, record.parts)))
    if isinstance(record, ftw.Dense):
        return ftw.Dense(np.nan_to_num(np.asarray(record.grads), posinf=0.0, neginf=0.0))
    b = np.nan_to_num(np.asarray(record.output_grads), posinf=0.0, neginf=0.0)
    if isinstance(record, ftw.PackedRows):
        return dataclasses.replace(record, output_grads=b)
    if isinstance(record, ftw.Packed):
        a = np.nan_to_num(np.asarray(record.inputs), posinf=0.0, neginf=0.0)
        return dataclasses.replace(record, inputs=a, output_grads=b)
    if isinstance(record, ftw.Rows):
        return ftw.Rows(record.indices, b, record.size)
    return ftw.OuterProduct(np.nan_to_num(np.asarray(record.inputs), posinf=0.0, neginf=0.0), b)
