"""The matrix as cases of an adapter: a name, a dtype, and a call for what to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from ftw_conformance.verify.table import Expect

__all__ = ["Row", "jax_rows", "torch_rows"]


class Row(NamedTuple):
    """One case; ``call`` raises where there is nothing to compare."""

    case: str
    dtype: str
    call: Callable[[], Mapping[str, Expect]]


def torch_rows(device: str, *, full: bool) -> Iterator[Row]:
    """Yield the rows of ftw_torch: layers, optimizers, and the rules that no row ran."""
    from ftw_torch.capture import registry

    from . import layers, optimizers, rows, steps

    ran: set[Any] = set()
    judged: set[str] = set()

    def run(name: str, layer: Any, use: str, mode: str) -> Mapping[str, Expect]:
        with registry.recorded() as applied:
            out = steps.run(layer, use, mode, device)
        if out.slow and (mode != "packed" or layer.packed):
            raise AssertionError(f"no rule took {out.slow}")
        ran.update(applied, [] if out.slow else [layer.function])
        judged.add(name)
        return out.expected

    for case, one, use, mode in rows.rows(full=full):
        narrow = mode == "autocast" or one.narrow
        yield Row(case, "float32" if narrow else "float64", partial(run, case.split("/")[2], one, use, mode))

    def every_rule() -> Mapping[str, Expect]:
        for name, one in layers.every_layer().items():
            if name not in judged:  # it was not asked for
                run(name, one, "one use", "eager")
        missing = [getattr(f, "__qualname__", repr(f)) for f in registry.every_rule() if f not in ran]
        if missing:
            raise AssertionError(f"no row runs the rule of {', '.join(sorted(missing))}")
        return {"rules": Expect(True, "exact", got=True)}

    yield Row("matrix/every rule has a row", "float64", every_rule)
    for name, kind, options in optimizers.optimizers():
        dtype = optimizers.dtype_of(name, options)
        yield Row(f"matrix/optimizer/{name}", dtype, partial(optimizers.step, kind, options, device))


def jax_rows(device: str, *, full: bool) -> Iterator[Row]:
    """Yield the rows of ftw_jax: optimizers, all of them either way."""
    from . import optax_updates

    del full
    for name, make, options in optax_updates.updates():
        yield Row(f"matrix/optax/{name}", "float64", partial(optax_updates.step, make, options, device))
