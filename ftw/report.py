"""A run's record, and the page made from it. Standard library only.

The record is a file of JSON lines, only ever appended to, one line a step; a process that is killed costs at most the
line it was writing. Kinds of lines:

- ``header``: format, version, title, anything else that holds for the whole record;
- ``run``: name, method, seed, anything else about one run;
- ``step``: run, step, and any of ``loss``, ``target_loss``, ``watch_loss`` (of a second target split), ``test_loss``,
  ``grad_norm``, ``match``, ``effective_size``, ``shrinkage``, ``status``, ``seconds`` (a number, or parts by name),
  ``pool`` (samples by source), and ``picked`` and ``refused``: lists of samples, each with any of ``index``,
  ``weight``, ``score``, ``loss``, ``source``, ``length``, ``text``, and ``id``, the same wherever a sample comes up.
  ``offered`` has columns over the whole pool: ``id``, ``length``.

The text of samples is left out unless asked for. ``python -m ftw.report run.jsonl`` makes the page: one HTML file
without scripts or references, in which everything that comes from the data is escaped.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ._page import render
from ._record import Record, Recorder, Run, describe, read
from ._summary import Summary, paired, summarise, table

__all__ = ["Record", "Recorder", "Run", "Summary", "describe", "paired", "read", "render", "summarise", "table"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page of one or several records."""
    parser = argparse.ArgumentParser(prog="python -m ftw.report", description="Make a page from the record of a run.")
    parser.add_argument("records", nargs="+", metavar="run.jsonl", help="records, shown together")
    parser.add_argument("-o", "--output", metavar="page.html", help="the page (default: beside the first record)")
    options = parser.parse_args(arguments)
    output = Path(options.output or Path(options.records[0]).with_suffix(".html"))
    try:
        if any(output.resolve() == Path(path).resolve() for path in options.records):
            raise ValueError(f"{output}: is a record itself; give another name with -o")
        write(read(*options.records), output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def write(record: Record, path: str | os.PathLike[str]) -> None:
    """Write the page of a record, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(render(record), encoding="utf-8", errors="replace")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
