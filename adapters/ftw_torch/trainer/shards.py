"""What a trainer that shards its parameters must be set to, said before training starts."""

from __future__ import annotations

from typing import Any

from ftw_torch.options import Options

__all__ = ["is_sharded", "refuse_shards"]

FSDP2 = "fsdp=True, fsdp_config={'version': 2} in TrainingArguments (fsdp_version: 2 in Accelerate)"


def is_sharded(trainer: Any) -> bool:
    """Return whether FSDP shards the parameters."""
    return bool(getattr(trainer, "is_fsdp_enabled", False))


def refuse_shards(trainer: Any) -> None:
    """Raise for engines whose shards the selection cannot read, and for options that need whole gradients.

    Raises
    ------
    ValueError
        With the setting to use instead.
    """
    if getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            "deepspeed shards parameters and optimizer state where only its engine reads them: use FSDP2, "
            f"{FSDP2}, with 'reshard_after_forward': True for ZeRO-3 and False for ZeRO-2"
        )
    if not is_sharded(trainer):
        return
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(f"fsdp shards parameters, and version 1 flattens them into one: use FSDP2, {FSDP2}")
    offload: Any = getattr(plugin, "cpu_offload", None)
    if offload is True or type(offload).__name__ == "CPUOffloadPolicy":
        raise ValueError(
            "fsdp shards parameters, and cpu_offload keeps them on the host: leave it out, and shard over more "
            "processes or lower micro_batch"
        )
    options: Options = trainer._ftw_options
    if options.score != "forward" or options.gram_of(2, 1):
        raise ValueError(
            f"fsdp shards parameters, and score={options.score!r} with filter={options.filter!r} and "
            f"weight={options.weight!r} needs gradients of samples: score='forward', filter='top_k', weight='uniform'"
        )
    if trainer._ftw_policy == "uniform":
        raise ValueError(
            "fsdp shards parameters: nothing_useful='best', 'skip' or 'raise', for 'uniform' sums whole ones"
        )
