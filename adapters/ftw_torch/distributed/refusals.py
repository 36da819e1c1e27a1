"""Ways of sharding that the selection cannot read, refused by name with the setting to use instead."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["refuse_engines"]

INSTEAD = "use FSDP2: fully_shard(model), or fsdp_version: 2 in Accelerate"


def refuse_engines(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Raise for DeepSpeed ZeRO, for FSDP1, and for shards that are offloaded to the host."""
    kinds = [type(module) for module in model.modules()]
    if any(kind.__module__.split(".")[0] == "deepspeed" for kind in kinds) or any(
        hasattr(p, "ds_id") for p in parameters.values()
    ):
        raise ValueError(
            f"DeepSpeed ZeRO keeps parameters, gradients and optimizer state where only its engine reads them: "
            f"{INSTEAD}, with reshard_after_forward=True for ZeRO-3 and False for ZeRO-2"
        )
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(f"FullyShardedDataParallel (FSDP1) flattens parameters into one: {INSTEAD}")
    modules: list[tuple[str, Any]] = list(model.named_modules())
    for name, module in modules:
        if isinstance(module, fsdp.FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            if any(group and isinstance(group.offload_policy, fsdp.CPUOffloadPolicy) for group in groups):
                raise ValueError(
                    f"fully_shard offloads {name or 'the model'!r} to the host (CPUOffloadPolicy), where no step could "
                    "be scored at the speed of the device: leave offload_policy out, and shard over more ranks or "
                    "lower micro_batch"
                )
