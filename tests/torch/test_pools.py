"""Pools: nothing lost, nothing repeated unasked, leaks said."""

import logging
import runpy
from collections import Counter
from pathlib import Path

import pytest
import torch
from ftw_torch import SelectionWarning, TargetWarning
from ftw_torch.pools import Pools
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset


class Stream(IterableDataset):
    def __init__(self, n):
        self.n, self.taken = n, 0

    def __iter__(self):
        for i in range(self.n):
            self.taken += 1
            yield torch.full((1 + i % 4,), i)


def ragged(samples):
    return pad_sequence(samples, batch_first=True, padding_value=-1)


@pytest.mark.parametrize("size", [1, 3, 8, 30])
def test_every_sample_once(size):
    pools = Pools(Stream(17), size, ragged)
    for _ in range(2):
        seen = [int(row[0]) for pool in pools for row in pool]
        assert seen == list(range(17))
        assert (pools.read, pools.offered) == (17, 17)


def test_a_stream_that_is_used_up_is_said():
    pools = Pools(iter(range(5)), size=3)
    first = next(iter(pools)).tolist()
    assert [pool.tolist() for pool in pools] == [[3, 4]]  # what was not read goes on
    with pytest.warns(SelectionWarning, match="used up by the pass before"):
        assert list(pools) == []
    assert first == [0, 1, 2]
    again = Pools(range(5), size=3)
    assert [pool.tolist() for pool in (*again, *again)] == [[0, 1, 2], [3, 4]] * 2


def test_a_stream_is_not_read_ahead():
    stream = Stream(100)
    for i, _ in enumerate(Pools(stream, 4, ragged)):
        assert stream.taken == 4 * (i + 1)
        if i == 2:
            break


@pytest.mark.parametrize("reoffer", [0, 1, 2])
def test_refused_samples_come_again(reoffer):
    pools = Pools(range(20), 4, reoffer=reoffer)
    offers, picked = Counter(), []
    for pool in pools:
        offers.update(pool.tolist())
        picked += pool[:2].tolist()
        pools.picked(torch.tensor([0, 1]))
    assert len(picked) == len(set(picked))
    assert set(offers) == set(range(20))
    assert max(offers.values()) <= 1 + reoffer
    assert pools.refused == 20 - len(picked)
    assert all(offers[i] == 1 + reoffer for i in set(range(20)) - set(picked))


def test_a_pool_that_was_not_told_of():
    pools = Pools(range(9), 4, reoffer=1)
    with pytest.raises(RuntimeError, match="call picked"):
        list(pools)
    for _ in pools:
        with pytest.raises(IndexError, match="places \\[4\\]"):
            pools.picked([4])
        pools.picked([0])
        with pytest.raises(RuntimeError, match="once"):
            pools.picked([0])
        break


def test_a_leaked_target_sample_is_said_once():
    samples = [{"x": torch.tensor([i, i]), "y": i} for i in range(8)]
    target = [{"y": i, "x": [i, i]} for i in (5, 6, 40)]
    pools = Pools(samples, 3, target=target)
    with pytest.warns(TargetWarning, match="sample 5 of the pool is a target sample too"):
        list(pools)
    assert pools.leaked == 2
    list(pools)
    list(Pools(samples, 3, target=target[2:]))


def test_options_are_checked():
    with pytest.raises(ValueError, match="size=0"):
        Pools([], 0)
    with pytest.raises(ValueError, match="reoffer=-1"):
        Pools([], 1, reoffer=-1)
    assert list(Pools([], 1)) == []


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def silent(caplog):
    """Our examples give no cause for a warning."""
    with caplog.at_level(logging.WARNING):
        yield
    assert not [record.message for record in caplog.records if record.name.startswith("ftw")]


@pytest.mark.usefixtures("silent")
def test_the_plain_loop_learns():
    assert runpy.run_path(str(EXAMPLES / "torch_loop.py"))["main"]() < 0.8


@pytest.mark.usefixtures("silent")
def test_the_mixture_obeys_its_floors(tmp_path, capsys):
    found = runpy.run_path(str(EXAMPLES / "torch_mixture.py"))["main"](tmp_path / "mixture.jsonl")
    none, places, quarter = found.values()
    assert quarter[1]["law"] >= 0.2 > 0.1 > places[1]["law"] >= none[1]["law"]  # a pool without law has no share of it
    assert none[0] > places[0] > quarter[0]
    assert quarter[2]["law"] < none[2]["law"] / 2
    assert "explains most of it (cosine" in capsys.readouterr().out


@pytest.mark.usefixtures("silent")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_accelerate_loop_learns():
    pytest.importorskip("accelerate")
    first, last = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))["main"]()
    assert last < 0.3 * first
