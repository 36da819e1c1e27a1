"""A deliberate error, as data."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Mutation", "errors_in"]


class Mutation(NamedTuple):
    """One deliberate error."""

    file: str
    old: str
    new: str
    what: str


def errors_in(file: str, *errors: tuple[str, str, str]) -> list[Mutation]:
    """Return errors of one file."""
    return [Mutation(file, *error) for error in errors]
