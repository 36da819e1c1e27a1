"""The commands: ``python -m ftw_conformance verify | golden | mutate | bench | efficacy | real-data``."""

from __future__ import annotations

import importlib
import sys
from typing import NamedTuple

from ftw.command_line import INTERRUPTED, nearest, require


class Command(NamedTuple):
    """Where a command is, what it does, and what it needs beyond NumPy."""

    module: str
    words: str
    packages: tuple[str, ...] = ()
    extra: str = ""


COMMANDS = {
    "verify": Command("verify", "run the table of cases on every backend"),
    "golden": Command("golden", "write or check the golden vectors"),
    "mutate": Command("mutate", "plant errors in a copy of the core and see whether verify notices"),
    "bench qp": Command("bench.qp", "time the QP solvers beside their peers", ("daqp",), "bench"),
    "bench torch": Command(
        "bench.torch_step", "time and memory of the PyTorch adapter beside plain steps", ("torch",), "torch"
    ),
    "bench gpu": Command("bench.torch_gpu", "both routes of the PyTorch adapter, on one GPU", ("torch",), "torch"),
    "bench forward": Command("bench.forward", "how well forward passes rank candidates, by dtype", ("torch",), "torch"),
    "bench jax": Command("bench.jax_step", "time and memory of the JAX adapter", ("jax", "optax"), "jax"),
    "efficacy": Command("efficacy", "methods of selection side by side, on paired seeds"),
    "real-data": Command("efficacy.real_data", "fetch and encode the sentences of efficacy --task sentiment"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return run(name, argv[words:])
    typed = " ".join(word for word in argv[:2] if not word.startswith("-"))
    families = {name.split()[0] for name in COMMANDS}
    if typed and typed not in families:
        near = nearest(typed, COMMANDS) or nearest(argv[0], families)
        hint = f"; did you mean {near}?" if near else ""
        print(f"error: no command {typed!r}{hint}\n", file=sys.stderr)
    print("usage: python -m ftw_conformance COMMAND [--help]\n")
    family = [name for name in COMMANDS if argv and name.startswith(f"{argv[0]} ")]
    for name in family or COMMANDS:
        print(f"  {name:13}  {COMMANDS[name].words}")
    return 0 if argv[bool(family) :] in (["-h"], ["--help"]) else 2


def run(name: str, argv: list[str]) -> int:
    """Run a command, once what it needs is installed."""
    command = COMMANDS[name]
    try:
        require(f"python -m ftw_conformance {name}", *command.packages, extra=command.extra)
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    module = importlib.import_module(f".{command.module}", __package__)
    try:
        code: int = module.main(argv)
    except KeyboardInterrupt:
        print("\nInterrupted: what was measured is printed above.", file=sys.stderr)
        return INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
