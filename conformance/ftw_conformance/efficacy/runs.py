"""One run of a method on a scenario with a seed, and many of them, in processes, from a file and into it.

Everything that is random depends on the scenario and the seed alone: methods are compared on the same pools, targets
and starts. Finished runs are lines of a JSON file; those already there are not done again.
"""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from .ablations import METHODS
from .baselines import METHOD, RANDOM, WHOLE
from .budget import FIRST_SEED, POINTS, Job, area, warm_up
from .budget import run as run_budgeted
from .cost import flops
from .step import Step
from .wear import Uses

__all__ = ["Job", "key", "read", "run", "run_all"]


def key(job: Job) -> str:
    """Return what tells runs apart: scenario and its options, method, seed, steps."""
    options = json.dumps(job.scenario.options, sort_keys=True)
    lr = f" | lr {job.lr}" if job.lr else ""
    return f"{job.name} {options} | {job.method} | {job.seed} | {job.steps or ''}{lr}"


def run(job: Job) -> dict[str, Any]:
    """Return the record of one run.

    Random and whole pool go on beyond the last step until they have done as much arithmetic as the default method has
    in all its steps; their loss there is ``equal_compute``.
    """
    if job.scenario.budget:
        return {"key": key(job), **run_budgeted(job)}
    task = job.scenario.build(FIRST_SEED + job.seed, job.steps)
    method = METHODS[job.method]
    warm_up(job, task)
    model, optimizer = task.model()
    each = max(1, task.steps // POINTS)
    curve = [(0, model.test_loss())]
    sums: dict[str, list[float]] = {"effective_size": [], "good": [], "shrinkage": [], "signal": []}
    work = flops(task, method.passes)
    budget = flops(task, METHODS[METHOD].passes) * task.steps
    last = round(budget / work) if job.method in (RANDOM, WHOLE) else task.steps
    seconds, seen = 0.0, Uses()
    target_loss = math.nan
    for i in range(max(last, task.steps)):
        rng = np.random.default_rng([job.seed, 4, i])
        batches = task.batches(i)
        began = time.process_time()
        step = Step(task, model, optimizer, batches, rng, seen)
        choice = method.choose(step)
        optimizer.update(step.update(choice))
        if i >= task.steps:
            continue
        seconds += time.process_time() - began
        w = np.asarray(choice.weights, dtype=float)
        sums["effective_size"].append(float(w.sum() ** 2 / (w * w).sum()))
        sums["shrinkage"].append(choice.shrinkage)
        if math.isfinite(choice.signal):
            sums["signal"].append(choice.signal)
        if batches.good is not None:
            sums["good"].append(float(np.mean(batches.good[choice.indices])))
        if (i + 1) % each == 0 or i + 1 == task.steps:
            curve.append((i + 1, model.test_loss()))
    target_loss = float(model.losses(task.batches(0).target).mean())
    return {
        "key": key(job),
        "scenario": job.name,
        "method": job.method,
        "seed": job.seed,
        "curve": [(i, round(loss, 5)) for i, loss in curve],
        "final": curve[-1][1],
        "area": area(curve),
        "equal_compute": model.test_loss() if job.method in (RANDOM, WHOLE) else curve[-1][1],
        "target_loss": target_loss,
        "flops": work,
        "whole_flops": flops(task, METHODS[WHOLE].passes),
        "seconds": seconds,
        **{name: float(np.mean(values)) if values else None for name, values in sums.items()},
    }


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the finished runs of a file, by key; a line that a killed process left unfinished is passed over."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
                found[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue
    return found


def run_all(
    jobs: Sequence[Job],
    path: Path,
    processes: int,
    progress: Callable[[int], Any] = lambda n: None,
    config: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Do the runs that ``path`` lacks, add them to it with their config, and return all of the jobs', by key."""
    done = read(path)
    missing = [job for job in jobs if key(job) not in done]
    progress(len(jobs) - len(missing))
    with open(path, "a", encoding="utf-8") as file:
        for record in _results(missing, processes):
            file.write(json.dumps(record if config is None else {**record, "config": config}) + "\n")
            file.flush()
            done[record["key"]] = record
            progress(1)
    return {key(job): done[key(job)] for job in jobs}


def _results(jobs: Sequence[Job], processes: int) -> Iterator[dict[str, Any]]:
    if processes <= 1:
        yield from map(run, jobs)
        return
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # the children read them when they start
    context = multiprocessing.get_context("spawn")  # what a fork inherits of torch's threads is not safe
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        try:
            with _ignoring_interrupts():  # the first of them starts the children, which inherit it
                futures = [pool.submit(run, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Leave Ctrl-C to this process: children print no traceback each, and are ended by it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
