"""``python -m ftw.report run.jsonl``: make the page of one or several records, or say why a sample was refused."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ftw.command_line import Parser, check_output

from .decisions import why
from .page import write
from .record import read

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the page of one or several records, or print what was decided about one sample."""
    parser = Parser(prog="python -m ftw.report", description="Make a page from the record of a run.")
    parser.add_argument("records", nargs="+", metavar="run.jsonl", help="records, shown together")
    parser.add_argument("-o", "--output", metavar="page.html", help="the page (default: beside the first record)")
    parser.add_argument("--why", metavar="ID", help="print what was decided about this sample, and make no page")
    parser.add_argument("--step", type=int, metavar="N", help="with --why: of this step alone")
    parser.add_argument("--run", metavar="NAME", help="with --why: of this run alone")
    options = parser.parse_args(arguments)
    if options.why is not None:
        try:
            lines = why(read(*options.records), options.why, step=options.step, run=options.run)
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        for line in lines:
            print(printable(line))
        return 0
    output = Path(options.output or Path(options.records[0]).with_suffix(".html"))
    try:
        if any(output.resolve() == Path(path).resolve() for path in options.records):
            raise ValueError(f"{output}: is a record itself; give another name with -o")
        check_output(output, "-o")
        write(read(*options.records), output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


def printable(text: str) -> str:
    """Return the text without what would steer a terminal: names in a record are not trusted."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
