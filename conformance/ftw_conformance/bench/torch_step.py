"""``python -m ftw_conformance bench torch``: what a step costs, in plain training steps over the same pool.

Time is CPU time of the process (``time.process_time``) on one thread, or on a GPU the wall time between
synchronisations. The steps are interleaved on the same model and data, and each figure is the median over rounds of
its ratio to the plain step of its round. Memory is the growth of the peak over what the model and the optimizer's
state take, each in a process of its own: ``VmHWM`` on a CPU, ``max_memory_allocated`` on a GPU. Two buffers of
ours the size of the parameters, g_T and the diagonal of P, are in the figure; the table also states it without them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ftw.command_line import Parser, check_output

from .torch_calls import Calls, calls_of
from .torch_models import GPT, Encoder, Llama, add_lora, class_loss, lm_loss
from .torch_variants import STEPS, Setup, limits, ours

__all__ = ["main"]

SIZES: dict[str, tuple[int, ...]] = {  # vocabulary, width, layers, ...
    "gpt": (4096, 256, 4),
    "narrow": (256, 32, 12, 2, 1, 64),  # so little arithmetic that what is measured is the calls
    "100M": (32000, 768, 12, 12, 4, 2048),
    "1B": (32000, 2048, 16, 32, 8, 8192),
    "minilm": (30522, 384, 6, 12, 1536),
    "tiny": (64, 16, 2, 2, 1, 32),
    "tiny-encoder": (64, 16, 2, 2, 32),
}
ENCODERS = ("minilm", "tiny-encoder")
LORA = {"lora": "gpt", "narrow-lora": "narrow", "tiny-lora": "tiny", "1B-lora": "1B"}  # of rank 8


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    parser = Parser(prog="python -m ftw_conformance bench torch", description=__doc__)
    parser.add_argument(
        "--tokens", default="128,512,1024", help="lengths of the sequences; pools hold 4096 to 8192 tokens"
    )
    parser.add_argument("--model", default="gpt", choices=[*SIZES, *LORA])
    parser.add_argument("--pool", type=int, help="candidates N; by default 32, 16, 8 for 128, 512, 1024 tokens, else 8")
    parser.add_argument("--targets", type=int, help="target samples V; N/8 by default")
    parser.add_argument("--keep", type=int, help="samples k to train on; N/4 by default")
    parser.add_argument("--steps", default=",".join(STEPS), help="which steps")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--no-memory", action="store_true", help="time only")
    parser.add_argument("--long", action="store_true", help="memory at 2048, 4096 and 8192 tokens instead")
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.json:
        try:
            check_output(Path(options.json), "--json")
        except OSError as error:
            parser.error(str(error))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.memory_of:
        print(peak(options, int(options.tokens), options.memory_of))
        return 0
    rows: list[dict[str, Any]] = []
    for t in [2048, 4096, 8192] if options.long else [int(t) for t in options.tokens.split(",")]:
        rows += long_context(options, t) if options.long else table(options, t)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "device": where(options), "rows": rows}, file, indent=1)
    return 0


def where(options: argparse.Namespace) -> str:
    """Name the hardware."""
    return torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} thread"


def sizes(options: argparse.Namespace, t: int) -> tuple[int, int, int, int]:
    """Return N, V, k and the length of the shortlist."""
    n = options.pool or {128: 32, 512: 16, 1024: 8}.get(t, 8)
    return n, options.targets or max(1, n // 8), options.keep or max(1, n // 4), max(1, n // 2)


def setup(options: argparse.Namespace, t: int) -> tuple[Setup, int]:
    """Return a model with its optimizer, and the size of its vocabulary."""
    torch.manual_seed(0)
    model_name: str = options.model
    base = LORA.get(model_name, model_name)
    vocabulary, d, layers, *rest = SIZES[base]
    with torch.device(options.device):
        if base == "gpt":
            model: Any = GPT(vocabulary, d, layers, t)
        elif base in ENCODERS:
            model = Encoder(vocabulary, d, layers, t, *rest)
        else:
            model = Llama(vocabulary, d, layers, *rest)
        if model_name in LORA:
            add_lora(model, 8)
    model = model.to(options.device, torch.bfloat16 if options.dtype == "bf16" else torch.float32)
    _, _, k, s = sizes(options, t)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for p in trained:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    optimizer.zero_grad()
    return Setup(model, optimizer, class_loss if base in ENCODERS else lm_loss, k, s), vocabulary


def batch(options: argparse.Namespace, n: int, t: int, vocabulary: int) -> torch.Tensor:
    """Return random sequences."""
    return torch.randint(0, vocabulary, (n, t + 1), device=options.device)


def clock(options: argparse.Namespace) -> float:
    """Return seconds: of the process on a CPU, of the wall after everything is done on a GPU."""
    if options.device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(options: argparse.Namespace, t: int, *, warm: int = 1) -> tuple[dict[str, float], dict[str, Calls]]:
    """Return each step's time as a ratio to the plain step over the pool, and what it calls.

    The first ``warm`` rounds are not counted: audits, compilations.
    """
    made, vocabulary = setup(options, t)
    n, v, _, _ = sizes(options, t)
    names = ["plain_pool", *(name for name in options.steps.split(",") if name != "plain_pool")]
    steps = {name: STEPS[name](made) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    used = warm + options.rounds
    for i in range(used):
        pool, target = batch(options, n, t, vocabulary), batch(options, v, t, vocabulary)
        for name in names:
            start = clock(options)
            try:
                steps[name](pool, target)
            except torch.OutOfMemoryError:
                seconds[name].append(float("inf"))
                torch.cuda.empty_cache()
                continue
            if i >= warm:
                seconds[name].append(clock(options) - start)
    plain = seconds["plain_pool"]
    ratios = {name: statistics.median([x / y for x, y in zip(s, plain, strict=False)]) for name, s in seconds.items()}
    fits = [name for name in names if seconds[name][-1] < float("inf")]
    pool, target = batch(options, n, t, vocabulary), batch(options, v, t, vocabulary)
    while any(use & (use - 1) == 0 for use in (used + 1, used + 2)):  # audited: not what is counted
        used += 1
        for name in fits:
            steps[name](pool, target)
    calls = {name: calls_of(lambda name=name: steps[name](pool, target), 1) for name in fits}  # type: ignore[misc]
    return ratios | {"seconds": statistics.median(plain)}, calls


def peak(options: argparse.Namespace, t: int, name: str) -> float:
    """Return the growth of the peak, in bytes, of two steps over model and optimizer state; inf if it is too much."""
    made, vocabulary = setup(options, t)
    n, v, _, _ = sizes(options, t)
    step = STEPS[name](made)
    small = made._replace(keep=1, shortlist=1)
    STEPS[name](small)(batch(options, 2, 8, vocabulary), batch(options, 2, 8, vocabulary))  # libraries, compilations
    made.optimizer.zero_grad()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = highest(options)
    try:
        for _ in range(2):
            step(batch(options, n, t, vocabulary), batch(options, v, t, vocabulary))
    except torch.OutOfMemoryError:
        return float("inf")
    return highest(options) - start


def highest(options: argparse.Namespace) -> int:
    """Return the peak so far, in bytes."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():  # ru_maxrss begins at the parent process's
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status: give --no-memory")


