"""docs/golden-vectors.md says of the file what the file holds."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from ftw_conformance import golden
from ftw_conformance.verify.cases import sketches

PAGE = (Path(__file__).parents[2] / "docs" / "golden-vectors.md").read_text(encoding="utf-8")
FILE = golden.load()


def shapes(cell: str) -> list[tuple[int, ...]]:
    return [tuple(int(x) for x in re.findall(r"\d+", found)) for found in re.findall(r"\(([\d, ]*)\)", cell)]


def rows() -> list[tuple[list[str], list[tuple[int, ...]]]]:
    out = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        names = re.findall(r"`([^`]+)`", cells[0]) if line.startswith("| `") else []
        if names:
            out.append((names, shapes(cells[1])))
    return out


def matches(name: str) -> list[str]:
    pattern = re.sub(r"METRIC|FIELD|KIND|SET|NAME|\bK\b", "[^/]+", name)
    return [stored for stored in FILE if re.fullmatch(pattern, stored)]


def test_every_array_of_the_file_is_on_the_page_with_its_shape() -> None:
    seen = {"format"}
    for names, found in rows():
        for i, name in enumerate(names):
            stored = matches(name)
            assert stored, f"{name} is on the page and not in the file"
            seen |= set(stored)
            if not found or "(K,)" in name or name.startswith("filters/"):
                continue
            expected = found[i] if len(found) == len(names) else found[0]
            for one in stored:
                assert FILE[one].shape == expected, one
    assert seen == set(FILE)


def test_dtypes_and_the_number_of_candidates() -> None:
    assert {x.dtype.str for x in FILE.values()} == {"<f8", "<i8"}
    assert FILE["gradients"].shape == (12, 30)
    np.testing.assert_array_equal(FILE["gradients"][2], FILE["gradients"][7])
    assert not FILE["gradients"][9].any()
    assert f"`format` is {int(FILE['format'])} " in PAGE


def test_seed_and_buckets_of_the_sketch() -> None:
    seed, buckets = (int(x) for x in re.search(r"seed (\d+), (\d+) buckets", PAGE).groups())  # type: ignore[union-attr]
    for r in range(5):
        for c in range(6):
            bucket, sign = sketches.hashed(r, c, buckets, seed)
            assert (FILE["sketch/bucket"][r, c], FILE["sketch/sign"][r, c]) == (bucket, sign)


def test_answers_of_zeros_are_held_to_an_absolute_error() -> None:
    zeros = [name for name, x in FILE.items() if x.dtype.kind == "f" and not x.any()]
    assert "qp/negative/nonnegative/weights" in zeros
    name = zeros[0]
    assert not golden.check(FILE, {name: FILE[name] + 5e-10}, whole=False)
    assert golden.check(FILE, {name: FILE[name] + 2e-9}, whole=False)
