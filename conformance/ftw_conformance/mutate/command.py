"""``python -m ftw_conformance mutate``: plant errors in copies of the core, and see whether verify notices."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ftw
from ftw.command_line import Parser
from ftw_conformance.verify.runner import FAIL

from .generated import sampled
from .mutations import MUTATIONS, Mutation

__all__ = ["Outcome", "main", "plant", "try_one"]


NEAR = {  # the cases closest to a file
    "qp/": "qp/*",
    "constraints": "project/*",
    "guard": "guard/*",
    "filters": "filters/*",
    "_named_filters": "filters/*",
    "optimizers/": "optimizers/*",
    "sketch": "sketch/*",
    "planner": "plan/*",
    "weighing": "selection/*",
    "choice": "selection/*",
    "selection": "selection/*",
}


class Outcome(NamedTuple):
    """What became of one error: ``caught`` by the named case, ``survived``, or ``stale``."""

    mutation: Mutation
    verdict: str
    by: str
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if every error was caught."""
    parser = Parser(prog="python -m ftw_conformance mutate", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="errors whose file or description contains this")
    parser.add_argument("--first", type=int, metavar="N", help="only so many, evenly spread")
    parser.add_argument(
        "--backend", action="append", metavar="NAME", help="verify on these in turn until one notices; numpy by default"
    )
    parser.add_argument("--generate", type=int, metavar="N", help="in their place N errors made from the source")
    parser.add_argument("--seed", type=int, default=17, help="with --generate: which (default 17)")
    parser.add_argument("--dtype", metavar="NAME", help="verify in this dtype alone")
    parser.add_argument("--jobs", type=int, default=2, help="errors at a time (default 2)")
    options = parser.parse_args(argv)
    listed = MUTATIONS if options.generate is None else sampled(options.generate, options.seed)
    chosen = [m for m in listed if options.only in f"{m.file} {m.what}"]
    if options.first and options.first < len(chosen):
        chosen = [chosen[i * len(chosen) // options.first] for i in range(options.first)]
    start = time.perf_counter()
    names = tuple(options.backend or ("numpy",))
    more = ("--dtype", options.dtype) if options.dtype else ()
    untouched = try_one(Mutation("status.py", "OK = 0", "OK = 0", "nothing"), names, more)
    if untouched.verdict != "survived":
        print(f"the core as it is does not pass ({untouched.by}): nothing can be told from errors planted in it")
        return 1
    with ThreadPoolExecutor(options.jobs) as pool:
        outcomes = []
        for outcome in pool.map(lambda m: try_one(m, names, more), chosen):
            outcomes.append(outcome)
            m = outcome.mutation
            print(f"{outcome.verdict:9} {m.file:26} {m.what:52} {outcome.by}", flush=True)
    caught = sum(o.verdict == "caught" for o in outcomes)
    print(f"\n{caught} of {len(outcomes)} caught ({time.perf_counter() - start:.0f} s)")
    return 0 if outcomes and caught == len(outcomes) else 1


def plant(mutation: Mutation, folder: Path) -> bool:
    """Copy the core to ``folder`` with the error in it; return False unless its text occurs once."""
    source = Path(ftw.__file__).parent
    shutil.copytree(source, folder / "ftw", ignore=shutil.ignore_patterns("__pycache__"))
    path = folder / "ftw" / mutation.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(mutation.old) != 1:
        return False
    path.write_text(text.replace(mutation.old, mutation.new, 1), encoding="utf-8")
    return True


def try_one(mutation: Mutation, backends: tuple[str, ...] = ("numpy",), options: tuple[str, ...] = ()) -> Outcome:
    """Plant one error and verify on one backend after the other; the working tree is not touched.

    Cases of the file's own part of the table come first, since one of them notices most errors.
    """
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ftw-mutant-") as name:
        if not plant(mutation, Path(name)):
            return Outcome(mutation, "stale", "its text is not in the file, or not only once", 0.0)
        paths = os.pathsep.join(filter(None, (name, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
        for backend in backends:
            near = next((part for start, part in NEAR.items() if mutation.file.startswith(start)), None)
            by = _noticed(backend, environment, name, (*options, "--only", near)) if near else ""
            by = by or _noticed(backend, environment, name, options)
            if by:
                return Outcome(mutation, "caught", by, time.perf_counter() - start)
    return Outcome(mutation, "survived", "", time.perf_counter() - start)


def _noticed(backend: str, environment: dict[str, str], folder: str, options: tuple[str, ...] = ()) -> str:
    """Verify in a process of its own; return the case that failed, or how else the process ended badly."""
    command = [sys.executable, "-m", "ftw_conformance", "verify", "--backend", backend, "--json", "--fail-fast"]
    command += options
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=folder)
    except subprocess.TimeoutExpired:
        return "it did not end"
    if not done.returncode or done.returncode == 2:  # nothing failed, or nothing was run
        return ""
    failed = [r for r in json.loads(done.stdout)["results"] if r["verdict"] == FAIL] if done.stdout.strip() else []
    if failed:
        return f"{failed[0]['case']} ({backend}, {failed[0]['dtype']})"
    lines = done.stderr.strip().splitlines() or [""]
    return f"verify ended with {lines[-1][:80]}"
