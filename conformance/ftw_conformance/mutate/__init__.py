"""``python -m ftw_conformance mutate``: plant errors in the core, and see whether verify notices."""

from .command import main

__all__ = ["main"]
