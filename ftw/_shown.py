"""How a selection is shown: a line, and a table of the picks for notebooks. Within a trace there are no values."""

from __future__ import annotations

import html
from typing import Any

from .status import Status

__all__ = ["figures", "line", "table"]

FIGURES = ("match", "effective_size", "predicted_decrease", "shrinkage", "target_loss")


def figures(selection: Any) -> dict[str, float]:
    """Return the selection's numbers by name, those that are there."""
    found = {name: getattr(selection, name) for name in FIGURES}
    return {name: float(value) for name, value in found.items() if value is not None}


def line(selection: Any) -> str:
    """Return a selection in one line."""
    kept, total = (_size(x) for x in (selection.indices, selection.scores))
    try:
        words = [f"{name}={value:.4g}" for name, value in figures(selection).items()]
        words.append(f"status={_status(selection)}")
    except Exception:  # a trace, or several selections side by side
        words = [f"match={selection.match!r}", f"status={selection.status!r}"]
    return f"Selection({kept} of {total}, {', '.join(words)})"


def table(selection: Any) -> str:
    """Return the line and a table of the picks, as HTML."""
    shown = f"<code>{html.escape(line(selection))}</code>"
    try:
        columns: dict[str, list[Any]] = {
            "index": selection.indices.tolist(),
            "weight": [f"{w:.4g}" for w in selection.weights.tolist()],
        }
        for name, values in (("score", selection.scores), ("loss", selection.losses)):
            if values is not None:
                every = values.tolist()
                columns[name] = [f"{every[i]:.4g}" for i in columns["index"]]
    except Exception:
        return shown
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = (
        "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in zip(*columns.values(), strict=True)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f"{shown}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _status(selection: Any) -> str:
    code = int(selection.status)
    return Status(code).name if code in {int(s) for s in Status} else str(code)


def _size(x: Any) -> Any:
    shape = getattr(x, "shape", None)
    return shape[-1] if shape else "?"