def fresh(options: argparse.Namespace, t: int, name: str) -> float:
    """Return `peak`, on a CPU from a process of its own."""
    if options.device == "cuda":  # its allocator counts from where it stands
        torch.cuda.empty_cache()
        return peak(options, t, name)
    command = [sys.executable, "-m", "ftw_conformance.bench.torch_step", "--tokens", str(t), "--memory-of", name]
    command += ["--model", options.model, "--device", options.device, "--dtype", options.dtype]
    n, v, k, _ = sizes(options, t)
    command += ["--pool", str(n), "--targets", str(v), "--keep", str(k)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def table(options: argparse.Namespace, t: int) -> list[dict[str, Any]]:
    """Measure, print and return the rows of one length."""
    n, v, k, s = sizes(options, t)
    made, vocabulary = setup(options, t)
    ratios, calls = measure(options, t)
    print(f"\n{options.model}, T={t} N={n} V={v} k={k} shortlist={s}, {options.dtype}, {where(options)}: "
          f"a plain step over the pool takes {ratios['seconds']:.3g} s")  # fmt: skip
    if options.device == "cuda" and "default" in ratios and ratios["default"] < float("inf"):
        print(f"waits for the device in a step of the default method: {host_syncs(options, t, made, vocabulary)}")
    print(
        f"{'step':20} {'time':>6} {'asked':>6}    {'memory':>6} {'less 2p':>7} {'asked':>6}    "
        f"{'ops':>6} {'kernels':>7} {'host ms':>8}"
    )
    parameters = 2 * sum(p.numel() * p.element_size() for p in made.parameters.values())
    plain = 0 if options.no_memory else fresh(options, t, "plain_pool")
    rows = []
    for name, ratio in ratios.items():
        if name == "seconds":
            continue
        time_limit, memory_limit = limits(name, options.model, n, v, k, s, t, ratios)
        memory = None if not plain else (plain if name == "plain_pool" else fresh(options, t, name))
        own = name not in ("plain_pool", "plain_k")
        relative = None if memory is None else memory / plain
        without = None if memory is None else (memory - parameters * own) / plain
        rows.append(
            {
                "model": options.model,
                "t": t,
                "n": n,
                "step": name,
                "time": ratio,
                "time_asked": time_limit,
                "memory": relative,
                "memory_without_buffers": without,
                "memory_asked": memory_limit,
                "calls": calls[name]._asdict() if name in calls else None,
            }
        )
        own_calls = "{:6} {:7} {:8.1f}".format(*calls[name]) if name in calls else ""
        print(f"{name:20} {show(ratio)} {show(time_limit)} {mark(ratio, time_limit)} {show(relative)}  {show(without)} "
              f"{show(memory_limit)} {mark(without, memory_limit)} {own_calls}", flush=True)  # fmt: skip
    return rows


def long_context(options: argparse.Namespace, t: int) -> list[dict[str, Any]]:
    """Print the peak of one step of the default method: linear in the length, where no (T, T) array is formed."""
    rows = []
    options.pool = 2
    for model in ("lora", "gpt"):
        options.model = model
        bytes_ = fresh(options, t, "default")
        rows.append({"model": model, "t": t, "bytes": bytes_})
        print(f"{model:5} T={t:5} N=2: {bytes_ / 2**20:8.1f} MiB, {bytes_ / t / 2**10:6.1f} KiB a token", flush=True)
    return rows


def host_syncs(options: argparse.Namespace, t: int, made: Setup, vocabulary: int) -> int:
    """Return how often a step of ours waits for the device."""
    n, v, _, _ = sizes(options, t)
    step = ours(made)
    pool, target = batch(options, n, t, vocabulary), batch(options, v, t, vocabulary)
    step(pool, target)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(pool, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def show(x: float | None) -> str:
    """Format a ratio."""
    return f"{x:6.2f}" if x is not None else "     -"


def mark(x: float | None, limit: float | None) -> str:
    """Say whether a limit is kept."""
    return "  " if x is None or limit is None else "ok" if x <= limit else "NO"


if __name__ == "__main__":
    sys.exit(main())
