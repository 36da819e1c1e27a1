"""What a step raises and warns of, so that a loop can catch or silence each kind by name."""

from __future__ import annotations

from collections.abc import Iterable

from ftw import Status

__all__ = [
    "BatchingWarning",
    "CaptureWarning",
    "NonFiniteError",
    "PlanWarning",
    "SelectionError",
    "SelectionWarning",
    "TargetWarning",
]


class SelectionError(RuntimeError):
    """A step found no selection; ``.grad`` is as it was.

    Attributes
    ----------
    status : ftw.Status or None
        The status of the choice, where one was made.
    samples : tuple of int
        The samples to blame, as numbers in the pool (or in the target, as the message says).
    parameters : tuple of str
        The parameters to blame.
    """

    def __init__(
        self,
        message: str,
        *,
        status: Status | None = None,
        samples: Iterable[int] = (),
        parameters: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.samples, self.parameters = status, tuple(samples), tuple(parameters)


class NonFiniteError(SelectionError, FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


class SelectionWarning(UserWarning):
    """Any warning of a selector."""


class CaptureWarning(SelectionWarning):
    """A parameter is captured by a slow route: exact, one backward a sample."""


class PlanWarning(SelectionWarning):
    """The learned plan of a model failed where discovery did not, which takes its place."""


class TargetWarning(SelectionWarning):
    """The target cannot be judged, or looks memorised."""


class BatchingWarning(SelectionWarning):
    """A sample's loss or gradient depends on the batch that it comes in."""
