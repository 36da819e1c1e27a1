"""``python -m ftw_conformance golden``: the vectors for ports in other languages."""

from .command import main

__all__ = ["main"]
