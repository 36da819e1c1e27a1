"""Trainers: the mixin does what the selector does, and the trainer keeps doing everything else."""

import ast
import json
import logging
from pathlib import Path

import ftw_torch
import pytest
import torch
from ftw_torch import FilterThenWeight
from trainers import (
    TARGET,
    TRAIN,
    V,
    Watched,
    assert_close,
    batch,
    data,
    gpt,
    grads,
    llama,
    logged,
    losses,
    opposite,
    trainer,
)

from ftw import report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# What one step does


@pytest.mark.parametrize("make", [gpt, llama])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_step_is_the_selectors(tmp_path, make, smoothing):
    options = {"max_steps": 1, "label_smoothing_factor": smoothing}
    made = trainer(tmp_path, make(), Watched, options=options, guard=0.2)
    made.train()
    model = make()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = FilterThenWeight(model, optimizer, lambda m, x: losses(m, x, smoothing), keep=3, guard=0.2)
    selection = selector.backward(made.seen[0], batch(TARGET))
    assert_close(made.found[0], grads(model))
    assert logged(made, "match") == pytest.approx([float(selection.match)], rel=1e-5)
    assert logged(made, "effective_size") == pytest.approx([float(selection.effective_size)], rel=1e-5)
    assert logged(made, "target_loss") == pytest.approx([float(selection.target_loss)], rel=1e-5)
    assert logged(made, "picked_share") == [3 / 8]
    assert logged(made, "selection_seconds")[0] > 0


def test_scores_by_forward_passes_and_the_targets_share(tmp_path):
    options = {"filter": "top_k", "weight": "uniform", "score": "forward", "train_on_target": 0.3}
    made = trainer(tmp_path, gpt(), Watched, options={"max_steps": 1}, **options)
    made.train()
    model = gpt()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = FilterThenWeight(model, optimizer, losses, keep=3, guard=0, filter="top_k", weight="uniform")
    selection = selector.select(made.seen[0], batch(TARGET))
    chosen = {name: x[selection.indices] for name, x in made.seen[0].items()}
    (0.7 * losses(model, chosen).mean() + 0.3 * losses(model, batch(TARGET)).mean()).backward()
    assert_close(made.found[0], grads(model))


def test_it_learns_from_the_useful_half(tmp_path):
    made = trainer(tmp_path, options={"max_steps": 12}, record=tmp_path / "run.jsonl")
    made.train()
    target = logged(made, "target_loss")
    assert target[-1] < 0.9 * target[0]


def test_micro_batches_change_nothing(tmp_path):
    one, two = (trainer(tmp_path, llama(), options={"max_steps": 2}, micro_batch=m) for m in (None, 3))
    one.train()
    two.train()
    assert_close(dict(one.model.named_parameters()), dict(two.model.named_parameters()), 1e-5)


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_accumulation_is_the_mean_of_the_pools(tmp_path, unit):
    options = {"max_steps": 1, "gradient_accumulation_steps": 2}
    made = trainer(tmp_path, llama(), Watched, options=options, loss_unit=unit)
    made.train()
    model = llama()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = sum(int((x["labels"] != -100).sum()) for x in made.seen)  # the first of each is not predicted
    assert made.items[0] in (tokens, tokens - 16)  # which to count changed between releases of transformers
    total = {}

    def with_mean(batch, mean=None):
        counts = (batch["labels"][:, 1:] != -100).sum(1).float()  # (n,)
        return {**batch, "share": counts / (counts.mean() if mean is None else mean)}

    def loss(m, x):
        rest = {k: v for k, v in x.items() if k != "share"}
        return losses(m, rest) * x["share"] if unit == "token" else losses(m, rest)

    for inputs in made.seen:
        model.zero_grad()
        FilterThenWeight(model, optimizer, loss, keep=3).backward(
            with_mean(inputs, made.items[0] / 16), with_mean(batch(TARGET))
        )
        for name, g in grads(model).items():
            total[name] = total.get(name, 0) + g / 2
    assert_close(made.found[-1], total)


