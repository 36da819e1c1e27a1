"""The demos, but for the framework: what is learned from what, the runs, the options, the table and the page.

A small byte-level GPT is pretrained on library source, encodings tables and Unicode names. Then it should learn
English prose, from 40 samples of it as the target and a polluted stream: of the 64 samples that arrive at each step,
10 % are prose, 25 % have their bytes shuffled, 20 % are copies, the rest is more of what it knows already. Four of them
are trained on. Which four? At random; the four best by ``<g_i, P g_T>``; or by Filter-then-Weight. What counts is the
loss on prose that occurs nowhere else. All the text is part of Python itself; ``--pool`` and ``--target`` take yours.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ftw import report
from ftw.command_line import INTERRUPTED, Parser, check_output, print_table, replay, warnings_through

from . import corpus as corpora
from .text_files import TextError, read_files

__all__ = ["LENGTH", "METHOD", "RANDOM", "TOP_K", "Framework", "Learner", "main"]

LENGTH = 65  # bytes in a sample
TARGETS = 40  # target samples
TESTS = 128  # test samples
SHARES = {"domain": 0.10, "shuffled": 0.25, "copied": 0.20}  # of a pool
METHODS = RANDOM, TOP_K, METHOD = "random", "top-k", "Filter-then-Weight"


class Learner(Protocol):
    """One run: a copy of the pretrained model and its optimizer."""

    def choose(self, pool: Sequence[corpora.Sample], target: Sequence[corpora.Sample]) -> dict[str, Any]:
        """Compute the gradient of the samples it picks; returns indices, weights, scores if any, and what else."""
        ...

    def update(self) -> None:
        """Take the optimizer's step."""
        ...

    def evaluate(self, samples: Sequence[corpora.Sample]) -> float:
        """Return the mean loss."""
        ...


class Framework(Protocol):
    """What a framework brings to the demo."""

    versions: str

    def progress(self, **options: Any) -> Any:
        """Return a progress bar, as a context (tqdm's)."""
        ...

    def write(self, text: str) -> None:
        """Print a line above the bar, to the error stream."""
        ...

    def pretrain(self, corpus: corpora.Corpus, steps: int) -> int:
        """Train the model that all runs start from; returns its number of parameters."""
        ...

    def learner(self, method: str, seed: int, *, keep: int, pool: int, target: int) -> Learner:
        """Return a new run from there, ready for batches of these sizes."""
        ...


