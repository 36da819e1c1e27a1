"""``python -m ftw_conformance verify``: run the table of cases on every backend and print what came of it."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from typing import Any

from ftw.command_line import Parser

from . import adapters, backends
from .backends import Backend, UnavailableError
from .printing import print_groups, print_table, summary
from .runner import FAIL, SKIP, Result, run
from .table import Case, Refusal

__all__ = ["main", "verify"]

DTYPES = ("float64", "float32", "bfloat16", "float16")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if nothing failed, 1 if something did, 2 if nothing was run."""
    options = _parser().parse_args(argv)
    for module in options.plugin:
        sys.path.insert(0, os.getcwd())
        importlib.import_module(module)
    every = [*backends.names(), *adapters.names()]
    if options.list:
        print("\n".join(every))
        return 0
    wanted = options.backend or every
    start = time.perf_counter()
    results, absent = _gather(wanted, options)
    seconds = time.perf_counter() - start
    if options.json:
        report = {"results": [r._asdict() for r in results], "absent": absent, "seconds": seconds}
        print(json.dumps(report, indent=None if options.worker else 1))
    else:
        if options.groups:
            print_groups(results, wanted)
        else:
            print_table(results, wide=options.verbose)
        print(summary(results, wanted, absent, seconds))
    if any(r.verdict == FAIL for r in results):
        return 1
    return 0 if results else 2


def verify(
    backend: Backend,
    dtypes: tuple[str, ...] = DTYPES,
    *,
    only: str = "*",
    full: bool = False,
    gaps: Any = None,
    seen: Callable[[Result], None] | None = None,
    fail_fast: bool = False,
) -> list[Result]:
    """Run the table on one backend.

    Parameters
    ----------
    backend : Backend
    dtypes : tuple of str
        Those that the backend has are used.
    only : str
        Pattern of case names, as in a shell.
    full : bool
        Whether heavy cases are run on a backend that compiles.
    gaps : list of Gap, optional
        In place of the built-in list.
    seen : callable, optional
        Called with each result as it comes.
    fail_fast : bool
        Whether to stop at the first failure.
    """
    out = []
    for case, dtype in _rows(backend, dtypes, only):
        if not full and _takes_long(backend, case, dtype):
            result = Result(case.name, backend.name, dtype, SKIP)
        else:
            result = run(case, backend, dtype, gaps)
        if seen is not None:
            seen(result)
        out.append(result)
        if fail_fast and result.verdict == FAIL:
            break
    return out


def _takes_long(backend: Backend, case: Case | Refusal, dtype: str) -> bool:
    """Return whether a case is left to ``--full``."""
    if not any(fnmatchcase(case.name, pattern) for pattern in backend.quick):
        return True
    if not backend.compiles or isinstance(case, Refusal):
        return False
    return case.heavy or (dtype != "float64" and not case.narrow) or dtype == "float16"  # widened like bfloat16


def _rows(backend: Backend, dtypes: tuple[str, ...], only: str) -> Iterator[tuple[Case | Refusal, str]]:
    from .cases import every_case

    for case in every_case():
        if not fnmatchcase(case.name, only):
            continue
        if backend.traces and case.eager:
            continue
        if isinstance(case, Refusal):
            if "float64" in dtypes or not set(dtypes) & set(backend.dtypes):
                yield case, "float64"
            continue
        for dtype in dtypes:
            if dtype in case.dtypes and dtype in backend.dtypes:
                yield case, dtype


def _gather(wanted: list[str], options: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """Return all results, and why some backends are absent; with several jobs, a process for each backend."""
    if options.jobs > 1 and len(wanted) > 1:
        return _in_parallel(wanted, options)
    results: list[Result] = []
    absent: dict[str, str] = {}
    for name in wanted:
        shown = _Progress(name, quiet=options.worker or options.json or not sys.stderr.isatty())
        try:
            if name in adapters.names():
                found = adapters.verify(name, options.device, only=options.only or "*", seen=shown, full=options.full)
            else:
                backend = backends.load(name, options.device)
                dtypes = tuple(options.dtype or DTYPES)
                missing = [d for d in dtypes if d not in backend.dtypes]
                if len(missing) == len(dtypes):
                    raise UnavailableError(f"has no dtype {', '.join(missing)}")
                found = verify(
                    backend,
                    dtypes,
                    only=options.only or "*",
                    full=options.full,
                    seen=shown,
                    fail_fast=options.fail_fast,
                )
        except UnavailableError as error:
            absent[name] = str(error)
            continue
        finally:
            shown.close()
        results += found
    return results, absent


def _in_parallel(wanted: list[str], options: argparse.Namespace) -> tuple[list[Result], dict[str, str]]:
    """Run each backend in a process of its own, a few at a time; the slow ones start first."""
    command = [sys.executable, "-m", "ftw_conformance", "verify", "--json", "--worker", "--jobs", "1"]
    command += ["--device", options.device, "--only", options.only or "*"]
    command += [word for d in options.dtype or () for word in ("--dtype", d)]
    command += [word for m in options.plugin for word in ("--plugin", m)] + (["--full"] if options.full else [])
    command += ["--fail-fast"] if options.fail_fast else []
    slow = {"jit": 0, "jax": 1, "ftw_jax": 2}
    queue = sorted(wanted, key=lambda name: slow.get(name, 9))

    def report(name: str) -> Any:
        done = subprocess.run([*command, "--backend", name], stdout=subprocess.PIPE, text=True, check=False)
        if not done.stdout.strip():
            raise RuntimeError(f"the process of backend {name!r} ended with code {done.returncode} and no report")
        return json.loads(done.stdout)

    with ThreadPoolExecutor(options.jobs) as pool:
        found = dict(zip(queue, pool.map(report, queue), strict=True))
    results = [Result(**row) for name in wanted for row in found[name]["results"]]
    return results, {k: v for name in wanted for k, v in found[name]["absent"].items()}


class _Progress:
    """A line that counts."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self.name, self.quiet, self.count, self.failed = name, quiet, 0, 0

    def __call__(self, result: Result) -> None:
        self.count += 1
        self.failed += result.verdict == FAIL
        if not self.quiet:
            print(f"\r{self.name}: {self.count} cases, {self.failed} failed   ", end="", file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self.quiet:
            print(end="\r" + " " * 60 + "\r", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m ftw_conformance verify", description=__doc__)
    p.add_argument("--backend", action="append", metavar="NAME", help="one of --list; may be given several times")
    p.add_argument("--device", default="cpu", help="cpu, or cuda for torch and jax")
    p.add_argument("--dtype", action="append", choices=DTYPES, help="may be given several times; all by default")
    p.add_argument("--only", metavar="PATTERN", help="case names, as in a shell: 'qp/*'")
    p.add_argument("--full", action="store_true", help="also the heavy cases on backends that compile")
    p.add_argument("--fail-fast", action="store_true", help="stop a backend at its first failure")
    p.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="import this module first: it registers"
    )
    p.add_argument("--jobs", type=int, default=2, help="backends at a time, each in a process (default 2)")
    p.add_argument("--json", action="store_true", help="print a report for programs")
    p.add_argument("--verbose", action="store_true", help="a row for each case")
    p.add_argument("--groups", action="store_true", help="a Markdown table of groups and backends")
    p.add_argument("--list", action="store_true", help="print the names of backends and adapters")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return p
