"""Parameters that FSDP2's ``fully_shard`` holds in parts on several processes: made whole for a pass, and cut again.

For the length of a pass every process holds the whole model, and the hooks with which ``fully_shard`` gathers and frees
layer by layer are off: so no process waits for another in the middle of a pass, and pools may differ in size, be empty,
or fail. The optimizer's state is made whole one parameter at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .internals import tree_map

__all__ = ["cut_as", "gathered", "part_bytes", "refuse_offloaded", "refuse_sharded", "whole"]


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Give a model its whole parameters for a block, in the dtype of its mixed precision; a collective at its start."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported by anyone: no model of it
    if fsdp is None:
        yield
        return
    modules: list[Any] = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
    if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("FullyShardedDataParallel flattens parameters into one: use fully_shard (FSDP2), or DDP")
    hooks = [hook for module in modules for hook in _hooks(module)]
    try:
        for registered, key, _, casts in hooks:
            registered[key] = casts
        for module in modules:
            module.reshard()  # a pass without a backward may have left the root's parameters whole, in other dtypes
        for module in modules:
            module.unshard()
        yield
    finally:
        for registered, key, hook, _ in hooks:
            registered[key] = hook
        for module in modules:
            module.reshard()


def _hooks(module: Any) -> list[tuple[dict[int, Any], int, Any, Any]]:
    """Return where fully_shard's hooks on a module stand, and what in their places casts to mixed precision alone."""
    policy = module._get_fsdp_state()._mp_policy

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        dtype = policy.param_dtype if policy.cast_forward_inputs else None
        return _cast(args, dtype), _cast(kwargs, dtype)

    def after(module: Any, args: Any, output: Any) -> Any:
        return _cast(output, policy.output_dtype)

    out: list[tuple[dict[int, Any], int, Any, Any]] = []
    for registered, casts in ((module._forward_pre_hooks, before), (module._forward_hooks, after)):
        mine = [key for key, hook in registered.items() if "_fully_shard" in (getattr(hook, "__module__", "") or "")]
        if len(mine) != 1:
            raise RuntimeError(f"fully_shard has {len(mine)} hooks on {type(module).__name__}, where 1 is understood")
        out.append((registered, mine[0], registered[mine[0]], casts))
    return out


def _cast(x: Any, dtype: torch.dtype | None) -> Any:
    """Return the floating tensors in nested containers in a dtype."""
    if dtype is None:
        return x
    return tree_map(lambda y: y.to(dtype) if isinstance(y, Tensor) and y.is_floating_point() else y, x)


def refuse_sharded(parameters: Mapping[str, Tensor], remedy: str) -> None:
    """Raise if a parameter lies in parts on several processes."""
    for name, p in parameters.items():
        placements = getattr(p, "placements", None)
        if placements is not None:
            raise ValueError(
                f"parameter {name!r} is sharded ({', '.join(map(str, placements))} of {tuple(p.shape)}), and the "
                f"records of samples need the whole of it: {remedy}"
            )


def refuse_offloaded(parameters: Mapping[str, Tensor], used: Mapping[str, torch.device]) -> None:
    """Raise if a parameter's parts lie on another device than the whole of it is ``used`` on."""
    for name, p in parameters.items():
        if p.device != used[name]:
            raise ValueError(f"parameter {name!r} lies on {p.device} and is used on {used[name]}: without the offload")


def gathered(x: Any) -> Any:
    """Return what was cut into parts whole, in nested containers too: a collective."""
    return tree_map(lambda y: y.detach().full_tensor() if hasattr(y, "full_tensor") else y, x)


def cut_as(x: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of a tensor that is whole on all, in the parts of another; no collective."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(like, DTensor):
        return x
    mesh, placements = like.device_mesh, like.placements
    everywhere = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
    part = everywhere.redistribute(mesh, placements).to_local().clone()  # not a view: the whole is to be freed
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=x.shape, stride=x.stride())


def part_bytes(x: Any, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that a process puts into gathering a tensor: its part, padded to that of the first."""
    placements = getattr(x, "placements", None)
    if placements is None:
        return 0
    shape = list(x.shape)
    for size, placement in zip(x.device_mesh.shape, placements, strict=True):
        if placement.is_shard():
            shape[placement.dim] = -(-shape[placement.dim] // size)
    return torch.Size(shape).numel() * (dtype or x.dtype).itemsize
