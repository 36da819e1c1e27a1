"""The options of a selection: one frozen record, checked as a whole when `filter_then_weight` is called."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ftw import Quota, Simplex, SourceShares
from ftw.constraints import Constraint
from ftw.filters import Filter, FilterName
from ftw.geometry import Operator
from ftw.spi import check_options

__all__ = ["CaptureName", "Fill", "Geometry", "Options", "Score", "Weight"]

Weight = Literal["qp", "uniform"]
Fill = Literal["raise", "relax"]
Score = Literal["exact", "forward"]
CaptureName = Literal["auto", "dense", "factors"]
Geometry = Callable[[Any, Any, Any], Mapping[str, Operator]]
_WHAT = "filter_then_weight"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a step selects; each option is described where a user gives it, in `ftw_jax.filter_then_weight`."""

    keep: int
    filter: FilterName | Filter = "matching"
    weight: Weight = "qp"
    constraint: Constraint = Simplex(1.0)  # noqa: RUF009
    ridge: Any = 0.05
    shortlist: int | float | None = 0.5
    solver: Callable[..., Any] | None = None
    guard: float = 0.3
    damping: float = 0.1
    capture: CaptureName = "auto"
    micro_batch: int | None = None
    geometry: Geometry | None = None
    linearise: bool = False
    quota: Quota | None = None
    fill: Fill = "raise"
    explain: bool = False
    score: Score = "exact"
    train_on_target: float = 0.0

    def __post_init__(self) -> None:
        """Raise what is wrong with the options, by name."""
        if not isinstance(self.keep, int) or isinstance(self.keep, bool):
            raise TypeError(f"{_WHAT}: keep must be an int, got {type(self.keep).__name__}")
        if self.keep < 1:
            raise ValueError(f"{_WHAT}: keep={self.keep} must be at least 1")
        for name, kind in {"fill": Fill, "score": Score, "capture": CaptureName}.items():
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{_WHAT}: {name}={getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        for name in ("linearise", "explain"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{_WHAT}: {name} must be a bool, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.damping, (int, float)) or not 0 <= self.damping < math.inf:
            raise ValueError(f"{_WHAT}: damping={self.damping!r} must be a finite number, not negative")
        if self.micro_batch is not None and (type(self.micro_batch) is not int or self.micro_batch < 1):
            raise ValueError(f"{_WHAT}: micro_batch={self.micro_batch!r} must be an int of at least 1, or None")
        if self.geometry is not None and not callable(self.geometry):
            raise TypeError(f"{_WHAT}: geometry must be a function (params, opt_state, gradient) -> {{name: operator}}")
        if self.solver is not None and not callable(self.solver):
            raise TypeError(f"{_WHAT}: solver is a {type(self.solver).__name__}; expected a callable like ftw.solve_qp")
        share = self.train_on_target
        if not isinstance(share, (int, float)) or isinstance(share, bool) or not 0 <= share <= 1:
            raise ValueError(f"{_WHAT}: train_on_target={share!r} must be a number in [0, 1]")
        if self.quota is not None and not isinstance(self.quota, Quota):
            raise TypeError(f"{_WHAT}: quota must be ftw.Quota(sources, at_least, at_most), got {self.quota!r}")
        self._check_choice()

    def _check_choice(self) -> None:
        """Raise what `ftw.filter_then_weight` refuses in any pool; sources are checked with the pool that has them."""
        constraint = self.constraint
        lengths: list[int] = []
        if isinstance(constraint, SourceShares):
            constraint = Simplex(constraint.total)
        elif isinstance(constraint, tuple):
            shapes = [tuple(getattr(bound, "shape", ())) for bound in constraint]
            lengths = [shape[0] for shape in shapes if shape]
        n = max(lengths, default=max(self.keep, 2**20))
        check_options(n, self.keep, self.filter, self.weight, constraint, self.ridge, self.shortlist, self.guard)

    @property
    def choice(self) -> dict[str, Any]:
        """The options of `ftw.spi.choose`, but for the guard."""
        names = ("keep", "filter", "weight", "constraint", "ridge", "shortlist", "solver", "quota", "fill", "explain")
        return {name: getattr(self, name) for name in names}
