"""What discovery learned, as a plan: every trained parameter is used by modules of known kinds, samples on axis 0.

Such a model needs no function mode: a module's input, and the gradient of its output, are its parameters' factors
(``replay.py``). Each kind says how. A model with a parameter elsewhere, a hook of the backward, a wrapper that
compiles or shards keeps discovery, and `learn` says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as registry

__all__ = ["Plan", "Site", "learn"]

_registry: Any = registry  # type checkers do not know its tables of global hooks


class Site(NamedTuple):
    """A module that uses trained parameters."""

    module: nn.Module
    kind: str  # "linear", "right" (x W), "rows", "norm"
    weight: str | None  # the name of a trained parameter
    bias: str | None
    own: frozenset[int]  # identities of both

    def normalised(self, x: Tensor) -> Tensor:
        """Return what the gain of a norm multiplies, for inputs (..., d)."""
        m: Any = self.module
        shape = (x.shape[-1],)
        if isinstance(m, nn.LayerNorm):
            return F.layer_norm(x, shape, None, None, m.eps)
        if isinstance(m, nn.RMSNorm):
            return F.rms_norm(x, shape, None, m.eps)
        wide = x.float()  # as transformers do, whatever the model's dtype
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + _epsilon(m))
        return (wide * root).to(x.dtype)

    @property
    def same(self) -> Any:
        """What modules must have in common for their records to be computed together."""
        return type(self.module), _epsilon(self.module) if self.kind == "norm" else None


class Plan:
    """The sites of a model, and whether they are all there is.

    Attributes
    ----------
    sites : dict of int to Site
        By the identity of the module.
    patterns : set
        Sequences of firings that were compared with autograd.
    shared : set of int
        Embeddings of positions, which all samples share, by the identity of the module.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], sites: list[Site]) -> None:
        self.model = model
        self.parameters = dict(parameters)
        self.sites = {id(site.module): site for site in sites}
        self.names = {id(p): name for name, p in parameters.items()}
        self.patterns: set[Any] = set()
        self.shared: set[int] = set()
        self._modules = list(model.modules())  # held, so that no identity is given away
        self._every = list(model.parameters())
        self._signature = self._look()

    def fits(self) -> bool:
        """Return whether the model is as it was learned: modules, modes, parameters, hooks, what is frozen."""
        return bool(self._look() == self._signature)

    def buffers(self) -> list[Tensor]:
        """Return the buffers of the model as they are now."""
        return [x for m in self._modules if m._buffers for x in m._buffers.values() if x is not None]

    def _look(self) -> Any:
        every: Any = self._every
        return (
            [
                (
                    m.training,
                    *map(id, m._modules.values()),
                    *map(id, m._parameters.values()),
                    len(m._forward_hooks) + len(m._forward_pre_hooks),
                    len(m._backward_hooks) + len(m._backward_pre_hooks),
                )
                for m in self._modules
            ],
            [(p.requires_grad, p._backward_hooks is None) for p in every],
            [tuple(map(site.module.__dict__.get, _SETTINGS)) for site in self.sites.values()],
            _hooked_globally(),
        )


_SETTINGS = ("forward", "eps", "variance_epsilon", "padding_idx", "max_norm", "scale_grad_by_freq", "sparse")


def learn(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Plan | str:
    """Return the plan of a model, or why there is none.

    Parameters
    ----------
    model : nn.Module
    parameters : mapping of str to Parameter
        Those trained, under their first names.
    """
    names = {id(p): name for name, p in parameters.items()}
    sites, found = [], set()
    for path, module in model.named_modules():
        kind = type(module)
        if kind.__module__.split(".")[:2] in (["torch", "_dynamo"], ["torch", "distributed"]) or (
            kind.__module__.startswith(("torch.nn.parallel", "torch.nn.utils.parametri")) or _is_compiled(module)
        ):
            return f"{path or 'the model'!r} is a {kind.__name__}"
        if module._backward_hooks or module._backward_pre_hooks or _hooked_globally():
            return f"{path or 'the model'!r} has hooks of the backward"
        own = {key: p for key, p in module._parameters.items() if p is not None and id(p) in names}
        if not own:
            continue
        what = _kind(module)
        if what is None or set(own) - {"weight", "bias"}:
            return f"{path or 'the model'!r} holds {', '.join(own)} in a {kind.__name__}"
        weight, bias = (names[id(own[key])] if key in own else None for key in ("weight", "bias"))
        sites.append(Site(module, what, weight, bias, frozenset(map(id, own.values()))))
        found |= set(map(id, own.values()))
    hooked = [name for name, p in parameters.items() if p._backward_hooks or hasattr(p, "placements")]
    if hooked:
        return f"{hooked[0]!r} has hooks, or lies in parts on several processes"
    missing = [name for name, p in parameters.items() if id(p) not in found]
    return f"{missing[0]!r} is held by no module" if missing else Plan(model, parameters, sites)


def _kind(module: nn.Module) -> str | None:
    """Return how a module uses its parameters, None if that is not known."""
    m: Any = module
    if "forward" in m.__dict__ or "weight" not in m._parameters:
        return None
    if type(m) is nn.Linear:
        return "linear"
    if type(m) is nn.Embedding:
        plain = m.max_norm is None and not m.scale_grad_by_freq and not m.sparse
        return "rows" if plain else None
    if type(m) in (nn.LayerNorm, nn.RMSNorm):
        return "norm" if len(m.normalized_shape) == 1 else None
    if type(m).__name__ == "Conv1D" and type(m).__module__ == "transformers.pytorch_utils":
        return "right"
    vector = list(m._parameters) == ["weight"] and m.weight.ndim == 1 and not m._modules
    return "norm" if type(m).__name__.endswith("RMSNorm") and vector and _epsilon(m) is not None else None


def _epsilon(module: nn.Module) -> Any:
    m: Any = module
    found = getattr(m, "variance_epsilon", None)
    return getattr(m, "eps", None) if found is None else found


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch.jit.ScriptModule) or getattr(module, "_compiled_call_impl", None) is not None


def _hooked_globally() -> bool:
    return bool(_registry._global_backward_hooks or _registry._global_backward_pre_hooks)
