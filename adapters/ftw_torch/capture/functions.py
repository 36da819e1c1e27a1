"""Kinds of PyTorch functions that capture tells apart, and the tensors among their arguments."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .batch_axis import forms, getters
from .internals import transform_level

__all__ = ["INPLACE", "PLAIN", "WRITES", "first", "tensors", "transformed"]


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors among the arguments or results of a function."""
    if isinstance(tree, Tensor):
        return [tree]
    found: list[Tensor] = []
    if isinstance(tree, _TREES):
        for x in tree:
            if isinstance(x, Tensor):
                found.append(x)
            elif isinstance(x, _TREES):
                found += tensors(x)
    return found


_TREES: Any = (tuple, list, type({}.values()))


def first(args: Any) -> Any:
    """Return the first positional argument, None if there is none."""
    return args[0] if args else None


def transformed() -> bool:
    """Return whether a transform of ``torch.func`` is at work, whose tensors are not what they seem."""
    return transform_level() is not None


_PROPERTIES = (
    "shape dtype device ndim is_cuda is_cpu is_meta is_sparse is_quantized is_nested layout requires_grad "
    "is_leaf grad grad_fn names itemsize nbytes is_xla is_mps is_xpu is_mkldnn is_complex"
)
_QUESTIONS = (
    "size dim numel stride is_floating_point is_complex is_contiguous storage_offset nelement element_size "
    "data_ptr get_device is_pinned is_set_to __len__ __hash__ register_hook retain_grad untyped_storage "
    "_is_view is_inference __repr__ __format__"
)

_GRAD: Any = Tensor.grad

PLAIN = frozenset([*getters(_PROPERTIES), *forms(_QUESTIONS), _GRAD.__set__])
"""Functions that only ask a tensor about itself, or put its ``.grad`` aside for a while."""

_NEW = "index_add index_copy index_put scatter scatter_add"
WRITES = frozenset(forms(_NEW, "index_add_ index_copy_ index_put_ scatter_ scatter_add_"))
"""Functions that write rows of one tensor into chosen places of their first."""

INPLACE = WRITES | frozenset(forms("copy_", "add_"))
