"""Cost of a selection in JAX beside a plain step on the whole pool: ``python -m ftw_conformance bench jax``.

A small GPT, AdamW; N candidates of T tokens, V = N/8 targets, k = N/4 kept, n = N/2 on the shortlist. The unit is the
gradient of the pool's mean loss, 3FN for F FLOPs in a forward pass of one sample. What cannot be avoided is one pass,

    1 + V/N + k/(3N)    forward and backward to activations for pool and targets, g_T, scores, the update from factors,

and n/(3N) more for a Gram matrix of the shortlist's gradients. Written out, they need no forming again: 1 + V/N for
both. The guard's target norms are V/(3N) more; XLA counts the branch in which its gate is open, about 1/3 more.

FLOPs are XLA's own count of the compiled program, memory its own account of arguments, results and temporaries. Time is
CPU time of one thread: the arms taken in turn, and the median of their rounds divided by the plain step's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from ftw.command_line import Parser, print_table

__all__ = ["main"]

WIDTH, HEADS, LAYERS, VOCABULARY = 256, 4, 4, 4096


def model(length: int, quick: bool) -> tuple[Callable[[Any, Any], Any], Any]:
    """Return the loss of one example (length + 1,) of token numbers, and the parameters."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    width, vocabulary = (64, 512) if quick else (WIDTH, VOCABULARY)
    layers = 2 if quick else LAYERS
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape) * shape[0] ** -0.5, jnp.float32)

    block = {
        "norm1": (width,), "qkv": (width, 3 * width), "out": (width, width),
        "norm2": (width,), "up": (width, 4 * width), "down": (4 * width, width),
    }  # fmt: skip
    params: Any = {
        "tokens": draw(vocabulary, width),
        "positions": draw(length, width),
        "layers": [{k: jnp.ones(s) if len(s) == 1 else draw(*s) for k, s in block.items()} for _ in range(layers)],
        "norm": jnp.ones(width),
        "head": draw(width, vocabulary),
    }

    def norm(x: Any, scale: Any) -> Any:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def loss(p: Any, tokens: Any) -> Any:
        x = p["tokens"][tokens[:-1]] + p["positions"]  # (t, width)
        mask = jnp.tril(jnp.ones((length, length), bool))
        for layer in p["layers"]:
            q, k, v = jnp.split(norm(x, layer["norm1"]) @ layer["qkv"], 3, axis=-1)
            q, k, v = (jnp.reshape(z, (length, HEADS, -1)) for z in (q, k, v))
            scores = jnp.einsum("shd,thd->hst", q, k) * q.shape[-1] ** -0.5
            weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))  # (heads, t, t)
            x = x + jnp.reshape(jnp.einsum("hst,thd->shd", weights, v), x.shape) @ layer["out"]
            x = x + jax.nn.gelu(norm(x, layer["norm2"]) @ layer["up"]) @ layer["down"]
        logits = jax.nn.log_softmax(norm(x, p["norm"]) @ p["head"])  # (t, vocabulary)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[1:, None], axis=1))

    return loss, params


def arms(loss: Any, tx: Any, n: int) -> dict[str, tuple[Any, float]]:
    """Return ``{name: (function of (params, state, pool, target), floor)}``."""
    import ftw_jax
    import jax
    import jax.numpy as jnp

    keep, targets, short = n // 4, n // 8, n // 2
    once, gram, guard = 1 + targets / n, short / (3 * n), targets / (3 * n)

    def plain(count: int) -> Any:
        def mean(params: Any, batch: Any) -> Any:
            return jnp.mean(jax.vmap(loss, in_axes=(None, 0))(params, batch[:count]))

        return lambda params, state, pool, target: jax.value_and_grad(mean)(params, pool)

    found: dict[str, tuple[Any, float]] = {
        "plain pool step": (plain(n), 1.0),
        "plain step on k": (plain(keep), 0.25),
    }
    for capture in ("factors", "dense"):
        update = keep / (3 * n) if capture == "factors" else 0.0
        form = 1 if capture == "factors" else 0
        cases: tuple[tuple[str, float, dict[str, Any]], ...] = (
            ("top-k", once + update, {"filter": "top_k", "weight": "uniform", "guard": 0.0}),
            ("filter-then-weight", once + update + form * gram, {"guard": 0.0}),
            ("the same, guarded", once + update + form * (gram + guard), {}),
        )
        for name, floor, options in cases:
            select = ftw_jax.filter_then_weight(loss, tx, keep=keep, capture=capture, **options)
            found[f"{name}, {capture}"] = (select, floor)
    return found


