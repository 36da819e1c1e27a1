"""A user's own text: files and folders read with care, for what is found in a folder may be anything."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Skipped", "TextError", "read_files"]

MAX_FILE = 4 * 2**20  # bytes read of one file
MAX_TOTAL = 64 * 2**20  # bytes read of all of them
MAX_FILES = 10_000


class TextError(ValueError):
    """There is no text, or too little of it, for an experiment."""


class Skipped(NamedTuple):
    """A path that was left out, wholly or in part, and why."""

    path: str
    reason: str


def read_files(
    paths: Iterable[str | os.PathLike[str]], *, reserved: Iterable[str] = ()
) -> tuple[dict[str, bytes], list[Skipped]]:
    """Read text files and folders of text files, in any encoding.

    Only regular files are opened. In folders, names that start with a dot and symbolic links are passed over; at most
    `MAX_FILE` bytes of a file and `MAX_TOTAL` in all are taken.

    Parameters
    ----------
    paths : iterable of path
    reserved : iterable of str
        Labels that are taken already.

    Returns
    -------
    texts : dict of str to bytes
        By path argument: the last part of its name, with a number if two have the same.
    skipped : list of Skipped
        What was left out, and why.

    Raises
    ------
    TextError
        If an argument has no text to offer.
    """
    texts: dict[str, bytes] = {}
    taken = set(reserved)
    skipped: list[Skipped] = []
    room, files = MAX_TOTAL, MAX_FILES
    for argument in map(Path, paths):
        parts = []
        for path in _walk(argument, skipped):
            if room <= 0 or files <= 0:
                skipped.append(
                    Skipped(_shown(path), f"and all that follows: over {MAX_TOTAL >> 20} MiB or {MAX_FILES} files")
                )
                break
            found = _read(path, min(MAX_FILE, room))
            if isinstance(found, str):
                skipped.append(Skipped(_shown(path), found))
                continue
            text, more = found
            if more:
                skipped.append(Skipped(_shown(path), f"only the first {len(text):,} bytes are used"))
            parts.append(text)
            room, files = room - len(text), files - 1
        if not parts:
            why = "; ".join(f"{path}: {reason}" for path, reason in skipped[-5:]) or "nothing in it"
            raise TextError(f"{_shown(argument)}: no text to read ({why})")
        label = name = _shown(argument.resolve().name) or "root"
        while label in taken:
            label = f"{name} {len(taken)}"
        taken.add(label)
        texts[label] = b"\n".join(parts)
    return texts, skipped


def _walk(argument: Path, skipped: list[Skipped]) -> Iterator[Path]:
    """Yield the argument, or what a folder holds, in sorted order; note what is passed over."""
    if not argument.is_dir():
        yield argument
        return

    def refuse(error: OSError) -> None:
        skipped.append(Skipped(_shown(error.filename), error.strerror or "cannot be listed"))

    for folder, folders, names in os.walk(argument, onerror=refuse):
        folders.sort()
        for name in sorted([*folders, *names]):
            path = Path(folder, name)
            if reason := "hidden" if name.startswith(".") else "a symbolic link" if path.is_symlink() else "":
                skipped.append(Skipped(_shown(path), reason))
            elif name not in folders:
                yield path
        folders[:] = [name for name in folders if not name.startswith(".")]


def _shown(path: str | Path) -> str:
    """Return a path as text that can be printed: control characters and bytes that are no UTF-8 become escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _read(path: Path, limit: int) -> tuple[bytes, bool] | str:
    """Return the first bytes of a text file and whether there are more, or the reason why it is skipped."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # before opening: to open a device may do something
            return "not a regular file"
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(path, flags), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # and after: it may have been exchanged
                return "not a regular file"
            text = file.read(limit + 1)
    except OSError as error:
        return error.strerror or "cannot be read"
    if not text.strip():
        return "empty"
    if b"\0" in text and not text.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")):
        return "binary: it holds zero bytes"
    return text[:limit], len(text) > limit