def adapt(
    learner: Learner,
    method: str,
    seed: int,
    stream: corpora.Stream,
    test: Sequence[corpora.Sample],
    recorder: report.Recorder,
    options: argparse.Namespace,
    bar: Any,
) -> None:
    """Take the steps of one run, and record them."""
    target = stream.target(TARGETS)
    run = f"{method}, seed {seed}"
    recorder.run(run, method=method, seed=seed)
    recorder.step(run, 0, test_loss=learner.evaluate(test))
    bar.set_description(run)
    for step in range(1, options.steps + 1):
        samples = stream.pool(step)
        began = time.perf_counter()
        chosen = learner.choose(samples, target)
        selected = time.perf_counter()
        learner.update()
        ended = time.perf_counter()
        columns: dict[str, Any] = {"source": [sample.source for sample in samples]}
        if seed == 0:
            columns["text"] = [sample.text for sample in samples]
        indices, weights, scores = chosen.pop("indices"), chosen.pop("weights"), chosen.pop("scores", None)
        if scores is not None:
            columns["score"] = scores
            passed = {s.text: i for i, s in enumerate(samples) if s.text not in {samples[j].text for j in indices}}
            others = sorted(passed.values(), key=lambda i: -scores[i])  # copies once
            chosen["refused"] = report.describe([*others[:2], *others[2:][-2:]], **columns)
        if step % max(1, options.steps // 12) == 0 or step == options.steps:
            chosen["test_loss"] = learner.evaluate(test)
            bar.set_postfix(test_loss=f"{chosen['test_loss']:.3f}")
        recorder.step(
            run,
            step,
            picked=report.describe(indices, weights, **columns),
            pool=Counter(columns["source"]),
            seconds={"gradient": selected - began, "update": ended - selected},
            **chosen,
        )
        bar.update()


def read_corpus(options: argparse.Namespace) -> corpora.Corpus:
    """Return the text of the options, and say what of it is skipped."""
    texts: list[dict[str, bytes] | None] = []
    for paths in (options.pool, options.target):
        found, skipped = read_files(paths, reserved=corpora.LABELS) if paths else (None, [])
        texts.append(found)
        for path, reason in skipped[:20]:
            print(f"skipped {path}: {reason}", file=sys.stderr)
        if len(skipped) > 20:
            print(f"skipped {len(skipped) - 20} more", file=sys.stderr)
    return corpora.load(LENGTH, rest=texts[0], domain=texts[1])


def arguments(given: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(prog=prog, description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--pool", nargs="+", metavar="PATH", help="text files and folders: what to pretrain on and to pick from")
    add("--target", nargs="+", metavar="PATH", help="text files and folders: what to learn")
    add("--as-is", action="store_true", help="leave the pool as it is: nothing hidden, shuffled or copied in it")
    add("--seeds", type=int, metavar="N", help="runs of each method (default: 5)")
    add("--steps", type=int, metavar="N", help="steps of a run (default: 60)")
    add("--keep", type=int, default=4, metavar="K", help="samples trained on in a step (default: 4)")
    add("--pool-size", type=int, default=64, metavar="N", help="samples that arrive at a step (default: 64)")
    add("--output", type=Path, default=Path("demo.html"), metavar="PAGE", help="the page (default: demo.html)")
    add("--record", type=Path, metavar="FILE", help="the record of the runs, JSON lines (default: beside the page)")
    add("--quick", action="store_true", help="2 seeds, 20 steps, less pretraining: does it run at all?")
    options = parser.parse_args(given)
    options.seeds = options.seeds if options.seeds is not None else 2 if options.quick else 5
    options.steps = options.steps if options.steps is not None else 20 if options.quick else 60
    for name in ("seeds", "steps", "keep", "pool_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.keep > options.pool_size:
        parser.error(f"--keep {options.keep} is more than --pool-size {options.pool_size}")
    options.record = options.record or options.output.with_suffix(".jsonl")
    if options.record.resolve() == options.output.resolve():
        parser.error(f"--output {options.output}: is the record's name; give the page another suffix, as .html")
    inputs = [Path(path).resolve() for path in (*(options.pool or ()), *(options.target or ()))]
    try:
        for option, path in {"--output": options.output, "--record": options.record}.items():
            if path.resolve() in inputs:
                parser.error(f"{option} {path}: would overwrite an input; give another name")
            check_output(path, option)
    except OSError as error:
        parser.error(str(error))
    return options


def setup(options: argparse.Namespace, corpus: corpora.Corpus, count: int, versions: str) -> dict[str, Any]:
    """Return the header of the record: what was done, in words and figures."""
    size = options.pool_size
    parts = [] if options.as_is else [f"{share:.0%} {what}" for what, share in SHARES.items()]
    return {
        "title": f"Learning {corpus.domain} from a {'stream as it is' if options.as_is else 'polluted stream'}",
        "note": (
            f"A byte-level GPT that was pretrained on {', '.join(corpus.sources)} learns {corpus.domain}. At each step "
            f"{size} samples arrive and {options.keep} are trained on. Each method picks them in its own way; pools, "
            "targets and the model at the start are the same for all, seed by seed. What counts is the loss on text "
            "that occurs nowhere else."
        ),
        "highlight": METHOD,
        "domain": None if options.as_is else corpus.domain,
        "model": f"{count:,} parameters, samples of {LENGTH - 1} bytes",
        "optimizer": "AdamW, learning rate 1e-3",
        "stream": f"pools of {size}: {', '.join([*parts, 'the rest ' + ', '.join(corpus.sources)])}",
        "target": f"{min(TARGETS, len(corpus.target))} samples a seed",
        "test": f"{min(TESTS, len(corpus.test))} samples, the same for all",
        "runs": f"{options.seeds} seeds of {options.steps} steps, {options.keep} samples trained on in each",
        "versions": f"Python {platform.python_version()}, {versions}",
    }


def warm_up(framework: Framework, options: argparse.Namespace, corpus: corpora.Corpus, sizes: dict[str, int]) -> None:
    """Take one step of each method that is thrown away: what is compiled at the first call is no part of a time."""
    stream = corpora.Stream(corpus, options.pool_size, seed=0, domain=0.0, shuffled=0.0, copied=0.0)
    for method in METHODS:
        learner = framework.learner(method, 0, **sizes)
        learner.choose(stream.pool(1), stream.target(TARGETS))
        learner.update()


def run(framework: Framework, options: argparse.Namespace, corpus: corpora.Corpus, config: Any) -> report.Record:
    """Pretrain once, adapt with each method and seed, and return the record."""
    test = random.Random(0).sample(corpus.test, min(TESTS, len(corpus.test)))
    count = framework.pretrain(corpus, 120 if options.quick else 400)
    domain, shuffled, copied = (0.0, 0.0, 0.0) if options.as_is else SHARES.values()
    total = options.seeds * len(METHODS) * options.steps
    header = setup(options, corpus, count, framework.versions)
    sizes = {"keep": options.keep, "pool": options.pool_size, "target": min(TARGETS, len(corpus.target))}
    warm_up(framework, options, corpus, sizes)
    with (
        report.Recorder(options.record, text=True, fresh=True, config=config, **header) as recorder,
        framework.progress(total=total, unit="step", dynamic_ncols=True) as bar,
    ):
        for seed in range(options.seeds):
            stream = corpora.Stream(
                corpus, options.pool_size, seed=seed, domain=domain, shuffled=shuffled, copied=copied
            )
            for method in METHODS:
                learner = framework.learner(method, seed, **sizes)
                adapt(learner, method, seed, stream, test, recorder, options, bar)
        bar.set_description("adapted")
    return report.read(options.record)


def main(framework: Framework, given: Sequence[str] | None, prog: str) -> int:
    """Run the demo; returns 0, 1 after an error, 130 after an interrupt."""
    options = arguments(given, prog)
    before, began = _written(options.record), time.perf_counter()
    try:
        with warnings_through(framework.write):
            corpus = read_corpus(options)
            record = run(framework, options, corpus, replay(prog, given, options))
        show(record, corpus, options)
    except (OSError, TextError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nInterrupted: {_kept(options.record, before)}.", file=sys.stderr)
        return INTERRUPTED
    try:
        report.write(record, options.output)
    except OSError as error:
        again = f"python -m ftw.report {options.record} -o PAGE"
        print(f"error: no page, {error}; the record is whole, and makes one elsewhere: {again}", file=sys.stderr)
        return 1
    print(f"\nThe curves, what was picked and what was refused: {options.output}; the record: {options.record}")
    print(f"{time.perf_counter() - began:.0f} seconds in all")
    return 0


def show(record: report.Record, corpus: corpora.Corpus, options: argparse.Namespace) -> None:
    """Print the table; the loss at the start, the same for all, stands above it."""
    rows = report.table(record)
    starts = {row[rows[0].index("start")] for row in rows[1:]} if "start" in rows[0] else set()
    before = ""
    if len(starts) == 1:
        column = rows[0].index("start")
        rows = [[*row[:column], *row[column + 1 :]] for row in rows]
        before = f"; before the first step {starts.pop()}"
    print(
        f"\nLoss on {corpus.domain} that occurs nowhere else\n{options.seeds} seeds of {options.steps} steps{before}\n"
    )
    print_table(rows)


def _kept(record: Path, before: Any) -> str:
    """Return what is left of a run that was interrupted."""
    if _written(record) == before:
        return f"no step was taken yet, and the record {record} not begun"
    return f"the record {record} has the steps so far; its page: python -m ftw.report {record}"


def _written(path: Path) -> tuple[int, int] | None:
    """Return when a file was last written and its size, None if there is none."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
