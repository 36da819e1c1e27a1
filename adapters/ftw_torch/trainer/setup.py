"""What a trainer's mixin does before training: checks, and the target's way through the trainer's own preparation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["check", "offer", "refuse"]

POLICIES = ("best", "uniform", "skip", "raise")


def refuse(trainer: Any, *, own_loss: bool) -> None:
    """Raise for what would silently mean something else."""
    if trainer.args.n_gpu > 1:
        raise ValueError(f"{trainer.args.n_gpu} GPUs in one process: start one process a GPU, with torchrun")
    for name in ("is_fsdp_enabled", "is_deepspeed_enabled"):
        if getattr(trainer, name, False):
            raise ValueError(
                f"{name.split('_')[1]} shards parameters, and the selection reads whole ones: run the processes "
                "without it (DDP)"
            )
    if getattr(trainer, "padding_free", False) or type(trainer.data_collator).__name__ == "DataCollatorWithFlattening":
        raise ValueError(
            "the collator lays all samples of a batch into one row, which would be one candidate: padding_free=False, "
            "and with packing packing_strategy='wrapped'"
        )
    if trainer.args.fp16:
        raise ValueError("fp16 scales the gradients that the selection measures; train in bf16 instead")
    if own_loss:
        return
    remedy = "give the loss of each sample instead: per_sample_loss=(model, inputs) -> (n,)"
    if trainer.compute_loss_func is not None or getattr(trainer.args, "loss_type", "nll") not in (None, "nll"):
        raise ValueError(f"compute_loss_func and loss_type other than 'nll' give one loss a batch; {remedy}")
    home = type(trainer).compute_loss
    if home.__module__ not in ("transformers.trainer", "trl.trainer.sft_trainer"):
        raise ValueError(f"{home.__qualname__} gives one loss a batch; {remedy}")


def offer(
    init: Callable[..., None], args: Sequence[Any], kwargs: Mapping[str, Any], splits: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any], Callable[[Any], tuple[dict[str, Any], Any]]]:
    """Pass the target's splits among the evaluation data, so that trainers that tokenise these tokenise them too.

    Returns the arguments, and a function that takes the trainer's data apart again.
    """
    bound = inspect.signature(init).bind_partial(*args, **kwargs)
    given = bound.arguments.get("eval_dataset", bound.arguments.get("kwargs", {}).get("eval_dataset"))
    offered = {f"ftw_{name}": split for name, split in splits.items()}
    both = {**(given if isinstance(given, dict) else {} if given is None else {"eval": given}), **offered}
    if "kwargs" in bound.signature.parameters:
        kwargs = {**kwargs, "eval_dataset": both}
    else:
        bound.arguments["eval_dataset"] = both
        args, kwargs = bound.args, bound.kwargs

    def restore(data: Any) -> tuple[dict[str, Any], Any]:
        data = dict(data)
        prepared = {name: data.pop(f"ftw_{name}") for name in splits}
        if given is None:
            return prepared, None
        return prepared, data if isinstance(given, dict) else data["eval"]

    return tuple(args), dict(kwargs), restore


def check(
    keep: Any, counts: Mapping[str, tuple[Any, int]], loss_unit: str, nothing_useful: str, splits: Mapping[str, Any]
) -> None:
    """Raise what is wrong with a trainer's options; ``counts`` has ``{name: (value, least)}``."""
    if isinstance(keep, bool) or not (
        (isinstance(keep, int) and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)
    ):
        raise ValueError(f"keep={keep!r} must be a count >= 1, or a fraction of the pool in (0, 1]")
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}={value!r} must be an int >= {least}")
    if loss_unit not in ("sample", "token"):
        raise ValueError(f"loss_unit={loss_unit!r} must be 'sample' or 'token'")
    if nothing_useful not in POLICIES:
        raise ValueError(f"nothing_useful={nothing_useful!r} must be one of {POLICIES}")
    for name, data in splits.items():
        if not hasattr(data, "__len__"):
            raise TypeError(f"{name}_dataset is a {type(data).__name__} without a length; pass list(...) of it")
        if len(data) == 0:
            raise ValueError(f"{name}_dataset is empty; pass None to do without it")
