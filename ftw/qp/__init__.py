"""The weights: a small quadratic program over a constraint set, solved exactly."""

from .solve import QPSolution, solve_qp

__all__ = ["QPSolution", "solve_qp"]
