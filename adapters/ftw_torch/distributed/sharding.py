"""How a model's parameters are placed on the ranks: replicated, sharded by FSDP2, or by tensor parallelism.

Here ``fully_shard``'s own hooks stay on: they gather a layer before it runs, free it after, and reduce-scatter its
gradient, so that no rank ever holds the model. The price is that ranks wait for each other within a pass. All run
the same number of passes, and a rank that fails in a forward goes on with the gathers that the others wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .refusals import refuse_engines

__all__ = ["Sharding", "free", "fsdp_modules", "local_part", "redistributed", "undivided"]

T = TypeVar("T")


class Sharding:
    """The shards of a model's parameters, and what their collectives move.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Parameter
        Those that are trained, none of them gathered at the moment.
    group : ProcessGroup or None
        The ranks with pools of their own; None derives them from the shards.

    Attributes
    ----------
    factors : dict of str to float
        For each parameter that FSDP2 manages, what its reduce-scatter divides by.
    sent : dict of str to int
        Bytes that this rank put into FSDP2's collectives: all-gathers of "parameters", and reduce-scatters under the
        name of their pass.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], group: Any) -> None:
        refuse_engines(model, parameters)
        self.parameters = parameters
        self.modules = fsdp_modules(model)
        self.groups = [group for module in self.modules for group in _param_groups(module)]
        names = {id(p): name for name, p in parameters.items()}
        self.factors: dict[str, float] = {}
        self._owners: dict[str, Any] = {}
        for owner in self.groups:
            for held in owner.fsdp_params:
                name = names.get(id(held.sharded_param))
                if name is not None:
                    self.factors[name] = owner.gradient_divide_factor or float(owner.mesh_info.mesh.size())
                    self._owners[name] = owner
        self.sharded = any(hasattr(p, "placements") for p in parameters.values())
        self.group = group if group is not None else self._data_parallel()
        size = dist.get_world_size(self.group)
        for name, owner in self._owners.items():
            if owner.mesh_info.mesh.size() != size:
                raise ValueError(
                    f"group= has {size} ranks, and {name!r} is sharded over {owner.mesh_info.mesh.size()}: give the "
                    "group of the data-parallel ranks, mesh['dp'].get_group()"
                )
        self.sent: dict[str, int] = {}
        self._order: list[Any] = list(self.groups)  # of the gathers in a forward, as seen last

    @property
    def hooked(self) -> bool:
        """Whether a forward has collectives over the ranks of the group."""
        return bool(self.groups)

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes that mixed precision gathers parameters in."""
        return {owner.mp_policy.param_dtype for owner in self.groups if owner.mp_policy.param_dtype is not None}

    def same(self, x: Tensor) -> Tensor:
        """Return a tensor as the first rank of the tensor-parallel ones has it: all must make the same choice of it."""
        for process_group in self._parallel():
            x = x.contiguous()
            dist.broadcast(x, group=process_group, group_src=0)
        return x

    def settle(self) -> None:
        """Free what a forward without a backward left gathered, and let no later backward prefetch in its order."""
        for owner in self.groups:
            owner._to_sharded()
            owner._post_forward_indices.clear()
            getattr(owner.comm_ctx, "post_forward_order", []).clear()  # none before the first forward

    # ------------------------------------------------------------------------------------------------------------------
    # Passes

    def forward(self, work: Callable[[], T]) -> T:
        """Return ``work()``, one forward; if it fails, join the gathers that the other ranks are still to make."""
        if not self.groups:
            return work()
        made: list[Any] = []
        try:
            with self._counted(made):
                value = work()
        except Exception:
            self._finish(made)
            raise
        self._order = made
        return value

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Give the parameters no ``.grad`` for a block, and neither hooks on it; reduce at each backward."""
        held = [(p, p.grad, dict(p._post_accumulate_grad_hooks or {})) for p in self.parameters.values()]
        states = [(owner, owner.reduce_grads, owner.all_reduce_grads) for owner in self.groups]
        for owner in self.groups:
            waiting = [getattr(x, "unsharded_accumulated_grad", None) for x in owner.fsdp_params]
            if owner._partial_reduce_output is not None or any(x is not None for x in waiting):
                raise ValueError(
                    "gradients wait unreduced under set_requires_gradient_sync(False), and a selection would reduce "
                    "them with its own: accumulate with set_requires_gradient_sync(True)"
                )
        try:
            for owner in self.groups:
                owner.reduce_grads = owner.all_reduce_grads = True
            for p, _, hooks in held:
                p.grad = None
                if hooks:
                    p._post_accumulate_grad_hooks.clear()
            yield
        finally:
            for owner, reduces, adds in states:
                owner.reduce_grads, owner.all_reduce_grads = reduces, adds
            for p, grad, hooks in held:
                p.grad = grad
                if hooks:
                    p._post_accumulate_grad_hooks.update(hooks)

    def backward(self, total: Tensor, what: str) -> None:
        """Run an ordinary backward, counting its gathers and reduce-scatters."""
        with self._counted([]):
            torch.autograd.backward(total)
        for name in self._owners:
            p = self.parameters[name]
            if p.grad is not None:
                dtype = self._owners[name].mp_policy.reduce_dtype or self._owners[name].mp_policy.param_dtype
                size = _padded(p, self._owners[name]) * (dtype or p.dtype).itemsize
                self.sent[what] = self.sent.get(what, 0) + size * self._owners[name].mesh_info.shard_mesh_size

    @contextmanager
    def _counted(self, made: list[Any]) -> Iterator[None]:
        """Note the gathers of a block, and their bytes."""

        def noting(owner: Any) -> Callable[..., Any]:
            original = type(owner).unshard

            def unshard(*args: Any, **kwargs: Any) -> Any:
                idle = owner._all_gather_result is None and not owner.is_unsharded
                found = original(owner, *args, **kwargs)
                if idle and owner._all_gather_result is not None:
                    made.append(owner)
                    self._count_gather(owner)
                return found

            return unshard

        with ExitStack() as stack:
            for owner in self.groups:
                owner.unshard = noting(owner)
                stack.callback(owner.__dict__.pop, "unshard", None)
            yield

    def _count_gather(self, owner: Any) -> None:
        dtype = owner.mp_policy.param_dtype
        size = sum(
            _padded(x.sharded_param, owner) * (dtype or x.sharded_param.dtype).itemsize for x in owner.fsdp_params
        )
        self.sent["parameters"] = self.sent.get("parameters", 0) + size

    def _finish(self, made: Sequence[Any]) -> None:
        """Make the gathers of a forward that are still missing, and forget what it left behind."""
        for module in self.modules:  # outermost first: what the first forward does
            module._get_fsdp_state()._lazy_init()
        for owner in self._order[len(made) :]:
            owner._to_sharded()
            owner.unshard()
            owner.wait_for_unshard()
            owner._to_sharded()
        for module in self.modules:
            if module._get_fsdp_state()._is_root and hasattr(module, "reset_iter_state"):
                module.reset_iter_state()
        self.settle()

    # ------------------------------------------------------------------------------------------------------------------
    # Groups

    def _data_parallel(self) -> Any:
        """Return the group of the ranks with pools of their own: None for all, one rank alone under pure TP."""
        world, shards = dist.get_world_size(), list[Any](self.parameters.values())
        meshes = [owner.mesh_info.mesh for owner in self.groups] or [
            p.device_mesh for p in shards if hasattr(p, "device_mesh")
        ]
        if not meshes or (self.groups and meshes[0].size() == world):
            return None
        if self.groups and meshes[0].ndim == 1:
            return meshes[0].get_group()
        if not self.groups and meshes[0].size() == world:
            alone: Any = dist.new_subgroups
            return alone(1)[0]
        raise ValueError(
            f"the parameters are sharded over {meshes[0].size()} of {world} ranks, and nothing says which ranks have "
            "pools of their own: give their group, group=mesh['dp'].get_group()"
        )

    def _parallel(self) -> list[Any]:
        """Return the groups of tensor parallelism that this rank is in."""
        out: dict[int, Any] = {}
        for name, p in self.parameters.items():
            mesh: Any = getattr(p, "device_mesh", None)
            if mesh is None:
                continue
            outer = self._owners[name].mesh_info.mesh.ndim if name in self._owners else 0
            for dim in range(outer, mesh.ndim):
                group = mesh.get_group(dim)
                if dist.get_world_size(group) > 1:
                    out[id(group)] = group
        return list(out.values())


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules that ``fully_shard`` was called on."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # not imported by anyone: no model of it
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def redistributed(g: Tensor, p: Tensor) -> Tensor:
    """Return a gradient in the placements of its parameter.

    Autograd may leave sums over ranks pending, and arithmetic gathers what has fewer rows than there are ranks.
    """
    placements: Any = getattr(p, "placements", None)
    if placements is None or g.placements == placements:  # type: ignore[attr-defined]
        return g
    out: Tensor = g.redistribute(placements=placements)  # type: ignore[attr-defined]
    return out


def free(model: nn.Module) -> None:
    """Let ``fully_shard`` free what a forward without a backward left gathered, so that parameters are the shards."""
    for module in fsdp_modules(model):
        module.reshard()


def local_part(x: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    out: Tensor = x.to_local() if hasattr(x, "to_local") else x
    return out


def undivided(losses: Any) -> Tensor:
    """Return losses that tensor parallelism left in shards whole, with their history."""
    out: Tensor = losses.full_tensor() if hasattr(losses, "full_tensor") else losses
    return out


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    groups = [state._fsdp_param_group] if groups is None else groups
    return [group for group in groups if group is not None]


def _padded(p: Any, owner: Any) -> int:
    """Return how many numbers of a parameter this rank holds, padded to those of the first."""
    for held in owner.fsdp_params:
        if held.sharded_param is p:
            return int(held._sharded_param_data.numel())
    return int(p.to_local().numel())
