"""PyTorch adapter of Filter-then-Weight: one line where ``loss.backward()`` stood."""

from .optim.geometry import geometry, linear_update, register_optimizer
from .selector import FilterThenWeight

__all__ = ["FilterThenWeight", "geometry", "linear_update", "register_optimizer"]
