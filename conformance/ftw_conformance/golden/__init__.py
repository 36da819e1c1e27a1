"""``python -m ftw_conformance golden``: the vectors for ports in other languages."""

from .command import PATH, check, core, load, main, reference

__all__ = ["PATH", "check", "core", "load", "main", "reference"]