def test_uniform_weights_by_token_are_the_trainers_own_gradient(tmp_path):
    """The loss of transformers (num_items_in_batch) is the whole pool with weights 1/n."""
    options = {"max_steps": 1, "gradient_accumulation_steps": 2}
    plain = trainer(tmp_path, gpt(), Watched, options=options, select_after=5)
    ours = trainer(
        tmp_path, gpt(), Watched, options=options, keep=1.0, filter="top_k", weight="uniform", loss_unit="token",
        shortlist=None,
    )  # fmt: skip
    plain.train()
    ours.train()
    assert_close(ours.found[-1], plain.found[-1], 1e-5)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=0.05)
    assert not logged(plain, "match")


def test_some_steps_are_the_trainers_own(tmp_path):
    options = {"max_steps": 7}
    made = trainer(tmp_path, options=options, select_after=2, select_every=3)
    made.train()
    selected = [line["step"] for line in made.state.log_history if "match" in line]
    assert selected == [3, 6]


def test_clipping_stays_the_trainers(tmp_path):
    made = trainer(tmp_path, cls=Watched, options={"max_steps": 1, "max_grad_norm": 1e-3, "optim": "sgd"})
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in made.model.named_parameters()])
    assert float(moved.norm()) == pytest.approx(1e-2 * 1e-3, rel=1e-2)
    assert logged(made, "grad_norm")[0] > 1e-2


def test_bf16_checkpointing_and_no_learning_rate_in_warm_up(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # where transformers 4 would leave it for later tests
    options = {"bf16": True, "gradient_checkpointing": True, "warmup_steps": 2, "lr_scheduler_type": "linear"}
    made = trainer(tmp_path, llama(), options=options)
    made.train()
    assert all(0 < x <= 1.0001 for x in logged(made, "match"))
    assert made.state.global_step == 4


def test_the_end_of_an_epoch(tmp_path):
    """Pools of 8, 8 and 1 with keep=3."""
    made = trainer(tmp_path, train=TRAIN[:17], options={"max_steps": -1, "num_train_epochs": 2})
    made.train()
    assert logged(made, "picked_share") == [3 / 8, 3 / 8, 1.0] * 2


def test_the_pool_as_its_own_target(tmp_path):
    made = trainer(tmp_path, target=None, options={"max_steps": 2})
    made.train()
    assert len(logged(made, "match")) == 2


def test_targets_take_turns(tmp_path):
    target = data(10, 5, step=1)
    made = trainer(tmp_path, target=target, target_refresh=2)
    made.train()
    turns = [tuple(map(tuple, made._ftw_target.at(made, step)["input_ids"].tolist())) for step in range(8)]
    assert all(turns[i] == turns[i + 1] for i in (0, 2, 4, 6))
    assert not set(turns[0]) & set(turns[2])
    fixed = trainer(tmp_path, target=target, target_refresh=0)
    first, later = (fixed._ftw_target.at(fixed, step)["input_ids"] for step in (0, 50))
    assert torch.equal(first, later)


# ---------------------------------------------------------------------------------------------------------------------
# Long runs


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_is_bit_identical(tmp_path, accumulate):
    options = {"max_steps": 6, "gradient_accumulation_steps": accumulate, "save_strategy": "steps", "save_steps": 3}
    common = {"target": data(10, 5, step=1), "options": options, "select_after": 1}
    whole = trainer(tmp_path / "a", gpt(dropout=0.1), **common)
    whole.train()
    again = trainer(tmp_path / "b", gpt(dropout=0.1, seed=9), **common)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (name, p), q in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert logged(whole, "match") == logged(again, "match")


def test_the_record_of_a_run(tmp_path):
    path = tmp_path / "run.jsonl"
    options = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 2}
    made = trainer(tmp_path, options=options, record=path)
    made.train()
    record = report.read(path)
    assert record.damaged == 0
    assert torch.__version__.startswith(record.header["packages"]["torch"])  # which may leave out the build
    assert record.header["data"]["target"].startswith("4:")
    (run,) = record.runs
    assert sorted(run.steps) == [1, 2, 3, 4]
    for step, line in run.steps.items():
        assert line["status"] == "OK"
        assert len(line["picked"]) == 6
        assert {"index", "score", "loss", "length", "weight"} <= set(line["picked"][0])
        assert ("grad_norm" in line) == (step % 2 == 0)
    assert run.values("match").keys() == {1, 2, 3, 4}
    assert "run" in report.render(record)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert not any("text" in x for line in lines for x in line.get("picked", []) + line.get("refused", []))


