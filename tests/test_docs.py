"""The pages hold: every block of code runs, prints what stands below it, and every command and name exists."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: what stands behind the fence, its lines, and where they begin."""

    info: str
    body: str
    line: int


def blocks(page):
    text = page.read_text(encoding="utf-8")
    return [Block(m["info"].strip(), m["body"], text.count("\n", 0, m.start()) + 1) for m in FENCE.finditer(text)]


def absent(info):
    """Return what a block marked ``python needs: a, b`` needs and this machine lacks."""
    needs = [name.strip() for name in info.partition("needs:")[2].split(",") if name.strip()]
    return [name for name in needs if not available(name)]


def available(name):
    if name == "gpu":
        return importlib.import_module("torch").cuda.is_available()
    return importlib.util.find_spec(name) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space = {"__name__": f"docs_{page.stem}"}
    skipped, printed = [], None
    for block in blocks(page):
        language = block.info.split(" ")[0]
        if language == "python":
            if missing := absent(block.info):
                skipped.append(f"line {block.line} needs {', '.join(missing)}")
                printed = None
                continue
            code = compile("\n" * block.line + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
                exec(code, space)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            assert printed.split() == block.body.split(), f"{page.name}, line {block.line}: printed\n{printed}"
            printed = None
    if skipped:
        pytest.skip(f"{page.name}: {'; '.join(skipped)}")
