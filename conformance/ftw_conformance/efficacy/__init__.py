"""``python -m ftw_conformance efficacy``: how well it selects, where, and against what."""

from .command import main

__all__ = ["main"]
