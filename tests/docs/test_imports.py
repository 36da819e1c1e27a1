"""Imports run one way, and `import ftw` loads no framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "ftw": ROOT / "ftw",
    "ftw_torch": ROOT / "adapters/ftw_torch",
    "ftw_jax": ROOT / "adapters/ftw_jax",
    "ftw_reference": ROOT / "reference/ftw_reference",
    "ftw_compiled": ROOT / "reference/ftw_compiled",
    "ftw_conformance": ROOT / "conformance/ftw_conformance",
}
ARROWS = {
    "ftw": set(),
    "ftw_torch": {"ftw", "ftw_compiled"},
    "ftw_jax": {"ftw"},
    "ftw_reference": set(),
    "ftw_compiled": {"ftw_reference"},
    "ftw_conformance": {"ftw", "ftw_reference", "ftw_compiled", "ftw_torch", "ftw_jax"},
}
FRAMEWORKS = {"numpy", "torch", "jax", "scipy", "numba", "optax", "flax", "equinox", "transformers", "tqdm"}
ALLOWED = {  # the other third parties a package may import at the top of a module
    "ftw": {"array_api_compat", "array_api_extra"},
    "ftw_reference": {"numpy", "numba"},
    "ftw_compiled": {"numpy", "numba"},
}


def imports(path):
    """Yield (module, whether it is imported as soon as the file is)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    lazy = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    hidden = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and "TYPE_CHECKING" in ast.unparse(test.test)
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node not in lazy | hidden
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module, node not in lazy | hidden
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            yield ast.unparse(node.args[0]).strip("'"), False


@pytest.mark.parametrize("package", list(PACKAGES))
def test_imports_run_one_way(package):
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        for module, at_once in imports(path):
            top = module.split(".")[0]
            where = f"{path.relative_to(ROOT)} imports {module}"
            if top in PACKAGES:
                assert top == package or top in ARROWS[package], where
            elif package in ALLOWED and at_once and top not in ALLOWED[package]:
                assert top in sys.stdlib_module_names, where
            if package == "ftw":
                assert top not in FRAMEWORKS, where


def files_and_imports():
    """Return {module: modules of this repository that its file imports, at once or later}."""
    files = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    arrows = {module: set() for module in files}
    for module, path in files.items():
        home = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = []
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                named = [f"{base}.{alias.name}" for alias in node.names]
                named = [name if name in files else base for name in named]
            arrows[module] |= {name for name in named if name in files and name != module}
    return arrows


def circles(arrows):
    """Return the sets of modules that import each other, by repeatedly taking away those that import no other."""
    left = {module: set(others) for module, others in arrows.items()}
    while True:
        ground = {module for module, others in left.items() if not others & set(left)}
        if not ground:
            break
        left = {module: others for module, others in left.items() if module not in ground}
    reached = dict(left)
    for module in left:  # what only imports a circle is not of it
        found, waiting = set(), list(left[module] & set(left))
        while waiting:
            other = waiting.pop()
            if other not in found:
                found.add(other)
                waiting += left[other] & set(left)
        reached[module] = found
    return sorted(module for module, found in reached.items() if module in found)


def test_no_package_looks_behind_anothers_door():
    """What adapters and ports need of the core is public, or in ftw.spi."""
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
                    continue
                top = node.module.split(".")[0]
                if top in PACKAGES and top != package:
                    names = [*node.module.split("."), *(alias.name for alias in node.names)]
                    assert not [name for name in names if name.startswith("_")], (path, ast.unparse(node))


def test_a_circle_is_found():
    arrows = {"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}
    assert circles(arrows) == ["b", "c"]


def test_no_file_imports_itself_through_others():
    assert circles(files_and_imports()) == []


def test_the_top_of_the_torch_adapter_is_short():
    import ftw_torch

    entries = [path for path in PACKAGES["ftw_torch"].iterdir() if path.name not in ("__pycache__", "py.typed")]
    assert len(entries) <= 16, sorted(path.name for path in entries)
    assert dir(ftw_torch) == sorted(ftw_torch.__all__)


def test_only_the_array_files_of_the_core_know_a_framework():
    names = FRAMEWORKS | {"is_torch_namespace", "is_jax_namespace", "is_numpy_namespace", "is_jax_array"}
    for path in PACKAGES["ftw"].rglob("*.py"):
        if path.name in ("_array.py", "_kinds.py", "_loops.py", "_modes.py", "_older.py", "_pytrees.py"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        used |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert not used & names, (path.name, used & names)


def test_import_ftw_loads_no_framework():
    code = (
        "import sys; before = set(sys.modules); import ftw; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} & "
        f"{FRAMEWORKS!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_everything_public_is_there():
    import ftw

    for name in ftw.__all__:
        assert getattr(ftw, name).__doc__, name


def test_the_example_runs_and_selection_helps():
    path = ROOT / "examples/numpy_trainer.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True, cwd=ROOT)
    random, chosen = (float(word.strip(",")) for word in done.stdout.split() if word[0].isdigit())
    assert chosen < random
