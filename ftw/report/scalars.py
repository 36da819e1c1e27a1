"""A selection's numbers for TensorBoard, Weights & Biases or any log, in a loop without a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftw._shown import figures

if TYPE_CHECKING:
    from ftw.choice import Selection

__all__ = ["log_scalars", "scalars"]


def scalars(selection: Selection, *, prefix: str = "ftw/") -> dict[str, float]:
    """Return the numbers of a selection by name: match, effective size, predicted decrease, shrinkage, target loss.

    Parameters
    ----------
    selection : Selection
        Of a step.
    prefix : str
        Put before each name.

    Returns
    -------
    dict of str to float
        What the selection has; also ``status``, as a number.
    """
    return {f"{prefix}{name}": value for name, value in {**figures(selection), "status": int(selection.status)}.items()}


def log_scalars(writer: Any, selection: Selection, step: int, *, prefix: str = "ftw/") -> None:
    """Write a selection's numbers to TensorBoard or Weights & Biases.

    Parameters
    ----------
    writer : SummaryWriter or run
        Anything with ``add_scalar(name, value, step)`` (TensorBoard), or with ``log(values, step=step)`` (a run of
        Weights & Biases).
    selection : Selection
        Of the step.
    step : int
        Its number.
    prefix : str
        Put before each name.

    Raises
    ------
    TypeError
        If the writer has neither method.
    """
    values = scalars(selection, prefix=prefix)
    if hasattr(writer, "add_scalar"):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
    elif hasattr(writer, "log"):
        writer.log(values, step=step)
    else:
        raise TypeError(f"log_scalars: {type(writer).__name__} has neither add_scalar nor log; use scalars(selection)")
