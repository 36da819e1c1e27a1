"""The reference of Filter-then-Weight: explicit gradients, plain loops, exact weights.

To learn the method, read the files in this order; each begins with its mathematics::

    gradients.py         what a layer saw and got back, as one gradient per sample
    preconditioning.py   what the optimizer will do with a gradient: P
    similarity.py        what a sample does for the target, and what two share: b and K
    guard.py             how far to trust a small target
    projections.py       where weights may live
    qp.py                the weights
    filters.py           who is kept
    step.py              the whole step

Everything is plain NumPy, compiled by numba as it stands where numba is installed. These are solvers to read; the
package ``ftw_compiled`` solves the problem of ``qp.py`` with the same result in a fraction of the time.
"""

from . import (
    filters,
    forward,
    gradients,
    guard,
    preconditioning,
    projections,
    qp,
    quotas,
    shares,
    similarity,
    step,
)
from ._jit import COMPILED
from .filters import Filtered, boltzmann, greedy_utility, matching, threshold, top_k
from .forward import forward_scores, forward_step
from .guard import shrinkage
from .projections import Box, CappedSimplex, NonNegative, Simplex, project
from .qp import QPSolution, solve_qp
from .quotas import Quota
from .shares import SourceShares
from .similarity import cross_gram, gram, scores
from .status import Status
from .step import Selection, filter_then_weight

__all__ = [
    "COMPILED",
    "Box",
    "CappedSimplex",
    "Filtered",
    "NonNegative",
    "QPSolution",
    "Quota",
    "Selection",
    "Simplex",
    "SourceShares",
    "Status",
    "boltzmann",
    "cross_gram",
    "filter_then_weight",
    "filters",
    "forward",
    "forward_scores",
    "forward_step",
    "gradients",
    "gram",
    "greedy_utility",
    "guard",
    "matching",
    "preconditioning",
    "project",
    "projections",
    "qp",
    "quotas",
    "scores",
    "shares",
    "shrinkage",
    "similarity",
    "solve_qp",
    "step",
    "threshold",
    "top_k",
]
