"""Filter-then-Weight in the Hugging Face Trainer and in TRL's trainers."""

from .mixin import FilterThenWeightMixin, FilterThenWeightTrainer

__all__ = ["FilterThenWeightMixin", "FilterThenWeightTrainer"]
