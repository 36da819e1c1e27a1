"""The pages hold: every block of code runs, prints what stands below it, and every command and name exists."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from ftw_conformance.__main__ import COMMANDS
from ftw_conformance.verify import adapters, backends

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
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


def run(page, *, slow):
    """Run the blocks of a page in one namespace; return why some were left out."""
    space = {"__name__": f"docs_{page.stem}"}
    skipped, printed = [], None
    for block in blocks(page):
        language, _, marks = block.info.partition(" ")
        if language == "python":
            missing = absent(marks)
            if missing or ("slow" in marks and not slow):
                skipped.append(f"line {block.line} needs {', '.join(missing) or 'make test-slow'}")
                printed = None
                continue
            code = compile("\n" * block.line + block.body, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
                if "needs:" in marks:  # other packages warn of each other
                    warnings.simplefilter("ignore")
                exec(code, space)
            printed = out.getvalue()
        elif language == "text" and printed is not None:
            assert printed.split() == block.body.split(), f"{page.name}, line {block.line}: printed\n{printed}"
            printed = None
    return skipped


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What a page registers is gone after it."""
    monkeypatch.setattr(backends, "_factories", dict(backends._factories))
    monkeypatch.setattr(adapters, "_adapters", dict(adapters._adapters))
    monkeypatch.setattr(adapters, "_compiling", set(adapters._compiling))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if skipped := run(page, slow=False):
        pytest.skip(f"{page.name}: {'; '.join(skipped)}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "```python slow" in page.read_text()], ids=lambda p: p.stem)
def test_the_slow_blocks_too(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not run(page, slow=True)


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "numpydoc", "furo", "latex2mathml"):
        pytest.importorskip(package, reason="make docs installs it")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", "-d", tmp_path / "trees", ROOT / "docs"]
    done = subprocess.run([*command, tmp_path / "html"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_figure_of_the_method_is_what_its_script_draws():
    numbers = re.compile(r"-?\d+(?:\.\d+)?")
    drawn = runpy.run_path(str(ROOT / "docs/method_figure.py"))["figure"]()
    kept = (ROOT / "docs/_static/method.svg").read_text(encoding="utf-8")
    assert numbers.sub("#", drawn) == numbers.sub("#", kept)
    assert [float(x) for x in numbers.findall(drawn)] == pytest.approx(
        [float(x) for x in numbers.findall(kept)], abs=0.2
    )


def test_every_link_between_files_leads_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not link.startswith("http") and "generated" not in link:  # Sphinx makes the pages of the API
                assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_files_and_commands_that_are_named_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"`((?:tests|examples|docs|ftw|adapters|reference|conformance)/[\w/]+\.\w+)`", text):
            assert (ROOT / path).exists(), f"{page.name} names {path}"
        for target in re.findall(r"(?:\$ |`)make ([a-z0-9-]+)", text):
            assert target in targets, f"{page.name}: make {target}"
        for module in re.findall(r"python -m (\w[\w.]*)", text):
            assert importlib.util.find_spec(module) is not None, f"{page.name}: python -m {module}"
        for words in re.findall(r"python -m ftw_conformance ((?:[a-z]+ ?)+)", text):
            known = any(words.strip() == name or words.startswith(name) for name in COMMANDS)
            assert known, f"{page.name}: python -m ftw_conformance {words}"


def test_the_options_of_commands_exist():
    sources = {}
    for page in PAGES:
        commands = re.findall(r"python -m (ftw[\w.]*)((?: [^`|\n]*)?)", page.read_text(encoding="utf-8"))
        for module, rest in commands:
            if module not in sources:
                found = importlib.util.find_spec(module)
                folders = found.submodule_search_locations
                files = [Path(found.origin)] if folders is None else Path(folders[0]).rglob("*.py")
                if module.endswith(".demo"):
                    files = [*files, ROOT / "ftw/demo/harness.py"]  # what the demos share, their options too
                sources[module] = "".join(file.read_text(encoding="utf-8") for file in files)
            for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", rest.split("#")[0]):
                assert f'"{option}"' in sources[module], f"{page.name}: {module} has no {option}"


def test_a_page_has_one_title_in_every_list():
    titles = {page.name: page.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for page in PAGES}
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for words, name in re.findall(r"\[([^\]]+)\]\(([\w-]+\.md)\)", index):
        assert words == titles[name], name
    for name in titles.keys() - {"README.md", "CONTRIBUTING.md", "index.md"}:
        assert index.count(f"\n{name.removesuffix('.md')}\n") == 1, f"docs/index.md lists {name} once in its toctrees"


@pytest.mark.parametrize("package", ["ftw", "ftw_torch", "ftw_jax", "ftw_reference", "ftw_conformance"])
def test_the_api_lists_every_public_name(package):
    listed = (ROOT / f"docs/api/{package}.md").read_text(encoding="utf-8").split()
    module = importlib.import_module(package)
    parts = {name: getattr(module, name) for name in module.__all__}
    names = [name for name, part in parts.items() if not inspect.ismodule(part)]
    if package == "ftw":
        names += [name for part in parts.values() if inspect.ismodule(part) for name in part.__all__]
    assert not set(names) - set(listed)
