"""What a call reached: an integer that survives a trace, with a message for people."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Status"]


class Status(IntEnum):
    """The outcome of a solve or a selection; arrays carry it as int32.

    OK, NOTHING_USEFUL, NOT_FINITE, INFEASIBLE, NOT_PSD, MAX_STEPS.

    Examples
    --------
    >>> Status(2).message
    'the input holds a NaN or an infinity, or products of it leave the range of their dtype'
    """

    OK = 0
    NOTHING_USEFUL = 1
    NOT_FINITE = 2
    INFEASIBLE = 3
    NOT_PSD = 4
    MAX_STEPS = 5

    @property
    def message(self) -> str:
        """One sentence that says what happened."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.OK: "solved",
    Status.NOTHING_USEFUL: "no candidate has a positive score: the weights are uniform over the best scores",
    Status.NOT_FINITE: "the input holds a NaN or an infinity, or products of it leave the range of their dtype",
    Status.INFEASIBLE: "the constraint set is empty, or the filter's picks are not distinct candidates",
    Status.NOT_PSD: "the matrix is indefinite, beyond what rounding explains",
    Status.MAX_STEPS: "the steps ran out before the tolerance was met: the weights are the best found",
}
