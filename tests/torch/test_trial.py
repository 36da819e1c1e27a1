"""The trial from Python: arms at equal time on a clock of our own, paired seeds, a test split that decides nothing."""

import functools
import math

import pytest

pytest.importorskip("torch")

import torch
from ftw_torch import trial
from ftw_torch.trial import arms as arms_module
from ftw_torch.trial.race import WARM_UP

from ftw import report

SECOND_A_SAMPLE = 0.01  # of the clock, for each sample that goes through the model
SIZES = {"keep": 2, "pool_size": 8, "target_size": 4}
PASSES = {  # samples through the model in a step, counted by hand from what the arm does
    "random": 2,
    "rand+T": 2 + 1,
    "whole pool": 8,
    "Filter-then-Weight": 4 + 8,
}


class Work:
    """A clock that advances by the samples that go through the model, and the loss that moves it."""

    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time

    def loss(self, model, batch):
        x, y = batch
        self.time += SECOND_A_SAMPLE * len(x)
        return (model(x)[:, 0] - y) ** 2


def make_model():
    return torch.nn.Linear(4, 1)


def samples(n, seed, sign=1.0, noise=0.05):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=g)
    return x, sign * x.sum(1) + noise * torch.randn(n, generator=g)


def polluted(n=96, seed=1):
    """Three of four samples say the opposite of what the target says."""
    (x1, y1), (x2, y2) = samples(n // 4, seed), samples(n - n // 4, seed + 1, sign=-1.0)
    return torch.cat([x1, x2]), torch.cat([y1, y2])


def run(test=True, **options):
    clock = Work()
    test = samples(20, 4) if test is True else test
    options = {"lr": 0.2, "minutes": 1.0, "seeds": 3, "progress": False, "clock": clock, **SIZES, **options}
    return trial.run(make_model, clock.loss, polluted(), samples(24, 3), test, **options)


@functools.cache
def once():
    return run(seeds=5, minutes=1.0)


def test_every_arm_runs_at_every_rate_and_seed():
    result = once()
    names = list(trial.ARMS)
    assert names == ["random", "rand+T", "whole pool", "forward top-k", "Filter-then-Weight"]
    assert [row.arm for row in result.rows] == names
    assert not any(outcome.failure for outcome in result.outcomes)
    for name in names:
        own = [outcome for outcome in result.outcomes if outcome.arm == name]
        first = [outcome for outcome in own if outcome.seed == 0]
        assert sorted(outcome.rate for outcome in first) == pytest.approx([0.2 / 3, 0.2, 0.6])
        best = min(first, key=lambda outcome: outcome.validation).rate
        later = [outcome for outcome in own if outcome.seed > 0]
        assert sorted(outcome.seed for outcome in later) == [1, 2, 3, 4, 5]
        assert {outcome.rate for outcome in later} == {best}


def test_the_time_of_every_run_is_the_same():
    result = once()
    steps = {row.arm: row.step_seconds for row in result.rows}
    for name, passes in PASSES.items():
        assert steps[name] == pytest.approx(passes * SECOND_A_SAMPLE, rel=0.02), name
    for outcome in result.outcomes:
        assert abs(outcome.seconds - result.seconds) <= steps[outcome.arm] / 2 + 1e-9, outcome
    for name, passes in PASSES.items():
        taken = {outcome.steps for outcome in result.outcomes if outcome.arm == name}
        assert taken == {round(result.seconds / (passes * SECOND_A_SAMPLE))}, name
    assert sum(outcome.seconds for outcome in result.outcomes) < 60


def test_the_first_step_is_not_counted():
    clock = Work()

    def compiled(learner):
        first = [True]

        def step():
            if first:
                clock.time += 0.3  # compiles
                first.clear()
            arms_module.add_mean_gradient(learner, learner.pool(2))

        return step

    arms = {"random": trial.ARMS["random"], "compiled": compiled}
    result = trial.run(
        make_model, clock.loss, polluted(), samples(24, 3),
        arms=arms, lr=0.2, minutes=0.5, seeds=3, progress=False, clock=clock, **SIZES,
    )  # fmt: skip
    counts = {name: {o.steps for o in result.outcomes if o.arm == name} for name in arms}
    assert counts["compiled"] == counts["random"]
    assert clock.time < 30.5


def test_seeds_are_paired():
    seen = {}

    def spied(name, arm):
        def make(learner):
            pools, targets = [], []
            seen.setdefault(name, []).append((pools, targets, learner.model.weight.detach().clone()))

            def record(source, found):
                def draw(n):
                    found.append(source(n))
                    return found[-1]

                return draw

            fields = {"pool": record(learner.pool, pools), "target": record(learner.target, targets)}
            return arm(arms_module.Learner(**(vars(learner) | fields)))

        return make

    arms = {name: spied(name, arm) for name, arm in trial.ARMS.items() if name in ("random", "rand+T", "whole pool")}
    result = run(arms=arms, minutes=0.2)
    rounds = [*range(-1, 3 * 3 - 1)]  # measured once, three rates with seed 0
    assert len(rounds) == 9
    for k in (-3, -2, -1):  # the seeds
        (pools, _, start), (with_target, _, start2), (whole, _, start3) = (seen[name][k] for name in arms)
        assert torch.equal(start, start2)
        assert torch.equal(start, start3)
        assert torch.equal(pools[0][0], with_target[0][0])
        assert torch.equal(torch.cat([x for x, _ in pools[:4]]), whole[0][0])
    assert not torch.equal(seen["random"][-1][2], seen["random"][-2][2])
    for seed in (1, 2, 3):
        own = [outcome for outcome in result.outcomes if outcome.seed == seed]
        assert len({outcome.curve[0.0] for outcome in own}) == 1
    assert len({outcome.curve[0.0] for outcome in result.outcomes if outcome.seed}) == 3


def test_samples_kept_apart_are_never_trained_on():
    seen = []
    target_x, target_y = samples(24, 3)

    def spy(learner):
        mine = set()
        seen.append(mine)

        def step():
            x, _ = learner.target(16)
            mine.update(map(tuple, x.tolist()))
            arms_module.add_mean_gradient(learner, learner.pool(2))

        return step

    clock = Work()
    kept = []

    def loss(model, batch):
        if not model.training:
            kept.append({tuple(row) for row in batch[0].tolist()})
        return clock.loss(model, batch)

    arms = {"random": trial.ARMS["random"], "spy": spy}
    trial.run(
        make_model, loss, polluted(), (target_x, target_y),
        arms=arms, lr=0.2, minutes=0.1, seeds=3, progress=False, clock=clock, **SIZES,
    )  # fmt: skip
    everything = {tuple(row) for row in target_x.tolist()}
    folds = {frozenset(rows) for rows in kept}
    assert all(len(rows) == 8 for rows in folds)
    assert len(folds) == 4  # of seeds 0 to 3
    for trained in seen:
        assert len(trained) == 16
        assert frozenset(everything - trained) in folds


FEW = {name: trial.ARMS[name] for name in ("random", "whole pool", "Filter-then-Weight")}


@functools.cache
def told(poison=None):
    """Return the result with enough seeds and time to tell."""
    x, y = samples(20, 4)
    test = {None: (x, y), "large": (x, 1e6 * y), "nan": (x, math.nan * y), "turned": (x, -y)}[poison]
    return run(test=test, arms=FEW, lr=0.1, seeds=6, minutes=1.2)


def test_selection_is_recommended_where_it_pays():
    result = told()
    assert result.arm == "Filter-then-Weight"
    assert result.sentence.startswith("Use Filter-then-Weight (FilterThenWeight with its defaults): against random -")
    rows = {row.arm: row for row in result.rows}
    assert rows[result.arm].difference.high < 0 < rows["whole pool"].difference.high
    assert rows["random"].difference is None
    losses = {(outcome.arm, outcome.seed): outcome.validation for outcome in result.outcomes if outcome.seed}
    gaps = [losses[result.arm, seed] - losses["random", seed] for seed in range(1, 7)]
    assert rows[result.arm].difference.mean == pytest.approx(sum(gaps) / 6)


@pytest.mark.parametrize("poison", ["large", "nan", "turned"])
def test_the_test_split_decides_nothing(poison):
    clean, result = told(), told(poison)
    assert (result.arm, result.sentence, result.seconds) == (clean.arm, clean.sentence, clean.seconds)
    assert result.notes == clean.notes
    for one, other in zip(result.rows, clean.rows, strict=True):
        assert (one.rate, one.validation, one.difference) == (other.rate, other.validation, other.difference)
        assert one.test != other.test
    assert all(outcome.test is None for outcome in clean.outcomes if outcome.seed == 0)


def test_two_seeds_cannot_tell():
    result = run(seeds=2, minutes=0.5)
    assert result.arm is None
    assert "cannot be told with 2 paired seeds" in result.sentence


def test_an_arm_that_cannot_run_is_left_out_and_said():
    def broken(learner):
        raise RuntimeError("no such thing\nand more")

    result = run(arms={**FEW, "mine": broken}, minutes=0.5)
    assert "mine" not in [row.arm for row in result.rows]
    assert any(note == "mine is left out, it cannot be run here: no such thing" for note in result.notes)


def test_an_arm_that_fails_later_is_not_chosen():
    def diverges(learner):
        count = [0]

        def step():
            arms_module.add_mean_gradient(learner, learner.target(4))
            count[0] += 1
            if count[0] > 20:
                raise FloatingPointError("loss is not finite")

        return step

    result = run(arms={"random": trial.ARMS["random"], "target": diverges}, minutes=0.5)
    assert result.arm is None
    assert result.table()[2][4] == "failed"
    assert any("3 of 3 runs failed: loss is not finite" in note for note in result.notes)


def test_a_plain_step_that_fails_is_an_error():
    def loss(model, batch):
        if model.training:
            raise RuntimeError("out of memory")
        return (model(batch[0])[:, 0] - batch[1]) ** 2

    with pytest.raises(trial.TrialError, match=r"a plain step fails: out of memory; .*--micro-batch"):
        trial.run(make_model, loss, polluted(), samples(24, 3), lr=0.1, progress=False, **SIZES)


def test_too_few_minutes_are_said_before_it_starts(tmp_path):
    record = tmp_path / "run.jsonl"
    with pytest.raises(trial.TrialError, match=r"too few minutes: a step of forward top-k takes 0.22 s.*--minutes \d"):
        run(minutes=0.2, record=record)
    with pytest.raises(trial.TrialError, match=r"too few minutes: they were over before"):
        run(minutes=1e-5, record=record)
    assert report.read(record).runs == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": 0.0}, "learning rates"),
        ({"lr": math.nan}, "learning rates"),
        ({"minutes": 0}, "minutes=0"),
        ({"minutes": math.nan}, "minutes=nan"),
        ({"keep": 0}, "keep=0"),
        ({"keep": 9}, "keep=9 is more than pool_size=8"),
        ({"pool_size": 97}, "the pool has 96.*--pool-size 48"),
        ({"seeds": 0}, "seeds=0"),
        ({"arms": {"random": trial.ARMS["random"]}}, "must hold 'random'"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(trial.TrialError, match=words):
        run(**options)


def test_splits_are_checked():
    clock, (x, y), pool = Work(), samples(24, 3), polluted()
    options = {"lr": 0.05, "progress": False, "clock": clock, **SIZES}
    joined = torch.cat([pool[0], x[5:7]]), torch.cat([pool[1], y[5:7]])
    with pytest.raises(
        trial.TrialError, match=r"2 of the 24 samples of the target are in the pool .*number 5, there 96"
    ):
        trial.run(make_model, clock.loss, joined, (x, y), **options)
    with pytest.raises(trial.TrialError, match=r"2 of the 2 samples of the test are in the target"):
        trial.run(make_model, clock.loss, pool, (x, y), (x[:2], y[:2]), **options)
    with pytest.raises(trial.TrialError, match=r"the target has 11 that differ"):
        trial.run(make_model, clock.loss, pool, (x[:11].repeat(2, 1), y[:11].repeat(2)), **options)
    with pytest.raises(trial.TrialError, match=r"pool is a int"):
        trial.run(make_model, clock.loss, 3, (x, y), **options)
    with pytest.raises(trial.TrialError, match="target is empty"):
        trial.run(make_model, clock.loss, [1], [], **options)
    assert clock.time == 0


def test_lists_of_samples_and_a_collate_function():
    clock = Work()
    lists = [list(zip(x, y, strict=True)) for x, y in (polluted(), samples(24, 3))]
    result = trial.run(
        make_model, clock.loss, *lists, lr=0.2, minutes=0.5, seeds=3, progress=False, clock=clock, **SIZES
    )
    whole = run(test=None, minutes=0.5)
    assert result.sentence == whole.sentence
    assert [row.validation for row in result.rows] == pytest.approx([row.validation for row in whole.rows])


def test_the_record_can_be_read(tmp_path):
    path = tmp_path / "run.jsonl"
    result = run(record=path, header={"model": "linear"}, minutes=0.5)
    record = report.read(path)
    assert record.header["model"] == "linear"
    runs = record.methods["rand+T"]
    assert [one.seed for one in runs] == [1, 2, 3]
    mine = [outcome for outcome in result.outcomes if outcome.arm == "rand+T" and outcome.seed > 0]
    for one, outcome in zip(runs, mine, strict=True):
        values = one.values("watch_loss")
        assert list(values) == [0, 25, 50, 75, 100]
        assert values[100] == outcome.validation
        assert one.values("test_loss") == {100: outcome.test}
    assert "<svg" in report.render(record)


def test_the_learning_rate_warms_up_and_goes_to_zero():
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            rates[-1].append(self.param_groups[0]["lr"])
            return super().step(closure)

    def make_optimizer(model, lr):
        rates.append([])
        return Recording(model.parameters(), lr=lr)

    arms = {name: trial.ARMS[name] for name in ("random", "whole pool")}
    run(make_optimizer=make_optimizer, arms=arms, minutes=0.5)
    for one in rates[-6:]:
        n, peak = len(one), max(one)
        expected = [min(1, (i + 1) / WARM_UP) * (1 - i / n) for i in range(n)]
        assert [rate / peak for rate in one] == pytest.approx([e / max(expected) for e in expected], abs=0.5 / n)
