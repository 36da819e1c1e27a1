"""What adapters and ports build on, beyond the names that users call. As stable as those.

The choice without gradients
    `choose` takes scores and the inner products that it requires (`Products`), and makes the choice of
    `ftw.filter_then_weight`; `strata` says of which candidates the guard's mean of the pool is formed;
    `check_options` raises what is wrong with the options; `needs_gram` says whether a filter takes the Gram matrix, and
    `NAMED` is the table of the filters with a name. `shortlist_order` says which candidates go on to the Gram
    matrix, `unfilled` why no choice obeys the bounds on sources, and `as_count` a bound of a source as a count.
Inner products
    `squared_norms`, ``<g_i, P g_i>`` of each sample.
Arrays of any namespace
    `namespace` of arrays, `cast` between dtypes, `leaves` of a nested structure, `device` of an array,
    `scalar_like` an array, `pick` a value by whether the namespace traces.
Geometry
    `correction`, the bias correction of a running mean; `Gains`, slopes of an operator's spectrum; `Record`,
    `Operator`, `Constraint` and `Filter`, the unions of types; `matrix_shape`, a parameter as a matrix.
Watching a run
    `GuardWatch` and `SplitWatch`, numbers in, warnings out.
"""

from ._array import cast, device, leaves, namespace, pick, scalar_like
from ._named_filters import NAMED, needs_gram
from .choice import Products, check_options, choose, shortlist_order, strata
from .constraints import Constraint
from .filters import Filter
from .geometry import Gains, Operator
from .gradients import Record, matrix_shape
from .guard_watch import GuardWatch
from .inner_products import squared_norms
from .optimizers._update import correction, inverse_root
from .quotas import as_count
from .split_watch import SplitWatch
from .unfilled import unfilled

__all__ = [
    "NAMED",
    "Constraint",
    "Filter",
    "Gains",
    "GuardWatch",
    "Operator",
    "Products",
    "Record",
    "SplitWatch",
    "as_count",
    "cast",
    "check_options",
    "choose",
    "correction",
    "device",
    "inverse_root",
    "leaves",
    "matrix_shape",
    "namespace",
    "needs_gram",
    "pick",
    "scalar_like",
    "shortlist_order",
    "squared_norms",
    "strata",
    "unfilled",
]
