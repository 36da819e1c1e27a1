"""``python -m ftw_conformance verify``: one table of cases, run on every backend against the reference."""

from .command import main, verify

__all__ = ["main", "verify"]