def measure(length: int, n: int, rounds: int, quick: bool) -> list[list[str]]:
    """Return the rows of one table."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    loss, params = model(length, quick)
    tx = optax.adamw(1e-3)
    rng = np.random.default_rng(1)
    batch = jnp.asarray(rng.integers(0, params["tokens"].shape[0], (n + n // 8, length + 1)))
    state = tx.update(jax.tree.map(lambda p: 0.01 * p, params), tx.init(params), params)[1]
    arguments = (params, state, batch[:n], batch[n:])
    compiled, facts = {}, {}
    wait: Any = jax.block_until_ready
    for name, (function, floor) in arms(loss, tx, n).items():
        lowered = jax.jit(function).lower(*arguments)
        began = time.process_time()
        program = lowered.compile()
        seconds = time.process_time() - began
        cost: Any = program.cost_analysis()
        memory: Any = program.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        wait(program(*arguments))
        compiled[name], facts[name] = program, (floor, cost["flops"], total, seconds)
    spent: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(rounds):
        for name, program in compiled.items():
            began = time.process_time()
            wait(program(*arguments))
            spent[name].append(time.process_time() - began)
    times = {name: statistics.median(values) for name, values in spent.items()}
    _, unit_flops, unit_bytes, _ = facts["plain pool step"]
    unit = times["plain pool step"]
    rows = []
    for name, (floor, flops, total, seconds) in facts.items():
        ratio, clock = flops / unit_flops, times[name] / unit
        rows.append(
            [
                *(name, f"{floor:.2f}", f"{ratio:.2f}", f"{ratio / floor:.2f}", f"{clock:.2f}", f"{clock / floor:.2f}"),
                *(f"{total / unit_bytes:.2f}", f"{total / 2**20:.0f}", f"{seconds:.1f}"),
            ]
        )
    return rows


def updates() -> list[list[str]]:
    """Return how far the predicted change is from the optimizer's own, for gradients near the one it was read at."""
    import ftw_jax
    import jax
    import numpy as np
    import optax
    from optax import contrib

    rng = np.random.default_rng(0)
    shapes = {"tall": (48, 24), "wide": (24, 48), "bias": (48,)}

    def draw() -> Any:
        return {name: 0.1 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}

    def errors(tx: Any) -> list[float]:
        params, update, out = draw(), jax.jit(tx.update), []
        state = tx.init(params)
        for _ in range(20):
            state = update(draw(), state, params)[1]
        a = draw()
        read = jax.jit(lambda state, a: ftw_jax.linear_updates(tx, params, state, anticipate=a))(state, a)
        for noise in noises:
            g = jax.tree.map(lambda x, y, noise=noise: jax.numpy.asarray(x + noise * y), a, draw())
            true = update(g, state, params)[0]
            pairs = [(read[f"['{k}']"], g[k], np.asarray(true[k])) for k in shapes]
            missed = sum(np.sum((-(u.offset + u.operator.apply(x)) - y) ** 2) for u, x, y in pairs)
            out.append(float(np.sqrt(missed / sum(np.sum(y**2) for *_, y in pairs))))
        return out

    noises = (0.0, 0.1, 0.5, 1.0)
    optimizers = {
        "sgd, momentum": optax.sgd(1e-2, momentum=0.9),
        "adamw": optax.adamw(1e-3),
        "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=8),
        "muon": contrib.muon(1e-2),
    }
    rows = [["", *(f"{noise:.0%} off" for noise in noises)]]
    return rows + [[name, *(f"{e:.1e}" for e in errors(tx))] for name, tx in optimizers.items()]


def main(argv: list[str] | None = None) -> int:
    """Print the tables; see the module's docstring."""
    parser = Parser(
        prog="python -m ftw_conformance bench jax",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", nargs=2, type=int, action="append", metavar=("T", "N"), help="tokens and candidates")
    parser.add_argument("--rounds", type=int, default=7, help="timings of each arm (default: 7)")
    parser.add_argument("--quick", action="store_true", help="a smaller model: do the commands run at all?")
    parser.add_argument("--updates", action="store_true", help="instead: predicted changes against the optimizers' own")
    options = parser.parse_args(argv)
    if "jax" not in sys.modules:
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    heads = ["", "floor", "FLOPs", "/floor", "time", "/floor", "memory", "MiB", "compile s"]
    if options.updates:
        print("error of the predicted change, relative, at gradients so far from the one it was read at\n")
        print_table(updates())
        return 0
    for length, n in options.shape or [(128, 32), (512, 16)]:
        print(f"\nT={length} N={n} V={n // 8} k={n // 4} n={n // 2}, ratios to the plain pool step\n")
        print_table([heads, *measure(length, n, options.rounds, options.quick)])
    return 0


if __name__ == "__main__":
    sys.exit(main())
