"""Adapters: a whole training step's selection on a tiny model, against backpropagation written out in NumPy.

An adapter is one function from a `TrainingStep` to scores, indices, weights and the composed gradient. The model is an
embedding, a layer with a bias, and a head, so that every kind of record occurs::

    logits = tanh(E[x] W' + b) H',      loss of a sample = mean over its tokens of the cross entropy

Its optimizer is Adam, with the state given; the geometry folds in the target's gradient with a damping of 0.1.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import ftw_reference as ref
import numpy as np

from .backends import UnavailableError
from .matrix.table import Row, jax_rows, torch_rows
from .runner import FAIL, PASS, SKIP, Result, measure, with_gap
from .table import Expect
from .tolerances import tolerance

__all__ = ["Adapter", "TrainingStep", "names", "per_sample", "register_adapter", "verify"]

Array = Any


class TrainingStep(NamedTuple):
    """One step of training, as NumPy arrays."""

    parameters: dict[str, Array]  # embedding (v, d), weight (h, d), bias (h,), head (v, h)
    exp_avg: dict[str, Array]  # Adam's first moments
    exp_avg_sq: dict[str, Array]  # and second
    step: int  # steps already taken
    lr: float
    pool: tuple[Array, Array]  # tokens (n, t) and labels (n, t)
    target: tuple[Array, Array]  # (m, t) and (m, t)
    keep: int
    options: dict[str, Any]  # of filter_then_weight


Adapter = Callable[[TrainingStep, str], Mapping[str, Any]]
"""``adapter(step, device) -> {"scores", "indices", "weights", "gradients": {name: array}}`` in NumPy."""

_adapters: dict[str, Adapter] = {}
_compiling: set[str] = set()
_matrices: dict[str, Callable[..., Iterator[Row]]] = {}
QUICK = ("default", "before the first step", "duplicates", "shortlist", "top_k, uniform")  # three programs


def register_adapter(
    name: str, adapter: Adapter, *, compiles: bool = False, matrix: Callable[..., Iterator[Row]] | None = None
) -> None:
    """Add an adapter to the table.

    Parameters
    ----------
    name : str
        How ``--backend`` calls it.
    adapter : callable
        ``adapter(step, device) -> mapping`` with ``scores`` (n,), ``indices`` (keep,), ``weights`` (keep,) and
        ``gradients`` {name: array}, the weighted gradient in the model's parameters; everything in NumPy.
    compiles : bool
        Whether each new shape costs a compilation; some situations are then left to ``--full``.
    matrix : callable, optional
        ``matrix(device, *, full) -> iterator of Row``: cases of the adapter's own parts.
    """
    _adapters[name] = adapter
    if matrix is not None:
        _matrices[name] = matrix
    (_compiling.add if compiles else _compiling.discard)(name)


def names() -> list[str]:
    """Return the names of the adapters."""
    return list(_adapters)


def verify(
    name: str, device: str = "cpu", *, only: str = "*", seen: Any = None, full: bool = False, gaps: Any = None
) -> list[Result]:
    """Run the adapter's cases; the arguments are those of `ftw_conformance.verify.verify`."""
    out = []
    for case, dtype, call in _rows(name, device, full=full):
        if not fnmatchcase(case, only):
            continue
        start = time.perf_counter()
        try:
            if name in _compiling and not full and case.removeprefix("adapter/") not in QUICK and "matrix/" not in case:
                result = Result(case, name, dtype, SKIP)
            else:
                result = _judge(case, name, dtype, call())
        except ImportError as error:
            raise UnavailableError(f"not installed ({error.name or error})") from error
        except UnavailableError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            result = Result(case, name, dtype, FAIL, np.inf, detail=f"{type(error).__name__}: {text}")
        result = with_gap(result, gaps)
        result = result._replace(seconds=time.perf_counter() - start)
        if seen is not None:
            seen(result)
        out.append(result)
    return out


def _rows(name: str, device: str, *, full: bool) -> Iterator[Row]:
    """Yield the situations of a whole step, and the matrix of the adapter's own parts."""
    for situation, problem in steps().items():
        dtype = str(problem.parameters["head"].dtype)
        yield Row(f"adapter/{situation}", dtype, partial(_step, name, problem, device))
    if name in _matrices:
        yield from _matrices[name](device, full=full)


def _step(name: str, problem: TrainingStep, device: str) -> Mapping[str, Expect]:
    got = _adapters[name](problem, device)
    found = expected(problem, got)
    return {what: e if e.got is not None else e._replace(got=np.asarray(got[what])) for what, e in found.items()}


