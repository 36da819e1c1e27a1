"""``python -m ftw_conformance efficacy``: methods of selection side by side, on paired seeds.

Each task is trained on a stream of pools of which every method keeps a few samples a step; pools, targets and the model
at the start are the same for all methods, seed by seed. What counts is the loss on a test set. Tasks: digits (needs
scikit-learn), text (from Python's own library, needs torch), languages (Debian's manual pages), sentiment (real
sentences and a pretrained encoder, `make real-data`; at equal compute), or your own files with ``--pool`` and
``--target``. Finished runs are kept in a file and not done again.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ftw.command_line import INTERRUPTED, Parser, check_output, print_table, replay
from ftw.demo.text_files import TextError

from . import page, real_data, table
from .ablations import ABLATIONS, METHODS
from .baselines import BASELINES, LESS, METHOD, ORACLE, RANDOM, WHOLE
from .rates import GRID, TUNING
from .real_data import DOMAINS
from .rivals import BUDGETED
from .runs import Job, key, read, run_all
from .scenarios import SCENARIOS, Scenario, files
from .statistics import Cell, summarise
from .tasks_text import has_languages
from .tuning import tune

__all__ = ["main"]

ABLATED = ("digits-40", "weak-40", "text-24")
QUICK = {"digits-10": 40, "digits-40": 40, "text-24": 20}  # scenarios and steps
QUICK_METHODS = (RANDOM, WHOLE, LESS, ORACLE, METHOD)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog="python -m ftw_conformance efficacy", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--task", nargs="+", default=["*"], metavar="NAME", help=f"of {', '.join(SCENARIOS)}; * is a wildcard")
    add("--methods", nargs="+", metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--domain", choices=list(DOMAINS), default="films", help="of sentiment: what to get better at (default: films)")
    add("--tune", action="store_true", help="learning rates of the tasks that have a budget, on seeds of their own")
    add("--ablations", action="store_true", help="the default method with one part exchanged, instead of the baselines")
    add("--everything", action="store_true", help="both")
    add("--seeds", type=int, metavar="N", help="paired seeds (default: 8; 24 with noisy pixels, 16 for sentiment)")
    add("--first-seed", type=int, default=0, metavar="N", help="the first of the seeds (default: 0)")
    add("--steps", type=int, metavar="N", help="steps of a run (default: the task's own)")
    add("--quick", action="store_true", help="few scenarios and methods, 2 seeds, short runs: does it run at all?")
    add("--pool", nargs="+", metavar="PATH", help="your text files and folders: what to pick from")
    add("--target", nargs="+", metavar="PATH", help="your text files and folders: what to get better at")
    add("--jobs", type=int, default=2, metavar="N", help="processes (default: 2)")
    add("--runs", type=Path, default=Path("efficacy.jsonl"), metavar="FILE", help="finished runs, kept and read")
    add("--finished", action="store_true", help="run nothing: tables of the runs that are in the file")
    add("--json", type=Path, metavar="FILE", help="the figures")
    add("--page", type=Path, metavar="FILE", help="a page with curves")
    add("--markdown", type=Path, metavar="FILE", help="the tables in Markdown")
    options = parser.parse_args(given)
    if bool(options.pool) != bool(options.target):
        parser.error("--pool and --target go together: what to pick from, and what to get better at")
    for name in ("seeds", "steps", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    unknown = [name for name in options.methods or () if name not in METHODS]
    if unknown:
        parser.error(f"--methods: {', '.join(unknown)}: choose from {', '.join(METHODS)}")
    written = {"--json": options.json, "--page": options.page, "--markdown": options.markdown}
    try:
        for option, path in {"--runs": options.runs, **written}.items():
            if path is not None and not (option == "--runs" and options.finished):
                check_output(path, option)
    except OSError as error:
        parser.error(str(error))
    return options


def plan(options: argparse.Namespace) -> tuple[list[Job], list[Job], dict[str, Scenario]]:
    """Return the runs of the methods and of the ablations, and the scenarios."""
    if options.pool:
        scenarios = {"files": files(options.pool, options.target)}
    else:
        names = [
            name
            for name, scenario in SCENARIOS.items()
            if any(fnmatch.fnmatchcase(name, p) or scenario.task == p for p in options.task)
        ]
        if not names:
            raise SystemExit(f"--task: nothing of that name; choose from {', '.join(SCENARIOS)}")
        scenarios = {name: _of(SCENARIOS[name], options.domain) for name in names}
        for task in dict.fromkeys(s.task for s in scenarios.values()):
            if reason := lacking(task):
                print(f"{task}: left out, {reason}")
                scenarios = {name: s for name, s in scenarios.items() if s.task != task}
    if options.quick and not options.pool:
        scenarios = {name: s for name, s in scenarios.items() if name in QUICK} or scenarios

    def jobs(methods: Sequence[str] | None, names: Sequence[str]) -> list[Job]:
        return [
            Job(name, scenarios[name], method, seed, options.steps or (QUICK.get(name, 20) if options.quick else None))
            for name in names
            for seed in _seeds(options, scenarios[name])
            for method in methods or default_methods(options, scenarios[name])
            if scenarios[name].labelled or method != ORACLE
        ]

    side_by_side = [] if options.ablations and not options.everything else jobs(options.methods, list(scenarios))
    chosen = [name for name in scenarios if name in ABLATED or options.pool]
    exchanged = jobs([METHOD, *ABLATIONS], chosen) if options.ablations or options.everything else []
    return side_by_side, exchanged, scenarios


def default_methods(options: argparse.Namespace, scenario: Scenario) -> Sequence[str]:
    """Return the methods that are compared unless some are named."""
    if options.quick:
        return QUICK_METHODS
    return BUDGETED if scenario.budget else list(BASELINES)


def _of(scenario: Scenario, domain: str) -> Scenario:
    if scenario.task != "sentiment":
        return scenario
    words = f"{scenario.words} ({domain})"
    return scenario._replace(options={**scenario.options, "domain": domain}, words=words)


def _seeds(options: argparse.Namespace, scenario: Scenario) -> range:
    count = options.seeds or (2 if options.quick else scenario.seeds)
    return range(options.first_seed, options.first_seed + count)


def lacking(task: str) -> str:
    """Return what a task needs and does not find, or nothing."""
    if task == "sentiment":
        return "" if real_data.available() else "its sentences are not there: `make real-data` fetches them"
    package = {"digits": "sklearn"}.get(task, "torch")
    if importlib.util.find_spec(package) is None:
        return f"{'scikit-learn' if package == 'sklearn' else package} is not installed"
    if task == "languages" and not has_languages():
        return "Debian's manual pages in German, French and Spanish (manpages-de, -fr, -es) are not installed"
    return ""


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, print the tables, write the files."""
    options = arguments(argv)
    if importlib.util.find_spec("scipy") is None:
        print('error: the statistics need scipy: pip install -e ".[torch,reference]"', file=sys.stderr)
        return 1
    began = time.perf_counter()
    config = replay("python -m ftw_conformance efficacy", argv, options)
    try:
        side_by_side, exchanged, scenarios = plan(options)
        if options.tune:
            budgeted = {name: s for name, s in scenarios.items() if s.budget}
            chosen = options.methods or BUDGETED
            with progress(len(budgeted) * len(chosen) * len(GRID) * len(TUNING)) as bar:
                print(json.dumps(tune(budgeted, chosen, options.runs, options.jobs, bar.update, config), indent=4))
            return 0
        if options.finished:
            done = read(options.runs)
            side_by_side, exchanged = ([j for j in jobs if key(j) in done] for jobs in (side_by_side, exchanged))
        every = list({key(job): job for job in [*side_by_side, *exchanged]}.values())
        with progress(len(every)) as bar:
            records = run_all(every, options.runs, options.jobs, bar.update, config)
    except (OSError, TextError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"{options.runs} has the runs that are finished; the same command goes on from there"
        print(f"\nInterrupted: {kept}, and with --finished makes tables and pages of them.", file=sys.stderr)
        return INTERRUPTED
    cells, parts = (_cells(records, jobs) for jobs in (side_by_side, exchanged))
    words = {name: scenario.words for name, scenario in scenarios.items()}
    methods = list(dict.fromkeys(c.method for c in cells))
    command = "python -m ftw_conformance efficacy " + shlex.join(sys.argv[2:] if argv is None else argv)
    sections = _sections(cells, parts, words, methods)
    for title, content in sections:
        print(f"\n{title}")
        print_table(content)
    print(f"\n{table.LEGEND}")
    if options.json:
        figures = {"command": command, "cells": [_plain(c) for c in cells], "ablations": [_plain(c) for c in parts]}
        page.write(options.json, json.dumps(figures, indent=1) + "\n")
    if options.markdown:
        body = "\n\n".join(
            f"## {title[:1].upper()}{title[1:]}\n\n{table.markdown(content)}" for title, content in sections
        )
        page.write(options.markdown, f"# Efficacy: the tables\n\n`{command}`\n\n{table.LEGEND}\n\n{body}\n")
    if options.page:
        page.write(options.page, page.render(cells, words, methods, parts, command))
    print(f"{time.perf_counter() - began:.0f} seconds in all")
    return 0


def _sections(
    cells: Sequence[Cell], parts: Sequence[Cell], words: dict[str, str], methods: Sequence[str]
) -> list[tuple[str, list[list[str]]]]:
    """Return titles and tables."""
    out = []
    if cells:
        out.append(("Final test loss, means over paired seeds", table.overview(cells, words, methods)))
        out.append(("Filter-then-Weight against the others, paired", table.default(cells, words)))
        out.append(("At the compute of Filter-then-Weight", table.equal_compute(cells, words)))
    for label, group, base in (("", cells, LESS), ("one part exchanged: ", parts, METHOD)):
        for scenario in dict.fromkeys(c.scenario for c in group):
            mine = [c for c in group if c.scenario == scenario]
            content = table.budgeted(mine) if mine[0].lr is not None else table.rows(mine, base)
            out.append((f"{label}{words.get(scenario, scenario)}", content))
    return out


def _cells(records: dict[str, dict[str, Any]], jobs: Sequence[Job]) -> list[Cell]:
    return summarise([records[key(job)] for job in jobs])


def _plain(cell: Cell) -> dict[str, Any]:
    return {**cell._asdict(), "against": {name: pair._asdict() for name, pair in cell.against.items()}}


def progress(total: int) -> Any:
    """Return a progress bar (tqdm's, which comes with the adapters)."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="run", dynamic_ncols=True, disable=None)
