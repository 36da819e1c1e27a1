"""The options of a selector: one frozen record, checked as a whole when the selector is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ftw import Quota, Simplex, SourceShares
from ftw.constraints import Constraint
from ftw.filters import Filter, FilterName
from ftw.sketch import LARGEST
from ftw.spi import check_options, needs_gram
from ftw_torch.step.sources import Grouped, check_grouped, grouped

__all__ = ["CaptureName", "Fill", "FilterName", "Mode", "OnNonfinite", "Options", "Score", "Weight", "check_count"]

Weight = Literal["qp", "uniform"]
OnNonfinite = Literal["raise", "drop"]
Fill = Literal["raise", "relax"]
Mode = Literal["auto", "one_pass", "two_pass"]
Score = Literal["exact", "forward"]
CaptureName = Literal["learned", "discover"]


def check_count(value: Any, name: str, expected: str = "an int >= 1") -> None:
    """Raise unless ``value`` is an int of at least one."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be {expected}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a selector chooses; each option is described where a user gives it, in `FilterThenWeight`."""

    keep: int
    filter: FilterName | Filter = "matching"
    weight: Weight = "qp"
    constraint: Constraint = Simplex(1.0)  # noqa: RUF009
    ridge: float = 0.05
    shortlist: int | float | None = 0.5
    solver: Callable[..., Any] | None = None
    guard: float = 0.3
    damping: float = 0.1
    micro_batch: int | None = None
    on_nonfinite: OnNonfinite = "raise"
    mode: Mode = "auto"
    memory_budget: int | None = None
    gram_sketch: int | None = None
    score: Score = "exact"
    score_step: float | None = None
    train_on_target: float = 0.0
    sources: str | None = None
    quota: Quota | None = None
    fill: Fill = "raise"
    explain: bool = False
    capture: CaptureName = "discover"

    def __post_init__(self) -> None:
        """Raise what is wrong with the options, by name."""
        check_count(self.keep, "keep")
        literals = {
            "on_nonfinite": OnNonfinite,
            "mode": Mode,
            "score": Score,
            "fill": Fill,
            "capture": CaptureName,
            "explain": Literal[True, False],
        }
        for name, allowed in ((name, get_args(kind)) for name, kind in literals.items()):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")
        for name in ("micro_batch", "memory_budget", "gram_sketch"):
            if (value := getattr(self, name)) is not None:
                check_count(value, name, "an int >= 1 or None")
        if self.gram_sketch is not None and self.gram_sketch > LARGEST:
            raise ValueError(f"gram_sketch={self.gram_sketch} must be at most {LARGEST}")
        if not isinstance(self.damping, (int, float)) or not 0.0 <= self.damping < math.inf:
            raise ValueError(f"damping={self.damping!r} must be a finite number >= 0")
        if self.score_step is not None and not (_is_number(self.score_step) and 0.0 < self.score_step < math.inf):
            raise ValueError(f"score_step={self.score_step!r} must be a finite number > 0, or None")
        if not (_is_number(self.train_on_target) and 0.0 <= self.train_on_target <= 1.0):
            raise ValueError(f"train_on_target={self.train_on_target!r} must be a number in [0, 1]")
        if self.solver is not None and not callable(self.solver):
            raise TypeError(f"solver is a {type(self.solver).__name__}; expected a callable like ftw.solve_qp, or None")
        check_grouped(self.quota, self.constraint, self.sources)
        self.shortlist_of(max(self._bounds(), default=max(self.keep, 2**20)))

    def shortlist_of(self, n: int, keep: int | None = None) -> int:
        """Return how many of a pool of n go on to the Gram matrix; raise what is wrong with the options."""
        return check_options(
            n,
            self.keep if keep is None else keep,
            self.filter,
            self.weight,
            Simplex(self.constraint.total) if isinstance(self.constraint, SourceShares) else self.constraint,
            self.ridge,
            self.shortlist,
            self.guard,
        )

    def gram_of(self, n: int, keep: int | None = None) -> int:
        """Return of how many of the best by score the choice needs the Gram matrix; 0 for none."""
        go_on = self.shortlist_of(n, keep)
        if needs_gram(self.filter):
            return go_on
        return (self.keep if keep is None else keep) if self.weight == "qp" else 0

    @property
    def choice(self) -> dict[str, Any]:
        """The options of `ftw.spi.choose`, but for ``keep`` and ``solver``."""
        names = ("filter", "weight", "constraint", "ridge", "shortlist", "guard", "fill", "explain")
        return {name: getattr(self, name) for name in names}

    def _bounds(self) -> list[int]:
        """Return the lengths of bounds that are given one a candidate."""
        shapes = [tuple(getattr(bound, "shape", ())) for bound in self.constraint] if self._bounded() else []
        return [shape[0] for shape in shapes if shape]

    def grouped(self, pool: Any, n: int) -> Grouped | None:
        """Return the quota and the constraint with the sources of a pool of n, None if neither knows sources."""
        return grouped(self.quota, self.constraint, self.sources, pool, n)

    def _bounded(self) -> bool:
        return isinstance(self.constraint, tuple) and not isinstance(self.constraint, SourceShares)


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)
