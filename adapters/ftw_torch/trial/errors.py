"""What stops a trial before it starts."""

from __future__ import annotations

__all__ = ["TrialError"]


class TrialError(ValueError):
    """The trial cannot be run as it was asked for; the message names the reason and the remedy."""
