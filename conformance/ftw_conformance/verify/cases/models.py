"""Random records, operators and models of every kind, as NumPy arrays of one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import ftw
from ftw.geometry import Gains

__all__ = [
    "KINDS",
    "LIES",
    "PACKED",
    "RECORDS",
    "SMALL",
    "documents",
    "geometry",
    "operator",
    "orthonormal",
    "psd",
    "record",
    "records",
    "target",
]

Array = Any
Rng = np.random.Generator


def psd(rng: Rng, d: int) -> Array:
    """Return a positive definite matrix (d, d)."""
    x = rng.normal(size=(d, d))
    return x @ x.T / d


def orthonormal(rng: Rng, d: int, r: int | None = None) -> Array:
    """Return r orthonormal columns (d, r)."""
    return np.linalg.qr(rng.normal(size=(d, d)))[0][:, : r or d]


def _outer(rng: Rng, n: int, t: int, d_out: int, d_in: int) -> Any:
    return ftw.OuterProduct(rng.normal(size=(n, t, d_in)), rng.normal(size=(n, t, d_out)))


def _rows(rng: Rng, n: int, t: int, size: int, d: int) -> Any:
    return ftw.Rows(rng.integers(0, size, size=(n, t)), rng.normal(size=(n, t, d)), size)


def _tied(rng: Rng, n: int, t: int) -> Any:
    extra = ftw.Dense(rng.normal(size=(n, 7, 3)))
    return ftw.Sum((_rows(rng, n, t, 7, 3), _outer(rng, n, t, 7, 3), extra))


LIES = {  # numbers of the tokens' samples, of four documents
    "unequal": (0, 1, 1, 1, 1, 1, 2, 2, 3),
    "padded": (-1, 0, 0, -1, 1, 1, 1, 2, 3, 3, -1, -1),
    "one is empty": (0, 0, 2, 2, 2, 2, 3),
    "one has all": (2,) * 11,
    "interleaved": (3, 0, -1, 1, 3, 3, 0, 2, 1, 3, 3),
    "only padding": (-1, -1, -1),
    "no token": (),
}


def documents(rng: Rng, kind: str, lie: str) -> Any:
    """Return the record of four documents that lie as they are named in `LIES`."""
    return _PACKED[kind](rng, np.array(LIES[lie], dtype=int), 4)


def _packed(rng: Rng, samples: Array, n: int, d_out: int, d_in: int) -> Any:
    t = len(samples)
    return ftw.Packed(rng.normal(size=(t, d_in)), rng.normal(size=(t, d_out)), samples, n)


def _packed_rows(rng: Rng, samples: Array, n: int, height: int, d: int) -> Any:
    t = len(samples)
    return ftw.PackedRows(rng.integers(0, height, size=t), rng.normal(size=(t, d)), samples, n, height)


_PACKED: dict[str, Callable[[Rng, Array, int], Any]] = {
    "packed": lambda rng, s, n: _packed(rng, s, n, 4, 6),
    "packed pairs": lambda rng, s, n: _packed(rng, s, n, 19, 17),  # pairs of tokens are cheaper
    "packed rows": lambda rng, s, n: _packed_rows(rng, s, n, 5, 4),
    "packed table": lambda rng, s, n: _packed_rows(rng, s, n, 60, 2),
    "packed twice": lambda rng, s, n: ftw.Sum((_packed(rng, s, n, 4, 5), _packed(rng, s, n, 4, 5))),
    "packed tied": lambda rng, s, n: ftw.Sum((_packed(rng, s, n, 7, 3), _packed_rows(rng, s, n, 7, 3))),
}
PACKED = tuple(_PACKED)


def _some_documents(kind: str) -> Callable[[Rng, int, int], Any]:
    """Return a maker of n documents with t tokens in the mean, the lengths as they fall, two tokens of padding."""

    def make(rng: Rng, n: int, t: int) -> Any:
        lengths = rng.multinomial(n * t, rng.dirichlet(np.ones(n)))
        return _PACKED[kind](rng, np.append(np.repeat(np.arange(n), lengths), [-1, -1]), n)

    return make


RECORDS: dict[str, Callable[[Rng, int, int], Any]] = {
    "wide": lambda rng, n, t: _outer(rng, n, t, 4, 6),
    "tall": lambda rng, n, t: _outer(rng, n, t, 6, 3),
    "square": lambda rng, n, t: _outer(rng, n, t, 4, 4),
    "token": lambda rng, n, t: _outer(rng, n, 1, 13, 11),  # few tokens, large sides: pairs of tokens are cheaper
    "rows": lambda rng, n, t: _rows(rng, n, t, 5, 4),  # rows repeat
    "table": lambda rng, n, t: _rows(rng, n, t, 60, 2),  # more rows than tokens
    "vector": lambda rng, n, t: ftw.Dense(rng.normal(size=(n, 5))),
    "kernel": lambda rng, n, t: ftw.Dense(rng.normal(size=(n, 3, 2, 2))),
    "gain": lambda rng, n, t: ftw.Dense(rng.normal(size=n)),
    "tied": _tied,
    "twice": lambda rng, n, t: ftw.Sum((_outer(rng, n, t, 4, 5), _outer(rng, n, 2 * t, 4, 5))),
    **{kind: _some_documents(kind) for kind in PACKED},
}
SMALL = ("wide", "table", "tied", "vector")


def record(rng: Rng, kind: str, n: int, t: int = 3) -> Any:
    """Return a record of one kind, of n samples of t tokens."""
    return RECORDS[kind](rng, n, t)


def records(rng: Rng, n: int, t: int = 3, names: tuple[str, ...] = SMALL) -> dict[str, Any]:
    """Return a model's records, one of each kind in ``names``."""
    return {name: record(rng, name, n, t) for name in names}


