"""``python -m ftw_conformance bench gpu``: both routes of a step on one GPU, at the sizes that people train.

Each step is measured by discovery (before) and with the learned plan (after), in turn, on the same model and data,
beside the plain step with fused AdamW: wall time between synchronisations, operations and kernels dispatched, and the
host's own milliseconds. The whole takes less than eight minutes; what the time does not suffice for is left out by
name. ``--tiny`` runs the same on a CPU, with models of a few thousand parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ftw.command_line import Parser, check_output

from .torch_calls import Calls
from .torch_step import measure, sizes, where

__all__ = ["main"]

SECONDS = 450.0


class Setting(NamedTuple):
    """A model and its batches."""

    model: str  # a key of ``torch_step.SIZES``
    tiny: str  # in its place on a CPU
    t: int
    n: int
    v: int
    k: int


SETTINGS = [
    Setting("100M", "tiny", 512, 32, 4, 8),
    Setting("1B", "tiny", 4096, 4, 1, 1),
    Setting("1B-lora", "tiny-lora", 4096, 4, 1, 1),
    Setting("minilm", "tiny-encoder", 24, 64, 16, 8),
]

ARMS = ["top_k", "default", "default_guard"]  # the guard off in the second


WARM = 4  # uses of a selector before the clock starts: audits come at powers of two


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m ftw_conformance bench gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a few thousand parameters, on the CPU")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no setting begins later than this")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    given = parser.parse_args(argv)
    if given.json:
        try:
            check_output(Path(given.json), "--json")
        except OSError as error:
            parser.error(str(error))
    if not given.tiny and not torch.cuda.is_available():
        print("no GPU here: --tiny runs on the CPU")
        return 2
    warnings.simplefilter("ignore")
    start, rows = time.perf_counter(), []
    for setting in SETTINGS:
        if time.perf_counter() - start > given.seconds:
            print(f"\n{setting.model}: left out, {given.seconds:.0f} seconds are over")
            continue
        rows += table(options_of(setting, given), 8 if given.tiny else setting.t)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)
    return 0


def options_of(setting: Setting, given: argparse.Namespace) -> argparse.Namespace:
    """Return the options of ``bench torch`` for a setting."""
    return argparse.Namespace(
        model=setting.tiny if given.tiny else setting.model,
        pool=setting.n,
        targets=setting.v,
        keep=setting.k,
        steps=",".join(f"{arm}{route}" for arm in ARMS for route in ("_discovered", "")),
        rounds=given.rounds,
        device="cpu" if given.tiny else "cuda",
        dtype="float32" if given.tiny or setting.model == "minilm" else "bf16",
    )


def table(options: argparse.Namespace, t: int) -> list[dict[str, Any]]:
    """Measure, print and return the rows of one setting."""
    n, v, k, s = sizes(options, t)
    begin = time.perf_counter()
    ratios, calls = measure(options, t, warm=WARM)
    floor = 1 + v / n + k / (3 * n)
    gram = floor + (s + s * s / t) / (3 * n)
    print(
        f"\n{options.model}, T={t} N={n} V={v} k={k} shortlist={s}, {options.dtype}, {where(options)}: a plain step "
        f"takes {1e3 * ratios['seconds']:.3g} ms; floor of top-k {floor:.2f}, of the default {gram:.2f} "
        f"({time.perf_counter() - begin:.0f} s)"
    )
    print(f"{'time / plain':16} {'before':>7} {'after':>7}    {'ops':>13} {'kernels':>13} {'host ms':>15}")
    plain = calls["plain_pool"]
    print(f"{'plain step':16} {1:7.2f} {1:7.2f}    {plain.ops:13} {plain.kernels:13} {plain.host_ms:15.1f}")
    rows = [row(options, t, "plain_pool", ratios, calls)]
    for arm in ARMS:
        before, after = f"{arm}_discovered", arm
        pairs = [both(calls.get(before), calls.get(after), field) for field in Calls._fields]
        print(f"{arm:16} {ratios[before]:7.2f} {ratios[after]:7.2f}    {pairs[0]:>13} {pairs[1]:>13} {pairs[2]:>15}")
        rows += [row(options, t, name, ratios, calls) for name in (before, after)]
    return rows


def both(before: Calls | None, after: Calls | None, field: str) -> str:
    """Format a figure of the two routes; a dash where the memory did not suffice."""
    found = [
        "-" if x is None else format(getattr(x, field), ".1f" if field == "host_ms" else "d") for x in (before, after)
    ]
    return " > ".join(found)


def row(
    options: argparse.Namespace, t: int, name: str, ratios: dict[str, float], calls: dict[str, Calls]
) -> dict[str, Any]:
    """Return the figures of one step."""
    made = {"model": options.model, "t": t, "n": options.pool, "dtype": options.dtype, "step": name}
    return made | {"time": ratios[name], "calls": calls[name]._asdict() if name in calls else None}


if __name__ == "__main__":
    sys.exit(main())
