"""PyTorch adapter of Filter-then-Weight: one line where ``loss.backward()`` stood."""

from ftw.command_line import require as _require

_require("ftw_torch", "torch", extra="torch")

from .capture.registry import register_rule
from .errors import (
    BatchingWarning,
    CaptureWarning,
    NonFiniteError,
    PlanWarning,
    SelectionError,
    SelectionWarning,
    TargetWarning,
)
from .optim.geometry import geometry, linear_update, register_optimizer
from .packing import PackedBatch, documents
from .selector import FilterThenWeight

__all__ = [
    "BatchingWarning",
    "CaptureWarning",
    "FilterThenWeight",
    "NonFiniteError",
    "PackedBatch",
    "PlanWarning",
    "SelectionError",
    "SelectionWarning",
    "TargetWarning",
    "documents",
    "geometry",
    "linear_update",
    "register_optimizer",
    "register_rule",
]


def __dir__() -> list[str]:
    """Return the public names: what else is here are modules."""
    return sorted(__all__)
