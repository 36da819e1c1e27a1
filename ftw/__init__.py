"""Filter-then-Weight: online data selection and reweighting that matches the optimizer's real update.

Pure functions of arrays of any namespace of the Python array API standard (numpy, torch, jax, ...). Importing this
package loads none of them.
"""

from . import filters, guard, optimizers, sketch
from .constraints import Box, CappedSimplex, NonNegative, Simplex, SourceShares
from .filters import Filtered, resample
from .forward_scores import forward_scores, forward_step
from .geometry import Diagonal, Kronecker, Polar, Rotated, Scale
from .gradients import Dense, OuterProduct, Packed, PackedRows, Rows, Sum, combine, take
from .inner_products import cross_gram, gram, scores
from .optimizers import LinearUpdate
from .qp import QPSolution, solve_qp
from .quotas import Quota
from .reasons import Reason, Reasons
from .selection import Selection, filter_then_weight
from .status import Status

__version__ = "0.1.0"

__all__ = [
    "Box",
    "CappedSimplex",
    "Dense",
    "Diagonal",
    "Filtered",
    "Kronecker",
    "LinearUpdate",
    "NonNegative",
    "OuterProduct",
    "Packed",
    "PackedRows",
    "Polar",
    "QPSolution",
    "Quota",
    "Reason",
    "Reasons",
    "Rotated",
    "Rows",
    "Scale",
    "Selection",
    "Simplex",
    "SourceShares",
    "Status",
    "Sum",
    "combine",
    "cross_gram",
    "filter_then_weight",
    "filters",
    "forward_scores",
    "forward_step",
    "gram",
    "guard",
    "optimizers",
    "resample",
    "scores",
    "sketch",
    "solve_qp",
    "take",
]
