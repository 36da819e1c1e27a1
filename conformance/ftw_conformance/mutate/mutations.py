"""Deliberate errors, as data: where, what stands there, what is put in its place, and what that would mean.

Each must be caught by ``verify`` on the NumPy backend. The text on the left must occur in the file exactly once. An
error whose text is gone, or no longer says which place it means, is reported as stale, which is a failure too.
"""

from __future__ import annotations

from .mutation import Mutation
from .mutations_choice import CHOICE
from .mutations_optimizers import OPTIMIZERS
from .mutations_products import PRODUCTS
from .mutations_weights import WEIGHTS

__all__ = ["MUTATIONS", "Mutation"]

MUTATIONS: list[Mutation] = [*PRODUCTS, *OPTIMIZERS, *WEIGHTS, *CHOICE]
