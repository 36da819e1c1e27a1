"""What happens to long runs: they are killed in mid-step, the disk fills up, the learning rate starts at zero."""

import os
import signal
import warnings
from pathlib import Path

import pytest
import torch
from trainers import Watched, data, gpt, logged, losses, processes, trainer

from ftw import report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


def long_run(folder, loss=losses):
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    model = gpt(dropout=0.1)
    record = Path(folder) / "run.jsonl"
    target = data(10, 5, step=1)
    return trainer(folder, model, target=target, options=options, per_sample_loss=loss, record=record)


def killed(folder, rank):
    """Train until the fourth step, and die in the middle of its pass over the pool."""
    made = None

    def loss(model, inputs):
        if made.state.global_step == 3 and len(inputs["input_ids"]) == 8:  # the pool; the target has 4
            os.kill(os.getpid(), signal.SIGKILL)
        return losses(model, inputs)

    made = long_run(folder, loss)
    made.train()


def test_a_run_killed_in_mid_step_goes_on(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    codes, errors = processes(killed, one, 1)
    assert codes == [-signal.SIGKILL], errors
    assert sorted(x.name for x in one.glob("checkpoint-*")) == ["checkpoint-2"]
    assert sorted(report.read(one / "run.jsonl").runs[0].steps) == [1, 2, 3]

    again = long_run(one)
    again.train(resume_from_checkpoint=True)
    whole = long_run(two)  # now, since a trainer seeds as it is made
    whole.train()
    for p, q in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
    record = report.read(one / "run.jsonl")
    assert record.damaged == 0
    (run,), (other,) = record.runs, report.read(two / "run.jsonl").runs
    assert {step: line["picked"] for step, line in run.steps.items()} == {
        step: line["picked"] for step, line in other.steps.items()
    }
    assert sorted(run.steps) == [1, 2, 3, 4, 5]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_record_is_said_once_and_training_goes_on(tmp_path):
    made = trainer(tmp_path, record="/dev/full")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made.train()
    assert sum("the record ends here" in str(w.message) for w in caught) == 1
    assert made.state.global_step == 4
    assert len(logged(made, "match")) == 4


def test_no_learning_rate_in_the_first_step_of_a_warm_up(tmp_path):
    """The step chooses as it would with one, and moves nothing; the next one learns."""

    class Own(Watched):
        def training_step(self, model, *args, **kwargs):
            before = [p.detach().clone() for p in model.parameters()]
            moves.append(before)
            return super().training_step(model, *args, **kwargs)

    moves = []
    made = trainer(tmp_path, cls=Own, options={"max_steps": 3, "warmup_steps": 2, "lr_scheduler_type": "linear"})
    made.train()
    plain = trainer(tmp_path, cls=Watched, options={"max_steps": 1})
    plain.train()
    assert logged(made, "learning_rate")[0] == 0
    assert logged(made, "match")[0] == pytest.approx(logged(plain, "match")[0], rel=1e-6)
    for name, g in plain.found[0].items():
        torch.testing.assert_close(made.found[0][name], g, msg=name)
    first, second, third = moves
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(second, third, strict=True))
