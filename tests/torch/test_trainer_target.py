"""Target care in trainers: the second split, copies of the target in the pool, batches that take turns."""

import itertools
import logging

import pytest
import torch
from ftw_torch.step import memory
from ftw_torch.trainer.target import row_keys
from trainers import TARGET, TRAIN, Watched, batch, data, gpt, logged, losses, trainer

from ftw import report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
LOGGER = "ftw_torch.trainer.target"


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_the_second_split_is_measured_as_it_is(tmp_path, unit):
    """Its loss is the model's own before each step, dropout off, whatever the batches; training is not touched."""
    split, found = data(6, 7, step=1), []

    class Own(Watched):
        def training_step(self, model, inputs, *args, **kwargs):
            model.eval()
            with torch.no_grad():
                found.append(float(losses(model, batch(split)).mean()))
            return super().training_step(model, inputs, *args, **kwargs)

    options = {"max_steps": 5, "per_device_eval_batch_size": 4}
    common = {"options": options, "select_after": 1, "loss_unit": unit}
    path = tmp_path / "run.jsonl"
    made = trainer(tmp_path, gpt(dropout=0.1), Own, watch_dataset=split, watch_every=2, record=path, **common)
    made.train()
    assert logged(made, "watch_loss") == pytest.approx([found[1], found[2], found[4]], rel=1e-5)
    record = report.read(path)
    assert record.runs[0].values("watch_loss") == pytest.approx({2: found[1], 3: found[2], 5: found[4]}, rel=1e-5)
    assert record.header["data"]["watch"].startswith("6:")
    without = trainer(tmp_path, gpt(dropout=0.1), **common)
    without.train()
    for p, q in zip(made.model.parameters(), without.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("count", "refresh", "size", "few"), [(40, 1, 7, 0), (39, 1, 9, 1), (40, 0, 11, 1)])
def test_a_small_batch_of_a_large_target_is_not_few_samples(tmp_path, caplog, count, refresh, size, few):
    memory._warn_once.cache_clear()  # a sentence is logged once in a process, and another test may have said it
    with caplog.at_level(logging.WARNING, logger="ftw_torch"):
        options = {"max_steps": 2, "per_device_eval_batch_size": size}
        trainer(tmp_path, target=data(count, 3, step=1), target_refresh=refresh, options=options).train()
    assert caplog.text.count("give 40 or more") == few


def test_a_lead_on_the_first_split_only_is_said_once(tmp_path, caplog):
    """The target counts up; the second split counts down, and so gets worse while the target gets better."""
    options = {"max_steps": 9}
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        trainer(tmp_path, options=options, watch_dataset=data(4, 8, step=1), watch_every=1).train()
        assert "watch_dataset" not in caplog.text
        trainer(tmp_path, options=options, watch_dataset=data(4, 8, step=-3), watch_every=1).train()
    assert caplog.text.count("the loss on watch_dataset rose") == 1


def test_a_resumed_run_remembers_what_its_warnings_need(tmp_path, caplog):
    """From either side of the warning, and of a copy of the target: what is said and counted is what is left of it."""
    train = [*TRAIN[:4], TARGET[1], *TRAIN[4:7]]
    options = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2}
    common = {"train": train, "target": [*TARGET, *data(4, 9, step=1)], "watch_dataset": data(4, 8, step=-3)}
    common |= {"watch_every": 1, "keep": 7}

    def run(start):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger=LOGGER):
            made = trainer(tmp_path, options=options, **common)
            made.train(resume_from_checkpoint=start and str(tmp_path / f"checkpoint-{start}"))
        said = [record.getMessage() for record in caplog.records if record.name == LOGGER]
        return said, [(x["step"], x["leaked"]) for x in made.state.log_history if "leaked" in x], made

    said, leaked, whole = run(None)
    steps = [int(text.split()[1][:-1]) for text in said]
    for start in (4, 6):
        again, counted, made = run(start)
        assert again == [text for text, step in zip(said, steps, strict=True) if step > start]
        assert counted == leaked
        assert made._ftw_guard.state_dict() == whole._ftw_guard.state_dict()
        for p, q in zip(whole.model.parameters(), made.model.parameters(), strict=True):
            assert torch.equal(p, q)


def test_a_copy_of_the_target_in_the_pool_is_said_once_and_counted(tmp_path, caplog):
    train = [*TRAIN[:4], TARGET[1], *TRAIN[4:7]]
    path = tmp_path / "run.jsonl"
    made = trainer(tmp_path, cls=Watched, train=train, options={"max_steps": 2}, record=path)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        made.train()
    place = [x["input_ids"].tolist().index(TARGET[1]["input_ids"]) for x in made.seen]
    assert caplog.text.count("is a target sample too") == 1
    assert f"step 1: sample {place[0]} of the pool is a target sample too" in caplog.text
    assert logged(made, "leaked") == [1, 1]
    (run,) = report.read(path).runs
    assert [run.steps[step]["leaked"] for step in (1, 2)] == [[i] for i in place]
    caplog.clear()
    trainer(tmp_path, options={"max_steps": 2}).train()
    assert not caplog.text


def test_a_copy_is_known_whatever_its_padding():
    rows = torch.arange(12).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    one = {"input_ids": rows, "attention_mask": mask, "labels": rows.where(mask.bool(), -100)}
    wide = torch.full((3, 6), 99)
    wide[:, 2:] = rows
    left = torch.zeros(3, 6, dtype=torch.int64)
    left[:, 2:] = mask
    other = {"labels": wide.where(left.bool(), -100), "attention_mask": left, "input_ids": wide}
    assert row_keys(one) == row_keys(other)
    assert len(set(row_keys(one))) == 3
    other["labels"][1, -1] = 0
    assert row_keys(one)[1] != row_keys(other)[1]
    assert row_keys({"x": torch.ones(2, 3, dtype=torch.bfloat16)})[0] == row_keys({"x": torch.ones(1, 3)})[0]


def test_target_batches_are_not_those_of_evaluation(tmp_path):
    """With persistent workers the trainer hands out the loader of its evaluation data again."""
    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    made = trainer(tmp_path, eval_dataset=TRAIN[:4], options=options)
    made.get_eval_dataloader()
    made.get_eval_dataloader(made.eval_dataset)
    assert torch.equal(made._ftw_target.at(made, 0)["input_ids"].cpu(), batch(TARGET)["input_ids"])


def test_options_are_checked(tmp_path):
    with pytest.raises(ValueError, match="watch_every=0"):
        trainer(tmp_path, watch_dataset=TARGET, watch_every=0)
    with pytest.raises(ValueError, match="watch_dataset is empty"):
        trainer(tmp_path, watch_dataset=[])
    with pytest.raises(TypeError, match="watch_dataset is a dict"):
        trainer(tmp_path, watch_dataset={"a": TARGET})


def test_a_stream_is_read_to_its_end(tmp_path):
    made = trainer(tmp_path, target=iter(TARGET), watch_dataset=(x for x in TARGET[:3]))
    assert torch.equal(made._ftw_target.at(made, 0)["input_ids"], batch(TARGET)["input_ids"])
    assert len(made._ftw_watch._samples.data) == 3
    with pytest.raises(ValueError, match=r"target_dataset is a stream of more than 10000 samples; pass stream.take"):
        trainer(tmp_path, target=itertools.cycle(TARGET))
    with pytest.raises(ValueError, match="target_dataset is empty"):
        trainer(tmp_path, target=iter([]))
