"""The table of filters: an entry is all that a filter needs to be taken by name."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ftw
from ftw._named_filters import Named, Picked, named
from ftw.filters import Filtered, FilterName
from ftw.spi import NAMED, Products, check_options, choose, needs_gram


@pytest.fixture
def last():
    """A filter that takes the k last candidates of the shortlist, entered for one test."""

    def run(xp, shortlist):
        n = shortlist.scores.shape[0]
        picks = xp.arange(n - shortlist.k, n)  # (k,)
        return Picked(Filtered(picks, xp.asarray(shortlist.k, dtype=xp.int32)))

    NAMED["last"] = Named(run, needs_gram=False)
    yield "last"
    del NAMED["last"]


def test_the_names_that_types_know_are_those_of_the_table():
    assert set(get_args(FilterName)) == set(NAMED)
    assert all(callable(getattr(ftw.filters, name)) and name in ftw.filters.__all__ for name in NAMED)


def test_an_entry_is_enough(last):
    b = np.asarray([3.0, 1.0, 2.0, 0.5])

    def never(indices):
        raise AssertionError("a filter without need of the Gram matrix had it formed")

    products = Products(never, lambda indices, weights: np.asarray(1.0), np.asarray(1.0))
    s = choose(b, products, keep=2, filter=last, weight="uniform")
    assert_array_equal(s.indices, [2, 3])
    assert not needs_gram(last)
    assert needs_gram(lambda b, K, k: None)


def test_an_unknown_name_is_refused_with_the_names_there_are(last):
    with pytest.raises(ValueError, match=r"matchin.* is not one of .*matching.*last"):
        check_options(4, 2, "matchin", "qp", ftw.Simplex(), 0.05, None, 0.3)


def test_a_name_is_entered_once():
    with pytest.raises(ValueError, match="'top_k' is in the table already"):
        named("top_k", needs_gram=False)(lambda xp, shortlist: None)
