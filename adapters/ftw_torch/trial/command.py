"""``python -m ftw_torch.trial``: the command line."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ftw
from ftw.command_line import INTERRUPTED, Parser, check_output, print_table, replay

from . import data
from .errors import TrialError
from .experiment import FACTORS, run
from .page import READING, render

__all__ = ["main"]


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = Parser(
        prog="python -m ftw_torch.trial",
        description="Does selection pay on your model and data? Trains on random batches, random batches with target "
        "samples, whole pools, forward top-k and Filter-then-Weight for the same time each, and says which to use.",
    )
    add = parser.add_argument
    add(
        "--model",
        required=True,
        metavar="DIR",
        help="a causal language model or sequence classifier: a folder, or a hub name",
    )
    add(
        "--pool",
        required=True,
        metavar="FILE",
        help="what to train on: JSONL or CSV with text; prompt, completion; or text, label",
    )
    add(
        "--target",
        required=True,
        metavar="FILE",
        help="what the model should get better at; a third is kept apart to judge by",
    )
    add("--test", metavar="FILE", help="samples that are only reported on, never used to choose")
    add("--lora", action="store_true", help="train low-rank adapters instead of all parameters")
    add("--minutes", type=float, default=10.0, metavar="M", help="for everything (default: 10)")
    add(
        "--lr",
        type=float,
        metavar="RATE",
        help="the middle of the three learning rates (default: 5e-5, with --lora 5e-4)",
    )
    add("--keep", type=int, default=8, metavar="K", help="samples trained on in a step (default: 8)")
    add("--pool-size", type=int, default=64, metavar="N", help="candidates that arrive at a step (default: 64)")
    add("--target-size", type=int, default=16, metavar="V", help="target samples of a step (default: 16)")
    add("--micro-batch", type=int, metavar="B", help="samples that go through the model at once (default: all)")
    add("--max-length", type=int, default=512, metavar="T", help="tokens of a sample (default: 512)")
    add("--seeds", type=int, metavar="S", help="paired seeds (default: 3 to 8, as the minutes allow)")
    add("--device", metavar="NAME", help="where to train (default: a GPU if there is one)")
    add("--output", type=Path, default=Path("trial.html"), metavar="PAGE", help="the page (default: trial.html)")
    options = parser.parse_args(given)
    options.lr = options.lr if options.lr is not None else 5e-4 if options.lora else 5e-5
    if options.micro_batch is not None and options.micro_batch < 1:
        parser.error("--micro-batch must be at least 1")
    if options.max_length < 2:
        parser.error("--max-length must be at least 2")
    return options


def outputs(options: argparse.Namespace) -> tuple[Path, Path]:
    """Return the page's path and the record's, once both can be written and neither is an input."""
    page: Path = options.output
    if page.is_dir():
        raise TrialError(f"--output {page}: is a folder; give the name of a page in it, {page / 'trial.html'}")
    if not page.parent.is_dir():
        raise TrialError(f"--output {page}: there is no folder {page.parent}")
    record = page.with_suffix(".jsonl")
    if record == page:
        raise TrialError(f"--output {page}: is the record's name; give the page another suffix, as .html")
    inputs = [Path(path).resolve() for path in (options.pool, options.target, options.test) if path]
    for path in (page, record):
        if path.resolve() in inputs:
            raise TrialError(f"--output {page}: would overwrite the input {path}; give another name")
        if path.is_dir():
            raise TrialError(f"--output {page}: {path} is a folder")
        try:
            check_output(path, "--output")
        except OSError as error:
            raise TrialError(str(error)) from None
    return page, record


def read_tables(options: argparse.Namespace) -> dict[str, data.Table]:
    """Return the files by split, once they fit together."""
    paths = {"pool": options.pool, "target": options.target, "test": options.test}
    tables = {split: data.read(path) for split, path in paths.items() if path}
    data.refuse_unequal([*tables.values()])
    tables["target"] = data.without_repeats(tables["target"])
    data.refuse_overlap(tables["target"], tables["pool"])
    if "test" in tables:
        data.refuse_overlap(tables["test"], tables["pool"])
        data.refuse_overlap(tables["test"], tables["target"])
    return tables


def trial(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Check everything, run the trial, print the table and write the page."""
    page, record = outputs(options)
    tables = read_tables(options)
    try:
        from . import models
    except ImportError as error:
        raise TrialError(
            f"the trial of a model by its name needs transformers ({error}): pip install transformers"
        ) from None
    user = models.load(options.model, lora=options.lora, device=options.device, max_length=options.max_length)
    notes = [note for table in tables.values() for note in table.notes]
    splits: dict[str, list[models.Encoded]] = {}
    for name, table in tables.items():
        splits[name], more = user.encode(table)
        notes += more
    setup = {
        "model": options.model + (" with LoRA" if options.lora else ""),
        "task": "sequence classifier" if user.classifier else "causal language model",
        "trained": f"{sum(p.numel() for p in user.model.parameters() if p.requires_grad):,} parameters",
        "learning rates": ", ".join(f"{options.lr * factor:.3g}" for factor in FACTORS),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, ftw {ftw.__version__}",
    }
    for note in notes:
        print(note, file=sys.stderr)
    result = run(
        user.make,
        user.per_sample_loss,
        splits["pool"],
        splits["target"],
        splits.get("test"),
        lr=options.lr,
        collate=user.collate,
        keep=options.keep,
        pool_size=options.pool_size,
        target_size=options.target_size,
        micro_batch=options.micro_batch,
        minutes=options.minutes,
        seeds=options.seeds,
        record=record,
        header={**setup, "notes": notes, "config": config},
    )
    about: dict[str, Any] = {
        **setup,
        "samples": ", ".join(f"{len(samples):,} {name}" for name, samples in splits.items()),
        "step": f"{options.keep} of {options.pool_size} candidates, {options.target_size} target samples",
        "run": f"{result.seconds:.3g} s of training, {max(o.seed for o in result.outcomes)} seeds",
    }
    print()
    print_table(result.table())
    print(f"\n{READING}")
    for note in result.notes:
        print(f"- {note}")
    print(f"\n{result.sentence}\n")
    part = page.with_name(page.name + ".part")
    part.write_text(render(result, about), encoding="utf-8", errors="replace")
    part.replace(page)
    print(f"The curves: {page}, the record: {record}")


def main(given: Sequence[str] | None = None) -> int:
    """Run the trial; returns 0, 1 after an error, 130 after an interrupt."""
    options = arguments(given)
    record = options.output.with_suffix(".jsonl")
    before = _written(record)
    try:
        trial(options, replay("python -m ftw_torch.trial", given, options))
    except (TrialError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"the record {record} has what was measured; its page: python -m ftw.report {record}"
        if _written(record) == before:
            kept = f"nothing was measured yet, and the record {record} not begun"
        print(f"\nInterrupted before the verdict: {kept}.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _written(path: Path) -> tuple[int, int] | None:
    """Return when a file was last written and its size, None if there is none."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None
