"""The examples in JAX run as they stand, stay short, and show what they are there to show."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["jax_nnx", "jax_equinox"])
def test_an_example(name):
    pytest.importorskip("flax" if name == "jax_nnx" else "equinox")
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 80
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.train(True) < 0.95 * module.train(False)
