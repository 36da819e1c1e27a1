"""The commands: ``python -m ftw_conformance verify | golden | mutate | bench | efficacy | real-data``."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "verify": ("verify", "run the table of cases on every backend"),
    "golden": ("golden", "write or check the golden vectors"),
    "mutate": ("mutate", "plant errors in a copy of the core and see whether verify notices"),
    "bench qp": ("bench.qp", "time the QP solvers beside their peers"),
    "bench torch": ("bench.torch_step", "time and memory of the PyTorch adapter beside plain steps"),
    "bench forward": ("bench.forward", "how well forward passes rank candidates, by dtype"),
    "bench jax": ("bench.jax_step", "time and memory of the JAX adapter"),
    "efficacy": ("efficacy", "methods of selection side by side, on paired seeds"),
    "real-data": ("efficacy.real_data", "fetch and encode the sentences of efficacy --task sentiment"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            module = importlib.import_module(f".{COMMANDS[name][0]}", __package__)
            code: int = module.main(argv[words:])
            return code
    print("usage: python -m ftw_conformance COMMAND [--help]\n")
    family = [name for name in COMMANDS if argv and name.startswith(f"{argv[0]} ")]
    for name in family or COMMANDS:
        print(f"  {name:12} {COMMANDS[name][1]}")
    return 0 if argv[bool(family) :] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
