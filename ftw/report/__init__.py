"""A run's record, and the page made from it. Standard library only.

The record is a file of JSON lines, only ever appended to, one line a step; a process that is killed costs at most the
line it was writing. Kinds of lines:

- ``header``: format, version, title, anything else that holds for the whole record;
- ``run``: name, method, seed, anything else about one run;
- ``step``: run, step, and any of ``loss``, ``target_loss``, ``watch_loss`` (of a second target split), ``test_loss``,
  ``grad_norm``, ``match``, ``effective_size``, ``shrinkage``, ``status``, ``seconds`` (a number, or parts by name),
  ``pool`` (samples by source), and ``picked`` and ``refused``: lists of samples, each with any of ``index``,
  ``weight``, ``score``, ``loss``, ``source``, ``length``, ``text``, and ``id``, the same wherever a sample comes up.
  ``offered`` has columns over the whole pool: ``id``, ``length``. ``decisions`` says why each candidate was picked or
  refused, compressed (`decisions` makes it from a selection with reasons).

The text of samples is left out unless asked for. ``python -m ftw.report run.jsonl`` makes the page: one HTML file that
refers to nothing, in which everything that comes from the data is escaped; its one script draws the decisions.
``python -m ftw.report run.jsonl --why ID --step N`` prints what a step decided about a sample.
"""

from .command import main
from .decisions import Decision, decisions, history, why
from .page import render, write
from .record import Record, Recorder, RecordWarning, Run, describe, read
from .scalars import log_scalars, scalars
from .summary import Summary, paired, summarise, table

__all__ = [
    "Decision",
    "Record",
    "RecordWarning",
    "Recorder",
    "Run",
    "Summary",
    "decisions",
    "describe",
    "history",
    "log_scalars",
    "main",
    "paired",
    "read",
    "render",
    "scalars",
    "summarise",
    "table",
    "why",
    "write",
]
