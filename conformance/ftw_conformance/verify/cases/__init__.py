"""The table of cases, a file for each part of the core."""

from __future__ import annotations

from ftw_conformance.verify.table import Case, Refusal

__all__ = ["every_case"]


def every_case() -> list[Case | Refusal]:
    """Return the whole table; names are unique."""
    from . import (
        choices,
        forward,
        plans,
        products,
        projections,
        refusals,
        selections,
        sketches,
        sources,
        updates,
        weights,
    )

    parts = (
        products,
        weights,
        choices,
        updates,
        selections,
        forward,
        sketches,
        refusals,
        plans,
        projections,
        sources,
    )
    table = [case for part in parts for case in part.cases()]
    names = [case.name for case in table]
    assert len(set(names)) == len(names), sorted(n for n in names if names.count(n) > 1)
    return table
