"""Conformance: one table of cases, run on any backend against the reference.

    python -m ftw_conformance verify                     # every backend that is installed
    python -m ftw_conformance golden check               # the vectors for ports in other languages
    python -m ftw_conformance mutate                     # does the table notice errors planted in the core?

A backend or an adapter of one's own joins the table with `register_backend` or `register_adapter`
(docs/conformance.md).
"""

from .verify.adapters import Adapter, TrainingStep, per_sample, register_adapter
from .verify.backends import Backend, register_backend
from .verify.known_gaps import GAPS, Gap

__all__ = [
    "GAPS",
    "Adapter",
    "Backend",
    "Gap",
    "TrainingStep",
    "per_sample",
    "register_adapter",
    "register_backend",
]
