"""What a trainer's mixin does before training: checks, and the target's way through the trainer's own preparation."""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ftw_torch.options import Options

from .shards import refuse_shards

__all__ = ["check", "offer", "refuse", "refuse_order", "whole"]

logger = logging.getLogger(__name__)

ONLINE = ("trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer")
LONGEST_STREAM = 10_000  # samples of a target that has no length
POLICIES = ("best", "uniform", "skip", "raise")


def refuse(trainer: Any) -> None:
    """Raise for what would silently mean something else."""
    if trainer.args.n_gpu > 1:
        raise ValueError(f"{trainer.args.n_gpu} GPUs in one process: start one process a GPU, with torchrun")
    refuse_shards(trainer)
    collator = trainer.data_collator
    says = ("return_position_ids", "return_seq_idx", "return_flash_attn_kwargs")
    if type(collator).__name__ == "DataCollatorWithFlattening" and not any(getattr(collator, x, False) for x in says):
        raise ValueError(
            "the collator lays all samples of a batch into one row and does not say where they begin: pass "
            "DataCollatorWithFlattening(return_position_ids=True)"
        )
    padding_free = getattr(trainer, "padding_free", False) or type(collator).__name__ == "DataCollatorWithFlattening"
    if padding_free and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "documents of a padding-free row are not shared by several processes yet: padding_free=False, and with "
            "packing packing_strategy='wrapped'; or one process"
        )
    online = [kind.__name__ for kind in type(trainer).__mro__ if kind.__module__ in ONLINE]
    if online:
        raise ValueError(
            f"{online[0]} makes its samples within the step, where the mixin expects a batch of them: write the loop, "
            "with ftw_torch.losses.grpo as the loss of a group"
        )
    if trainer.args.fp16:
        raise ValueError("fp16 scales the gradients that the selection measures; train in bf16 instead")
    _refuse_together(trainer)


def _refuse_together(trainer: Any) -> None:
    """Raise for options that cannot go together."""
    options, several = trainer._ftw_options, trainer.accelerator.num_processes > 1
    plain = Options(keep=1)
    for name in ("mode", "memory_budget", "capture"):
        if several and getattr(options, name) != getattr(plain, name):
            raise ValueError(f"{name}={getattr(options, name)!r} is for one process; leave it out, or train in one")
    packs = getattr(trainer.args, "packing", False) and getattr(trainer.args, "packing_strategy", "") != "wrapped"
    if packs and trainer._ftw_source is not None:
        raise ValueError(
            f"packing=True drops the column {trainer._ftw_source!r} of sources: padding_free=True keeps documents "
            "apart and their columns too"
        )
    repeats, keep = trainer._ftw_repeats, trainer._ftw_keep
    if repeats == 1:
        return
    if several:
        raise ValueError(f"steps_per_pool={repeats} is for one process; train in one, or select from fresh pools")
    if trainer._ftw_every > 1 or trainer._ftw_after > 0:
        raise ValueError(
            f"steps_per_pool={repeats} selects in every step: select_every=1 and select_after=0 go with it"
        )
    rows = trainer.args.train_batch_size
    documents = getattr(trainer, "padding_free", False)  # of which a pool may have any number
    if keep * repeats > (1 if isinstance(keep, float) else math.inf if documents else rows):
        raise ValueError(
            f"steps_per_pool={repeats} selections of keep={keep!r} samples each are more than a pool of {rows}: a "
            "larger per_device_train_batch_size, or fewer"
        )
    if trainer.train_dataset is not None and not hasattr(trainer.train_dataset, "__len__"):
        raise ValueError(f"steps_per_pool={repeats} needs train data with a length, not a stream")


def refuse_order(sampler: Any) -> None:
    """Raise if a trainer's order of samples cannot be repeated by pools."""
    if sampler is None or not hasattr(sampler, "__len__") or type(sampler).__name__ == "BatchRebalanceSampler":
        kind = type(sampler).__name__
        raise ValueError(f"steps_per_pool repeats pools in the order of a sampler of samples; the trainer's is {kind}")


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
        for name in splits:
            _refuse_lost(name, len(splits[name]), _samples(prepared[name]))
        if given is None:
            return prepared, None
        return prepared, data if isinstance(given, dict) else data["eval"]

    return tuple(args), dict(kwargs), restore


def _samples(data: Any) -> int:
    """Return how many samples a prepared split has, documents where rows are packed."""
    packed = "seq_lengths" in (getattr(data, "column_names", None) or ())
    return sum(map(len, data["seq_lengths"])) if packed else len(data)


def _refuse_lost(name: str, before: int, after: int) -> None:
    """Raise if the trainer's preparation dropped all samples of a split; say so if it dropped some."""
    remedy = "truncated prompts leave nothing to predict (max_length), and so do samples without an answer"
    if after == 0:
        raise ValueError(f"all {before} samples of {name}_dataset were dropped when the trainer prepared it: {remedy}")
    if after < before:
        logger.warning(
            "%d of the %d samples of %s_dataset were dropped when the trainer prepared it: %s",
            before - after, before, name, remedy,
        )  # fmt: skip


def whole(name: str, data: Any) -> Any:
    """Return a split with a length: a stream is read to its end.

    Raises
    ------
    TypeError
        If the data are a mapping of several sets, or no data at all.
    ValueError
        If a stream does not end within ``LONGEST_STREAM`` samples.
    """
    if isinstance(data, Mapping):
        raise TypeError(
            f"{name}_dataset is a {type(data).__name__} of {sorted(map(str, data))}: one data set goes there; join "
            "them (datasets.concatenate_datasets), or choose one of them"
        )
    if hasattr(data, "__len__"):
        return data
    if not hasattr(data, "__iter__"):
        raise TypeError(f"{name}_dataset is a {type(data).__name__}; expected a data set")
    samples = list(itertools.islice(data, LONGEST_STREAM + 1))
    if len(samples) > LONGEST_STREAM:
        raise ValueError(f"{name}_dataset is a stream of more than {LONGEST_STREAM} samples; pass stream.take(n)")
    if type(data).__module__.startswith("datasets."):  # which trainers that tokenise know
        return importlib.import_module("datasets").Dataset.from_list(samples)
    return samples


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
        if len(data) == 0:
            raise ValueError(f"{name}_dataset is empty; pass None to do without it")
