"""What the commands share: paths checked before a run, suggestions for mistyped options, tables that fit, interrupts.

Standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

__all__ = [
    "INTERRUPTED",
    "Parser",
    "check_output",
    "nearest",
    "print_table",
    "replay",
    "require",
    "warnings_through",
]

INTERRUPTED = 130  # the exit code after Ctrl-C
PROBE = b"\0" * 65536  # written and taken away again: a full disk is found before a run
PACKAGES = (
    "filter-then-weight", "numpy", "array-api-compat", "array-api-extra", "torch", "jax", "optax", "transformers",
    "trl", "peft", "accelerate", "numba", "scipy", "scikit-learn",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest option where one is mistyped."""

    def error(self, message: str) -> NoReturn:
        """Print the message, with the nearest option, and exit with code 2."""
        unknown = message.removeprefix("unrecognized arguments: ") if "unrecognized" in message else ""
        known = [option for action in self._actions for option in action.option_strings]
        found = {word: near for word in unknown.split() if word.startswith("-") and (near := nearest(word, known))}
        words = "; ".join(f"{word}: did you mean {near}?" for word, near in found.items())
        super().error(message + (f" ({words})" if words else ""))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the name that is most like a mistyped one, None if none is."""
    return next(iter(difflib.get_close_matches(word.partition("=")[0], list(known), n=1)), None)


def require(user: str, *packages: str, extra: str) -> None:
    """Raise an ImportError that names the extra to install, if a package is not installed.

    Parameters
    ----------
    user : str
        Who needs the packages: a module of ours.
    *packages : str
        Names to import.
    extra : str
        The extra of this distribution that brings them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:  # with the name of the module, `python -m` prints the message alone
        raise ImportError(
            f"{user} needs {' and '.join(missing)}, not installed here: pip install 'filter-then-weight[{extra}]'",
            name=user,
        )


def check_output(path: Path, option: str) -> None:
    """Raise an OSError if a file cannot be written, as far as can be known before a run.

    What is there already stays as it is.
    """
    folder = path.parent
    if path.is_dir():
        raise IsADirectoryError(f"{option} {path}: is a folder; give the name of a file in it")
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {path}: there is no folder {folder}")
    if path.exists() and not path.is_file():
        return  # a pipe or a device: to open it may have an effect
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise PermissionError(f"{option} {path}: cannot be written: it, or its folder, is read-only")
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".ftw-", buffering=0) as probe:
            probe.write(PROBE)
    except OSError as error:
        raise OSError(f"{option} {path}: cannot be written ({error.strerror})") from None


@contextlib.contextmanager
def warnings_through(write: Callable[[str], Any]) -> Iterator[None]:
    """Print warnings by ``write``, a line each, so that they do not tear a progress bar."""

    def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
        write(f"{category.__name__}: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def replay(program: str, given: Sequence[str] | None, options: argparse.Namespace) -> dict[str, Any]:
    """Return what is needed to run a command again: its words, all of its options, and the versions of packages."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    words = sys.argv[1:] if given is None else given
    return {
        "command": f"{program} {shlex.join(words)}".rstrip(),
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def print_table(rows: Sequence[Sequence[str]], *, file: Any = None) -> None:
    """Print rows of text in columns, the first to the left.

    A table that is wider than the terminal (80 columns where there is none) goes on in a second block below, with its
    first column again.
    """
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    room = shutil.get_terminal_size((80, 24)).columns
    blocks: list[list[int]] = [[]]
    for i in range(1, len(widths)):
        used = widths[0] + sum(widths[j] + 2 for j in blocks[-1])
        if blocks[-1] and used + 2 + widths[i] > room:
            blocks.append([])
        blocks[-1].append(i)
    for place, block in enumerate(blocks):
        if place:
            print(file=file)
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in block)]
            print("  ".join(cells).rstrip(), file=file)
