"""The private parts of PyTorch that are used, each with what it is for; all were tried on PyTorch 2.13.

A release that moves one of them breaks this file, and no other. Attributes that are read where they are needed, and
named here: `Tensor._version`, `Tensor._is_view`; `Module._modules`, `_parameters`, `_buffers`, `_forward_hooks` and
`_forward_pre_hooks`, by which a learned plan sees that a model is no longer the one it was learned on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["foreach", "quietly", "run_backward", "transform_level", "tree_leaves", "tree_map", "unsafe_view"]

quietly: Callable[[], Any] = torch._C.DisableTorchFunction
"""A context in which no torch function mode sees a call: a backward's own arithmetic needs no capture."""

transform_level: Callable[[], Any] = torch._C._functorch.maybe_current_level  # pyright: ignore[reportAttributeAccessIssue]
"""The level of the innermost transform of ``torch.func``, None outside of all."""

run_backward: Callable[..., Any] = torch.autograd.graph._engine_run_backward
"""The engine behind ``torch.autograd.grad``, with the choice between returned and accumulated gradients."""

unsafe_view: Callable[..., Any] = torch.ops.aten._unsafe_view
"""A view that autograd does not track as one, so that it may be written in place."""

foreach: Any = torch
"""The module of ``_foreach_add`` and its kin, functions of many tensors in one kernel."""
