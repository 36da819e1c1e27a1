"""Sketches: exact properties of the hash, the stated error over many seeds, and low-rank directions against an SVD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import numpy as np

import ftw
from ftw import spi
from ftw_conformance.verify.table import Case, Expect, exactly, most, rounded, summed

from . import explicit, models
from .sizes import lengths, terms

Array = Any
SEEDS = 40


@cache
def sketched(size: int, seed: int, max_bytes: int = 2**28) -> Callable[..., dict[str, Any]]:
    """Return a call of count_sketch, and what is estimated from it."""

    def call(x: Any, g: Any, p: Any) -> dict[str, Any]:
        xp = spi.namespace(*spi.leaves(x))
        target = {name: ftw.Dense(xp.expand_dims(t, axis=0)) for name, t in g.items()}
        s = ftw.sketch.count_sketch(x, p, size, seed=seed, max_bytes=max_bytes)
        t = ftw.sketch.count_sketch(target, p, size, seed=seed)
        every = {"sketch": s, "scores": ftw.sketch.scores(s, t), "of a vector": ftw.sketch.scores(s, t[0, :])}
        return every | {"gram": ftw.sketch.gram(s), "cross": ftw.sketch.gram(s, t)}

    return call


def halves(x: Any, p: Any) -> list[tuple[Array, Array]]:
    """Return matrices R (q, p) with ``R'R = P``, one for each piece of each parameter, and the gradients (n, p)."""
    out = []
    for name in sorted(x):
        G = explicit.dense(x[name]).reshape(x[name].n, -1)
        P = explicit.matrix(p[name], x[name].shape)
        values, vectors = np.linalg.eigh((P + P.T) / 2)
        out.append((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)
        del G
    return out


def account_large(got: Mapping[str, Array], x: Any, g: Any, p: Any) -> dict[str, Expect]:
    """With many more buckets than coordinates the estimates lie within a few stated errors of the truth."""
    X, P, t = explicit.flat(x), explicit.metric(x, p), explicit.flat_target(g)
    size = got["sketch"].shape[1]
    K, b, square = X @ P @ X.T, X @ P @ t, t @ P @ t
    s = np.asarray(got["sketch"], dtype=float)
    d = np.sqrt(np.diag(K))
    slack = 6 / np.sqrt(size)
    return {
        "sketch": exactly(got["sketch"]),
        "gram": rounded(s @ s.T, np.outer(d, d) * 4, 64),
        "scores": exactly(got["scores"]),
        "of a vector": exactly(got["scores"]),
        "cross": Expect(np.asarray(got["scores"])[:, None], "rounded", float(np.max(d) * np.sqrt(square)) * 4, 64),
        "error of gram": most(slack, np.abs(got["gram"] - K) / np.outer(d, d)),
        "error of scores": most(slack, np.abs(got["scores"] - b) / (d * np.sqrt(square))),
    }


@cache
def averaged(size: int) -> Callable[..., dict[str, Any]]:
    """Return a call that averages over seeds: the estimate has no bias, and its spread is what is stated."""

    def call(x: Any, g: Any, p: Any) -> dict[str, Any]:
        xp = spi.namespace(*spi.leaves(x))
        grams = xp.stack([ftw.sketch.gram(ftw.sketch.count_sketch(x, p, size, seed=seed)) for seed in range(SEEDS)])
        return {"mean": xp.mean(grams, axis=0), "spread": xp.mean(xp.std(grams, axis=0) ** 2)}

    return call


def account_averaged(got: Mapping[str, Array], x: Any, g: Any, p: Any) -> dict[str, Expect]:
    """Expect the Gram matrix for a mean, and a variance of about ``(|x|^2 |y|^2 + <x, y>^2) / m``."""
    X, P = explicit.flat(x), explicit.metric(x, p)
    K = X @ P @ X.T
    d = np.diag(K)
    size = 64
    variance = (np.outer(d, d) + K * K) / size
    ratio = float(got["spread"]) / float(np.mean(variance))
    return {
        "mean": exactly(got["mean"]),
        "spread": exactly(got["spread"]),
        "bias": most(5.0, np.abs(got["mean"] - K) / np.sqrt(variance / SEEDS)),
        "variance is not more": most(1.5, ratio),
        "variance is not less": most(-0.3, -ratio),
    }


@cache
def walked(size: int, seed: int) -> Callable[..., dict[str, Any]]:
    """Return a call with much and with little memory."""

    def call(x: Any, g: Any, p: Any) -> dict[str, Any]:
        whole = ftw.sketch.count_sketch(x, p, size, seed=seed)
        parts = ftw.sketch.count_sketch(x, p, size, seed=seed, max_bytes=3000)
        first: Any = [0]
        one = ftw.sketch.count_sketch(ftw.take(x, first), p, size, seed=seed)
        other = ftw.sketch.count_sketch(ftw.take(x, first), p, size, seed=seed + 1)
        turned = ftw.sketch.count_sketch(dict(reversed(x.items())), p, size, seed=seed)
        xp = spi.namespace(whole)
        return {
            "parts": parts - whole,
            "order of names": turned - whole,
            "one": one[0, :] - whole[0, :],
            "seeds": xp.sum(one * other) / xp.sum(one * one),
        }

    return call


def account_walked(got: Mapping[str, Array], x: Any, g: Any, p: Any) -> dict[str, Expect]:
    """Blocks and batches change nothing; seeds do."""
    X, P = explicit.flat(x), explicit.metric(x, p)
    size = float(np.max(lengths(x)) * np.sqrt(np.linalg.norm(P, 2)))
    del X
    many = 64 * terms(x)
    return {
        "parts": summed(np.zeros(got["parts"].shape), size, many),
        "order of names": summed(np.zeros(got["parts"].shape), size, many),
        "one": summed(np.zeros(got["one"].shape), size, many),
        "seeds": exactly(got["seeds"]),
        "seeds differ": most(0.8, abs(float(got["seeds"]))),
    }


def pinned(x: Any) -> dict[str, Any]:
    """Return the hash itself: which coordinate goes where, with which sign."""
    return {"sketch": ftw.sketch.count_sketch(x, dict.fromkeys(x, ftw.Scale(1.0)), 11, seed=7)}


def account_pinned(got: Mapping[str, Array], x: Any) -> dict[str, Expect]:
    """Return the hash again, in Python integers."""
    out, total = np.zeros((2, 11)), 0.0
    for i, name in enumerate(sorted(x)):
        G = explicit.dense(x[name])
        for r in range(G.shape[1]):
            for c in range(G.shape[2]):
                bucket, sign = hashed(r, c, 11, 7, i)
                out[:, bucket] += sign * G[:, r, c]
        total += np.sum(np.abs(G))
    return {"sketch": rounded(out, total, 1.0)}


def hashed(row: int, column: int, size: int, seed: int, parameter: int = 0) -> tuple[int, int]:
    """Return bucket and sign of one coordinate, as docs/golden-vectors.md describes them."""
    words = []
    for side, number in enumerate((row, column)):
        words.append(mixed(number >> 16, number & 0xFFFF, keys(seed, parameter, 0, side)))
    high, low = mixed(words[0][0] ^ words[1][0], words[0][1] ^ words[1][1], keys(seed, parameter, 0, 2))
    return (high * size + (low * size >> 16)) >> 16, 1 - 2 * (low & 1)


def keys(*numbers: int) -> list[tuple[int, int]]:
    """Return multiplier and increment of four rounds."""
    state, out = 0, []
    for x in numbers:
        state = splitmix(state ^ x)
    for _ in range(4):
        state = splitmix(state)
        out.append((((state >> 40) & 0x3FFF) | 0x2001, state & 0x1FFFFFFF))
    return out


def splitmix(x: int) -> int:
    """Return the next number of splitmix64 (Steele, Lea & Flood 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def mixed(high: int, low: int, rounds: list[tuple[int, int]]) -> tuple[int, int]:
    """Return two words of 16 bits after the Feistel rounds."""
    for multiplier, increment in rounds:
        high, low = low, high ^ (((low * multiplier + increment) >> 9) & 0xFFFF)
    return high, low


@cache
def ranked(rank: int, iterations: int, oversample: int) -> Callable[..., dict[str, Any]]:
    """Return a call of low_rank and of the scores by it."""

    def call(x: Any, m: Any) -> dict[str, Any]:
        d = ftw.sketch.low_rank(m, rank, iterations=iterations, oversample=oversample)
        out = {"scores": ftw.sketch.low_rank_scores(x, d)}
        for name, value in d.items():
            if isinstance(value, ftw.sketch.LowRank):
                out[name] = value.left @ value.right
                out[f"{name}, rows"] = value.right @ value.right.T
            else:
                out[name] = value
        return out

    return call


def account_ranked(rank: int, oversample: int, exact: bool) -> Callable[..., dict[str, Expect]]:
    """Return the account: the truncated SVD, to rounding where the spectrum makes the iteration exact."""

    def account(got: Mapping[str, Array], x: Any, m: Any) -> dict[str, Expect]:
        best, out = {}, {}
        for name, value in m.items():
            value = np.asarray(value)
            if value.ndim != 2 or min(value.shape) <= rank + oversample:
                best[name] = value
                out[name] = exactly(value)
                continue
            u, s, vt = np.linalg.svd(value, full_matrices=False)
            best[name] = (u[:, :rank] * s[:rank]) @ vt[:rank]
            scale = float(s[0]) if exact else float(s[0] / np.finfo(got["scores"].dtype).eps * 1e-3)
            out[name] = rounded(best[name], scale, 100 * len(s))
            out[f"{name}, rows"] = rounded(np.eye(rank), 1.0, 100 * len(s))
            missed = float(np.linalg.norm(np.asarray(got[name], dtype=float) - value))
            out[f"{name}, error"] = most(1.3 * float(np.linalg.norm(s[rank:])) + 1e-4 * float(s[0]), missed)
            best[name] = np.asarray(got[name], dtype=float)
        scores = sum(explicit.dense(x[k]).reshape(x[k].n, -1) @ best[k].reshape(-1) for k in x)
        size = np.sqrt(sum(np.linalg.norm(v) ** 2 for v in best.values()))
        out["scores"] = summed(scores, lengths(x) * size, 64 * terms(x))
        return out

    return account


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(6)
    out: list[Case] = []
    for start in range(len(models.KINDS)):
        names = tuple(models.RECORDS)[start % 2 :: 2]
        x = models.records(rng, 4, 3, names)
        inputs = (x, models.target(rng, x), models.geometry(rng, x, start))
        heavy = start != 0
        out.append(Case(f"sketch/estimates/{start}", sketched(4096, start), inputs, account_large, heavy=heavy))
        out.append(Case(f"sketch/blocks/{start}", walked(97, start), inputs, account_walked, heavy=True))
        if start % 3 == 0:
            case = Case(f"sketch/many seeds/{start}", averaged(64), inputs, account_averaged, ("float64",), heavy=True)
            out.append(case)
    pin = {"w": ftw.Dense(rng.normal(size=(2, 5, 9)))}
    pin["v"] = pin["w"].take(np, np.array([1, 0]))
    out.append(Case("sketch/hash", pinned, (pin,), account_pinned))
    for rank, iterations, oversample, exact in ((2, 2, 8, True), (3, 3, 1, False), (1, 0, 2, False), (4, 6, 1, False)):
        x = {
            "outer": ftw.OuterProduct(rng.normal(size=(3, 2, 17)), rng.normal(size=(3, 2, 14))),
            "rows": ftw.Rows(rng.integers(0, 19, size=(3, 4)), rng.normal(size=(3, 4, 13)), 19),
            "dense": ftw.Dense(rng.normal(size=(3, 12, 15))),
            "bias": ftw.Dense(rng.normal(size=(3, 30))),
            "narrow": ftw.OuterProduct(rng.normal(size=(3, 2, 3)), rng.normal(size=(3, 2, 2))),
        }
        x["both"] = ftw.Sum((x["outer"], ftw.Dense(rng.normal(size=(3, 14, 17)))))
        m = {}
        for name, r in x.items():
            m[name] = rng.normal(size=r.shape)
            if m[name].ndim == 2:
                u, _, vt = np.linalg.svd(m[name], full_matrices=False)
                kept = rank + (0 if exact else 4)
                m[name] = (u * np.where(np.arange(len(vt)) < kept, 4.0 ** -np.arange(len(vt)), 0.0)) @ vt
        call, account = ranked(rank, iterations, oversample), account_ranked(rank, oversample, exact)
        wide = ("float64", "float32") if exact else ("float64",)
        out.append(Case(f"sketch/rank {rank}, {iterations} iterations", call, (x, m), account, wide, heavy=not exact))
    return out