class Letters:
    """Decodes a number as a letter."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(ord("a") + i % 26) for i in ids)


def test_a_record_that_is_asked_for_text_and_sources(tmp_path):
    """Names, sources and text of what was picked and refused are those of the samples, in any order and padding."""
    made = [{**x, "kind": i % 2} for i, x in enumerate(TRAIN)]
    target = [{**x, "kind": 1} for x in TARGET]
    options = {"max_steps": 14, "remove_unused_columns": False, "gradient_accumulation_steps": 2}
    path = tmp_path / "run.jsonl"
    common = {"record": path, "record_text": True, "record_source": "kind", "processing_class": Letters()}
    run = trainer(tmp_path, train=made, target=target, options=options, eval_dataset=target, **common)
    run.train()
    assert run.evaluate()["eval_loss"] > 0
    record = report.read(path)
    (run,) = record.runs
    text = {
        Letters().decode([i for i, m in zip(x["input_ids"], x["attention_mask"], strict=True) if m], True): x
        for x in made
    }
    names = {}
    for step, line in run.steps.items():
        assert line["pool"].keys() == {"0", "1"}
        assert sum(line["pool"].values()) == len(line["offered"]["id"]) == len(line["offered"]["length"]) == 16
        assert len(line["refused"]) == 8
        for sample in line["picked"] + line["refused"]:
            assert str(text[sample["text"]]["kind"]) == sample["source"]
            assert sum(text[sample["text"]]["attention_mask"]) == sample["length"] + 1
            assert names.setdefault(sample["id"], sample["text"]) == sample["text"], step
            assert sample["id"] in line["offered"]["id"]
    assert len(set(names.values())) == len(names) > 16
    assert "chosen samples" in report.render(record)
    with pytest.raises(ValueError, match="record_text needs processing_class"):
        trainer(tmp_path, record=path, record_text=True)


def test_no_record_where_nothing_selects(tmp_path):
    path = tmp_path / "run.jsonl"
    trainer(tmp_path, options={"max_steps": 2}, record=path, select_after=9).train()
    assert not path.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Faults


def test_an_exception_in_the_users_loss(tmp_path):
    def broken(model, inputs):
        model(input_ids=inputs["input_ids"])
        raise RuntimeError("my own fault")

    made = trainer(tmp_path, per_sample_loss=broken)
    before = {name: dict(vars(m)) for name, m in made.model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._backward_hooks) for m in made.model.modules())
    with pytest.raises(RuntimeError, match="my own fault"):
        made.train()
    assert sum(len(m._forward_hooks) + len(m._backward_hooks) for m in made.model.modules()) == hooks
    assert all(p.grad is None for p in made.model.parameters())
    assert all(p.requires_grad for p in made.model.parameters())
    assert {name: set(vars(m)) for name, m in made.model.named_modules() if name} == {
        name: set(v) for name, v in before.items() if name
    }
    loss = losses(made.model, batch(TARGET)).mean()
    loss.backward()
    assert all(p.grad is not None for p in made.model.parameters())


def poisoned(model, inputs):
    bad = inputs["input_ids"][:, 0] == V - 1
    return losses(model, inputs) * torch.where(bad, float("nan"), 1.0)


def with_poison():
    train = [{**x, "input_ids": [V - 2, *x["input_ids"][1:]]} for x in TRAIN]
    train[5] = {**train[5], "input_ids": [V - 1, *train[5]["input_ids"][1:]]}
    target = [{**x, "input_ids": [V - 2, *x["input_ids"][1:]]} for x in TARGET]
    return train[:16], target


def test_a_sample_that_is_not_finite_is_dropped_named_and_counted(tmp_path, caplog):
    train, target = with_poison()
    options = {"max_steps": 2}
    common = {"train": train, "target": target, "options": options, "per_sample_loss": poisoned}
    path = tmp_path / "run.jsonl"
    made = trainer(tmp_path, cls=Watched, on_nonfinite="drop", record=path, **common)
    with caplog.at_level(logging.WARNING, logger="ftw_torch.trainer"):
        made.train()
    where = [(x["input_ids"][:, 0] == V - 1).nonzero()[:, 0].tolist() for x in made.seen]
    step = next(i for i, bad in enumerate(where) if bad) + 1
    assert f"step {step}: samples {where[step - 1]} of the pool" in caplog.text
    assert sum(logged(made, "dropped")) == 1
    (run,) = report.read(path).runs
    assert run.steps[step]["dropped"] == where[step - 1]
    assert all(torch.isfinite(p).all() for p in made.model.parameters())
    with pytest.raises(FloatingPointError, match=f"pool sample {where[step - 1][0]} is not finite"):
        trainer(tmp_path, **common).train()


def test_a_target_that_is_not_finite_refuses_the_step(tmp_path):
    train, target = with_poison()
    target[0] = {**target[0], "input_ids": [V - 1, *target[0]["input_ids"][1:]]}
    made = trainer(tmp_path, train=train, target=target, per_sample_loss=poisoned, on_nonfinite="drop")
    with pytest.raises(FloatingPointError, match="target sample 0"):
        made.train()


@pytest.mark.parametrize("policy", ["best", "uniform", "skip", "raise"])
def test_nothing_useful(tmp_path, policy):
    model, train, target = opposite()
    made = trainer(tmp_path, model, train=train, target=target, keep=2, nothing_useful=policy, options={"max_steps": 1})
    if policy == "raise":
        with pytest.raises(RuntimeError, match="NOTHING_USEFUL"):
            made.train()
        return
    made.train()
    assert logged(made, "nothing_useful") == [1]
    moved = bool((model.layer.weight != 0).any())
    assert moved == (policy != "skip")
    assert logged(made, "picked_share") == [1.0 if policy == "uniform" else 0.25]


def test_options_are_checked(tmp_path):
    for options, message in (
        ({"keep": 0}, "keep=0"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"select_every": 0}, "select_every=0"),
        ({"loss_unit": "word"}, "loss_unit='word'"),
        ({"nothing_useful": "weep"}, "nothing_useful='weep'"),
        ({"target": []}, "target_dataset is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, **options)
    with pytest.raises(TypeError, match="target_dataset is a dict of \\['a', 'b'\\]: one data set"):
        trainer(tmp_path, target={"a": TARGET, "b": TARGET})
    with pytest.raises(TypeError, match="target_dataset is a int"):
        trainer(tmp_path, target=3)


def test_the_trainers_evaluation_data_stay_its_own(tmp_path):
    held_out = TRAIN[:4]
    made = trainer(tmp_path, eval_dataset=held_out, options={"max_steps": 1})
    assert made.eval_dataset is held_out
    assert set(made.evaluate()) >= {"eval_loss"}
    assert trainer(tmp_path).eval_dataset is None
    two = trainer(tmp_path, eval_dataset={"a": held_out, "b": TARGET})
    assert set(two.eval_dataset) == {"a", "b"}


# ---------------------------------------------------------------------------------------------------------------------
# Other people's models and trainers


def test_a_model_with_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    made = trainer(tmp_path, model, Watched, options={"max_steps": 2})
    made.train()
    assert all("lora" in name for name in made.found[0])
    assert all(0 < x <= 1.0001 for x in logged(made, "match"))


def test_only_the_trainer_and_the_trial_load_transformers():
    for path in Path(ftw_torch.__file__).parent.rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        nodes = ast.walk(ast.parse(path.read_text()))
        names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
        mine = path.parent.name == "trainer" or path.parts[-2:] == ("trial", "models.py")
        assert mine or not any(x.startswith("transformers") for x in names), path.name
    entry = Path(ftw_torch.__file__).read_text()
    assert "trainer" not in entry
    assert "trial" not in entry
