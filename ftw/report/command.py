"""``python -m ftw.report run.jsonl``: make the page of one or several records."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .page import write
from .record import read

__all__ = ["main"]


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
