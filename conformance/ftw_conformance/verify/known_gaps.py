"""What is known not to work, as data: a case, a backend, a reason, and the day on which it must be closed.

A case that fails and is listed here is reported as a known gap and does not fail the run, until the day is past: then
it does. A gap whose case passes is reported as closed, so that it can be taken off the list.
"""

from __future__ import annotations

import datetime
from fnmatch import fnmatchcase
from typing import NamedTuple

__all__ = ["GAPS", "Gap", "find"]


class Gap(NamedTuple):
    """One thing that is known not to work."""

    case: str  # pattern of case names, as in a shell
    backend: str  # pattern of backend names
    dtype: str  # pattern of dtypes
    reason: str
    expires: datetime.date


GAPS: list[Gap] = []


def find(case: str, backend: str, dtype: str, gaps: list[Gap] | None = None) -> Gap | None:
    """Return the first gap that names this case on this backend."""
    for gap in GAPS if gaps is None else gaps:
        names = ((case, gap.case), (backend, gap.backend), (dtype, gap.dtype))
        if all(fnmatchcase(name, pattern) for name, pattern in names):
            return gap
    return None
