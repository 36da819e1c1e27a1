"""Errors made from the source itself: every comparison, operator, constant and clip of the numerical core is a place.

Each place gives one error or two: a comparison loses or gains equality, or is turned round; plus and minus, times and
divided by, and and or take each other's place; a constant is one more (a fraction is twice itself); a ``not``, a minus
sign, an absolute value, a clip, a maximum or minimum is dropped; a ``where`` takes one side everywhere.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator
from pathlib import Path

import ftw

from .mutations import Mutation

__all__ = ["every_mutation", "sampled"]

FOLDERS = (".", "qp", "optimizers")
OTHERS = (  # frameworks, words, files: nothing that verify runs on NumPy
    "__init__.py",
    "_array.py",
    "_check.py",
    "_loops.py",
    "_older.py",
    "_options.py",
    "_pytrees.py",
    "command_line.py",
    "guard_watch.py",
    "spi.py",
    "split_watch.py",
    "status.py",
    "unfilled.py",
)
COMPARED: dict[type[ast.cmpop], tuple[str, ...]] = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
}
SWAPPED: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
}
DROPPED = ("abs", "clip", "maximum", "minimum", "sqrt")  # what is left is the first argument


def every_mutation() -> list[Mutation]:
    """Return every error of the core's arithmetic."""
    home = Path(ftw.__file__).parent
    found = []
    for path in sorted(path for folder in FOLDERS for path in (home / folder).glob("*.py")):
        if path.name not in OTHERS:
            text = path.read_text(encoding="utf-8")
            name = path.relative_to(home).as_posix()
            found += [Mutation(name, text, new, what) for new, what in _of(text)]
    return found


def sampled(count: int, seed: int) -> list[Mutation]:
    """Return some errors, drawn at random without replacement."""
    every = every_mutation()
    return random.Random(seed).sample(every, min(count, len(every)))


def _of(text: str) -> Iterator[tuple[str, str]]:
    """Yield the changed text and a description of each error."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def at(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, (ast.expr, ast.stmt))
        return at(node.lineno, node.col_offset), at(node.end_lineno or 0, node.end_col_offset or 0)

    def changed(node: ast.AST, start: int, end: int, new: str) -> tuple[str, str]:
        assert isinstance(node, ast.expr)
        old = " ".join(text[start:end].split())
        return text[:start] + new + text[end:], f"line {node.lineno}: {old[:40]} -> {new.strip()[:40]}"

    tree = ast.parse(text)
    skipped = _ignored(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Compare):
            left: ast.expr = node.left
            for op, right in zip(node.ops, node.comparators, strict=True):
                for new in COMPARED.get(type(op), ()):
                    yield changed(
                        node, span(left)[1], span(right)[0], _between(text, span(left)[1], span(right)[0], new)
                    )
                left = right
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            _, new = SWAPPED[type(node.op)]
            start, end = span(node.left)[1], span(node.right)[0]
            yield changed(node, start, end, _between(text, start, end, new))
        elif isinstance(node, ast.BoolOp):
            start, end = span(node.values[0])[1], span(node.values[1])[0]
            yield changed(node, start, end, _between(text, start, end, "or" if isinstance(node.op, ast.And) else "and"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub, ast.Invert)):
            start, end = span(node)
            yield changed(node, start, end, "(" + text[slice(*span(node.operand))] + ")")
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
        ):
            value = node.value
            yield changed(
                node, *span(node), repr(value + 1 if isinstance(value, int) or value in (0.0, 1.0) else 2 * value)
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _plain(node):
            word = node.func.attr
            parts = [text[slice(*span(x))] for x in node.args]
            if word in DROPPED:
                yield changed(node, *span(node), f"({parts[0]})")
            elif word == "where" and len(parts) == 3:
                yield changed(node, *span(node), f"xp.broadcast_arrays({parts[1]}, {parts[0]})[0]")
                yield changed(node, *span(node), f"xp.broadcast_arrays({parts[2]}, {parts[0]})[0]")


def _plain(call: ast.Call) -> bool:
    return bool(call.args) and not any(isinstance(x, ast.Starred) for x in call.args)


def _between(text: str, start: int, end: int, new: str) -> str:
    """Return what stands between two operands with another operator, brackets kept."""
    old = text[start:end]
    closing, opening = old[: len(old) - len(old.lstrip(") \n"))], old[len(old.rstrip("( \n")) :]
    return f"{closing} {new} {opening}"


def _ignored(tree: ast.Module) -> set[ast.AST]:
    """Return nodes that are no arithmetic: annotations, messages of errors, defaults of docstrings, imports."""
    out: set[ast.AST] = set()
    for node in ast.walk(tree):
        hidden: list[ast.AST | None] = []
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            hidden.append(node.annotation)
        elif isinstance(node, ast.FunctionDef):
            hidden += [node.returns, *node.decorator_list]
        elif isinstance(node, (ast.Raise, ast.JoinedStr, ast.Assert)):
            hidden.append(node)
        for part in hidden:
            if part is not None:
                out.update(ast.walk(part))
    return out
