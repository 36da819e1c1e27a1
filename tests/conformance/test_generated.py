"""Errors made from the source: each is a program, differs in one place, and verify notices one of them."""

import ast
import difflib

from ftw_conformance.mutate import command as mutate
from ftw_conformance.mutate.generated import every_mutation, sampled


def test_every_error_is_a_program_that_differs():
    every = every_mutation()
    assert len(every) > 3000
    assert {m.file.split("/")[0] for m in every} >= {"qp", "optimizers", "constraints.py", "guard.py", "geometry.py"}
    for m in every[::7]:
        assert ast.dump(ast.parse(m.new)) != ast.dump(ast.parse(m.old)), m.what
        changed = [s for s in difflib.ndiff(m.old.splitlines(), m.new.splitlines()) if s[:2] in ("- ", "+ ")]
        assert 1 <= len(changed) <= 12, m.what


def test_a_sample_is_that_of_its_seed():
    assert sampled(5, 3) == sampled(5, 3) != sampled(5, 4)
    assert len(set(sampled(50, 3))) == 50


def test_one_is_noticed(capsys, monkeypatch):
    one = next(m for m in every_mutation() if m.file == "constraints.py" and "xp.maximum" in m.what)
    monkeypatch.setattr(mutate, "sampled", lambda count, seed: [one])
    monkeypatch.setattr(mutate, "try_one", lambda m, names, more=(): real(m, names, more) if m is one else fine(m))
    real, fine = TRY, lambda m: mutate.Outcome(m, "survived", "", 0.0)
    assert mutate.main(["--generate", "1", "--dtype", "float64"]) == 0
    assert "caught" in capsys.readouterr().out


TRY = mutate.try_one