def _judge(case: str, name: str, dtype: str, found: Mapping[str, Expect]) -> Result:
    worst = (0.0, 1.0, "")
    for what, e in found.items():
        error, limit = measure(np.asarray(e.got), e), tolerance(e.rule, dtype, e.condition)
        if not error <= limit:
            return Result(case, name, dtype, FAIL, error, limit, detail=what)
        if error / max(limit, 1e-300) > worst[0] / max(worst[1], 1e-300) or not worst[2]:
            worst = (error, limit, what)
    return Result(case, name, dtype, PASS, worst[0], worst[1])


def expected(problem: TrainingStep, got: Mapping[str, Any]) -> dict[str, Expect]:
    """Return what should come out, by NumPy's backpropagation and the reference."""
    from .cases.selections import same, select

    p = {name: np.asarray(x, dtype=float) for name, x in problem.parameters.items()}
    grads = per_sample(p, *problem.pool)
    samples = per_sample(p, *problem.target)
    mean = {name: np.mean(g, axis=0) for name, g in samples.items()}
    diagonal = np.concatenate([
        ref.preconditioning.adam(
            np.asarray(problem.exp_avg_sq[k], dtype=float), problem.step, lr=problem.lr, anticipate=g, damping=0.1
        ).reshape(-1)
        for k, g in mean.items()
    ])  # fmt: skip
    G, T = (np.concatenate([g.reshape(len(g), -1) for g in x.values()], axis=1) for x in (grads, samples))
    t = np.mean(T, axis=0)
    s = select(G, t, np.diag(diagonal), T, got=got, keep=problem.keep, **problem.options)
    alike = same(np.round(G, 12))
    size = np.linalg.norm(np.sqrt(diagonal) * G, axis=1) * np.linalg.norm(np.sqrt(diagonal) * t)
    condition = s["condition"] * 10  # of a forward and a backward pass
    out = {
        "scores": Expect(s["scores"], "summed", np.max(size), 1e3),
        "indices": Expect(alike[s["indices"]], "exact", got=alike[np.asarray(got["indices"])]),
        "weights": Expect(s["weights"], "solved", None, condition),
    }
    chosen = np.zeros(len(G))
    np.add.at(chosen, np.asarray(got["indices"]), np.asarray(got["weights"], dtype=float))
    for name, g in grads.items():
        scale = np.max(np.abs(g))
        value = np.tensordot(chosen, g, axes=1)
        out[name] = Expect(value, "summed", scale, 1e3, got=np.asarray(got["gradients"][name]))
    return out


def per_sample(p: Mapping[str, Array], x: Array, y: Array) -> dict[str, Array]:
    """Return each sample's gradient, by backpropagation through one sample at a time."""
    out: dict[str, list[Array]] = {name: [] for name in p}
    for tokens, labels in zip(x, y, strict=True):
        embedded = p["embedding"][tokens]  # (t, d)
        hidden = np.tanh(embedded @ p["weight"].T + p["bias"])  # (t, h)
        logits = hidden @ p["head"].T  # (t, v)
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        d_logits = (share - np.eye(logits.shape[1])[labels]) / len(tokens)
        d_hidden = (d_logits @ p["head"]) * (1 - hidden**2)
        d_embedding = np.zeros(p["embedding"].shape)
        np.add.at(d_embedding, tokens, d_hidden @ p["weight"])
        out["embedding"].append(d_embedding)
        out["weight"].append(d_hidden.T @ embedded)
        out["bias"].append(d_hidden.sum(axis=0))
        out["head"].append(d_logits.T @ hidden)
    return {name: np.stack(rows) for name, rows in out.items()}


def steps() -> dict[str, TrainingStep]:
    """Return the situations."""
    return {
        "default": make(0),
        "before the first step": make(1, step=0),
        "one token": make(2, t=1),
        "keep one": make(3, keep=1),
        "everything is kept": make(4, n=5, keep=5),
        "shortlist": make(5, n=16, shortlist=0.5),
        "duplicates": make(6, twins=True),
        "top_k, uniform": make(7, filter="top_k", weight="uniform"),
        "without the guard": make(8, guard=0.0),
        "float32": make(9, dtype="float32"),
    }


