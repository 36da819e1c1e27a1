"""The demos, but for the framework: what is learned from what, the runs, the options, the table and the page.

A small byte-level GPT is pretrained on library source, encodings tables and Unicode names. Then it should learn
English prose, from 24 samples of it as the target and a polluted stream: of the 64 samples that arrive at each step,
10 % are prose, 25 % have their bytes shuffled, 20 % are copies, the rest is more of what it knows already. Four of them
are trained on. Which four? At random; the four best by ``<g_i, P g_T>``; or by Filter-then-Weight. What counts is the
loss on prose that occurs nowhere else. All the text is part of Python itself; ``--pool`` and ``--target`` take yours.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ftw import report

from . import corpus as corpora
from .text_files import TextError, read_files

__all__ = ["LENGTH", "METHOD", "RANDOM", "TOP_K", "Framework", "Learner", "main"]

LENGTH = 65  # bytes in a sample
TARGETS = 24  # target samples
TESTS = 128  # test samples
SHARES = {"domain": 0.10, "shuffled": 0.25, "copied": 0.20}  # of a pool
RANDOM, TOP_K, METHOD = "random", "top-k", "Filter-then-Weight"


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
    parser = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n\n")[1])
    add = parser.add_argument
    add("--pool", nargs="+", metavar="PATH", help="text files and folders: what to pretrain on and to pick from")
    add("--target", nargs="+", metavar="PATH", help="text files and folders: what to learn")
    add("--as-is", action="store_true", help="leave the pool as it is: nothing hidden, shuffled or copied in it")
    add("--seeds", type=int, metavar="N", help="runs of each method (default: 5)")
    add("--steps", type=int, metavar="N", help="steps of a run (default: 60)")
    add("--keep", type=int, default=4, metavar="K", help="samples trained on in a step (default: 4)")
    add("--pool-size", type=int, default=64, metavar="N", help="samples that arrive at a step (default: 64)")
    add("--output", type=Path, default=Path("demo.html"), metavar="PAGE", help="the page (default: demo.html)")
    add("--record", type=Path, metavar="FILE", help="keep the record of the runs, JSON lines, in this file")
    add("--quick", action="store_true", help="2 seeds, 20 steps, less pretraining: does it run at all?")
    options = parser.parse_args(given)
    options.seeds = options.seeds if options.seeds is not None else 2 if options.quick else 5
    options.steps = options.steps if options.steps is not None else 20 if options.quick else 60
    for name in ("seeds", "steps", "keep", "pool_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.keep > options.pool_size:
        parser.error(f"--keep {options.keep} is more than --pool-size {options.pool_size}")
    if not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
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


def run(framework: Framework, options: argparse.Namespace, corpus: corpora.Corpus, path: Path) -> report.Record:
    """Pretrain once, adapt with each method and seed, and return the record."""
    test = random.Random(0).sample(corpus.test, min(TESTS, len(corpus.test)))
    count = framework.pretrain(corpus, 120 if options.quick else 400)
    domain, shuffled, copied = (0.0, 0.0, 0.0) if options.as_is else SHARES.values()
    methods = (RANDOM, TOP_K, METHOD)
    total = options.seeds * len(methods) * options.steps
    header = setup(options, corpus, count, framework.versions)
    with (
        report.Recorder(path, text=True, fresh=True, **header) as recorder,
        framework.progress(total=total, unit="step", dynamic_ncols=True) as bar,
    ):
        for seed in range(options.seeds):
            stream = corpora.Stream(
                corpus, options.pool_size, seed=seed, domain=domain, shuffled=shuffled, copied=copied
            )
            for method in methods:
                sizes = {"keep": options.keep, "pool": options.pool_size, "target": min(TARGETS, len(corpus.target))}
                learner = framework.learner(method, seed, **sizes)
                adapt(learner, method, seed, stream, test, recorder, options, bar)
        bar.set_description("adapted")
    return report.read(path)


def main(framework: Framework, given: Sequence[str] | None, prog: str) -> int:
    """Run the demo."""
    options = arguments(given, prog)
    began = time.perf_counter()
    try:
        corpus = read_corpus(options)
        with tempfile.TemporaryDirectory() as folder:
            record = run(framework, options, corpus, options.record or Path(folder, "demo.jsonl"))
        report.write(record, options.output)
    except (OSError, TextError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nLoss on {corpus.domain} that occurs nowhere else; {options.seeds} seeds of {options.steps} steps")
    print_table(report.table(record))
    print(f"\nThe curves, what was picked and what was refused: {options.output}")
    print(f"{time.perf_counter() - began:.0f} seconds in all")
    return 0


def print_table(rows: list[list[str]]) -> None:
    """Print rows of text in columns, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join([row[0].ljust(len(first)), *others]).rstrip())