KINDS = ("scale", "diagonal", "kronecker", "vectors", "mixed", "rotated", "low", "left", "right", "polar", "spectral")


def operator(rng: Rng, kind: str, shape: tuple[int, ...]) -> Any:
    """Return an operator of a kind for a shape; kinds that need a matrix give way to Diagonal elsewhere."""
    if kind == "scale":
        return ftw.Scale(np.asarray(rng.uniform(0.5, 2)))
    if kind == "diagonal" or len(shape) != 2:
        return ftw.Diagonal(np.asarray(rng.uniform(0, 2, size=shape)))
    rows, columns = shape
    if kind == "kronecker":
        return ftw.Kronecker(psd(rng, rows), psd(rng, columns))
    if kind == "vectors":
        return ftw.Kronecker(rng.uniform(0, 2, size=rows), rng.uniform(0, 2, size=columns))
    if kind == "mixed":
        return ftw.Kronecker(psd(rng, rows), rng.uniform(0, 2, size=columns))
    if kind == "rotated":
        return ftw.Rotated(orthonormal(rng, rows), rng.uniform(0, 2, size=shape), orthonormal(rng, columns))
    if kind == "low":  # fewer directions than the parameter has
        r, q = max(1, rows - 1), max(1, columns - 1)
        return ftw.Rotated(orthonormal(rng, rows, r), rng.uniform(0, 2, size=(r, q)), orthonormal(rng, columns, q))
    if kind in ("left", "right"):  # one side is the identity
        left, right = (
            orthonormal(rng, d) if kind == side else None for d, side in ((rows, "left"), (columns, "right"))
        )
        return ftw.Rotated(left, rng.uniform(0, 2, size=shape), right)
    u, s, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    if kind == "polar":
        return ftw.Polar(u, s + 0.3, vt)
    both, skew = (x + x.T for x in (rng.uniform(0, 1, size=(len(s), len(s))) for _ in range(2)))
    return ftw.Polar(u, s, vt, Gains(both, skew, rng.uniform(0, 2, size=len(s))))


def geometry(rng: Rng, gradients: Mapping[str, Any], kind: str | int = "diagonal") -> dict[str, Any]:
    """Return operators of one kind, or of all of them in turn from the one with number ``kind``."""
    kinds = [kind if isinstance(kind, str) else KINDS[(kind + i) % len(KINDS)] for i in range(len(gradients))]
    return {name: operator(rng, k, r.shape) for k, (name, r) in zip(kinds, gradients.items(), strict=True)}


def target(rng: Rng, gradients: Mapping[str, Any]) -> dict[str, Array]:
    """Return a dense target of the gradients' shapes."""
    return {name: np.asarray(rng.normal(size=r.shape)) for name, r in gradients.items()}