def make(
    seed: int, *, n: int = 10, m: int = 4, t: int = 6, step: int = 3, keep: int = 4, dtype: str = "float64",
    twins: bool = False, **options: Any,
) -> TrainingStep:  # fmt: skip
    """Return one situation."""
    rng = np.random.default_rng(700 + seed)
    v, d, h = 7, 4, 5
    shapes = {"embedding": (v, d), "weight": (h, d), "bias": (h,), "head": (v, h)}
    p = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    m1 = {name: (0.01 * rng.normal(size=x.shape) * (step > 0)).astype(dtype) for name, x in p.items()}
    m2 = {name: (1e-3 * rng.uniform(0.1, 1, size=x.shape) * (step > 0)).astype(dtype) for name, x in p.items()}
    pool, target = (tuple(rng.integers(0, v, size=(k, t)) for _ in range(2)) for k in (n, m))
    if twins:
        pool = tuple(np.concatenate([x[:6], x[:4]]) for x in pool)
    options = {"shortlist": None} | options
    return TrainingStep(p, m1, m2, step, 0.01, (pool[0], pool[1]), (target[0], target[1]), keep, options)


# ---------------------------------------------------------------------------------------------------------------------
# The two of this repository


def _torch(problem: TrainingStep, device: str) -> Mapping[str, Any]:
    import torch
    from ftw_torch import FilterThenWeight

    if device != "cpu" and not torch.cuda.is_available():
        raise UnavailableError(f"torch finds no device {device!r}")
    p = problem.parameters
    dtype = getattr(torch, str(p["head"].dtype))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(*p["embedding"].shape)
            self.inner = torch.nn.Linear(p["weight"].shape[1], p["weight"].shape[0])
            self.head = torch.nn.Linear(p["head"].shape[1], p["head"].shape[0], bias=False)

        def forward(self, x: Any) -> Any:
            return self.head(torch.tanh(self.inner(self.embedding(x))))

    model = Model().to(device=device, dtype=dtype)
    places = {"embedding": model.embedding.weight, "weight": model.inner.weight, "bias": model.inner.bias, "head": model.head.weight}  # fmt: skip  # noqa: E501
    optimizer = torch.optim.Adam(model.parameters(), lr=problem.lr)
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(torch.as_tensor(p[name]))
            if problem.step:
                optimizer.state[place] = {
                    "step": torch.tensor(float(problem.step)),
                    "exp_avg": torch.tensor(problem.exp_avg[name], device=device),
                    "exp_avg_sq": torch.tensor(problem.exp_avg_sq[name], device=device),
                }

    def loss(model: Any, batch: Any) -> Any:
        x, y = batch
        return torch.nn.functional.cross_entropy(model(x).transpose(1, 2), y, reduction="none").mean(1)

    pool, target = (tuple(torch.tensor(x, device=device) for x in batch) for batch in (problem.pool, problem.target))
    selector = FilterThenWeight(model, optimizer, loss, keep=problem.keep, **problem.options)
    s = selector.backward(pool, target)
    out = {name: getattr(s, name).cpu().numpy() for name in ("scores", "indices", "weights")}
    gradients = {}
    for name, place in places.items():
        assert place.grad is not None
        gradients[name] = place.grad.cpu().numpy()
    return {**out, "gradients": gradients}


_programs: dict[str, Any] = {}  # one compilation for situations of the same options and shapes


def _jax(problem: TrainingStep, device: str) -> Mapping[str, Any]:
    import ftw_jax

    jax: Any = importlib.import_module("jax")
    optax: Any = importlib.import_module("optax")

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_default_matmul_precision", "highest")
    try:
        place = jax.devices(device)[0]
    except RuntimeError as error:
        raise UnavailableError(f"jax finds no device {device!r}") from error

    def loss(p: Any, example: Any) -> Any:
        x, y = example
        logits = jax.numpy.tanh(p["embedding"][x] @ p["weight"].T + p["bias"]) @ p["head"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def put(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, place), tree)

    p = put(problem.parameters)
    tx = optax.adam(problem.lr)
    state = tx.init(p)
    moments = optax.ScaleByAdamState(jax.numpy.int32(problem.step), put(problem.exp_avg), put(problem.exp_avg_sq))
    state = put((moments, *state[1:]))
    key = repr((problem.keep, problem.lr, sorted(problem.options.items())))
    if key not in _programs:
        _programs[key] = jax.jit(ftw_jax.filter_then_weight(loss, tx, keep=problem.keep, **problem.options))
    grads, s = _programs[key](p, state, put(problem.pool), put(problem.target))
    out = {name: np.asarray(getattr(s, name)) for name in ("scores", "indices", "weights")}
    return {**out, "gradients": {name: np.asarray(g) for name, g in grads.items()}}


register_adapter("ftw_torch", _torch, matrix=torch_rows)
register_adapter("ftw_jax", _jax, compiles=True, matrix=jax_rows)
