"""Two processes of a trainer (gloo, DDP): the run of one process with both pools; what is sharded is refused."""

import functools
import json
import os
import socket
from pathlib import Path

import pytest
import torch
from ftw_torch.trainer.setup import refuse
from trainers import TARGET, TRAIN, data, gpt, logged, opposite, processes, trainer

from ftw import Quota, report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

# a target sample in the pool, a step on whole pools, an end of an epoch, several selections a step, a floor
COMMON = {
    "train": [{**x, "kind": "odd" if i % 2 else "even"} for i, x in enumerate([*TRAIN[:21], TARGET[2], *TRAIN[21:]])],
    "target": TARGET, "watch_dataset": data(5, 7, step=1), "select_after": 1, "watch_every": 2,
    "sources": "kind", "quota": Quota("kind", at_least={"even": 3}), "fill": "relax",
}  # fmt: skip
OPTIONS = {"max_steps": 3, "gradient_accumulation_steps": 2}


def run(folder, rank, port):
    """Train as one of two processes, and write down what came of it."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    options = {**OPTIONS, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "ddp_backend": "gloo"}
    made = trainer(folder, gpt().double(), keep=2, options=options, record=Path(folder) / "two.jsonl", **COMMON)
    made.train()
    own = [p.flatten().tolist() for p in made.model.parameters()]
    names = ("match", "target_loss", "watch_loss", "leaked", "picked_share", "loss", "grad_norm")
    names += ("picked/even", "floors_bound", "relaxed")
    result = {"parameters": own, **{name: logged(made, name) for name in names}}
    model, train, target = opposite()
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "optim": "sgd"}
    options["ddp_backend"] = "gloo"
    useless = trainer(folder, model, train=train, target=target, options=options, nothing_useful="uniform")
    useless.train()
    result |= {"uniform": model.layer.weight.tolist(), "uniform_share": logged(useless, "picked_share")}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))


def test_two_processes_are_one_with_both_pools(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    codes, errors = processes(functools.partial(run, port=port), tmp_path, 2)
    assert codes == [0, 0], errors
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one["parameters"] == two["parameters"]
    options = {**OPTIONS, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}
    whole = trainer(tmp_path, gpt().double(), keep=4, options=options, record=tmp_path / "one.jsonl", **COMMON)
    whole.train()
    for ours, p in zip(one["parameters"], whole.model.parameters(), strict=True):
        torch.testing.assert_close(torch.tensor(ours, dtype=p.dtype), p.detach().flatten(), rtol=1e-6, atol=1e-9)
    assert max(one["picked/even"]) >= 0.75
    names = ("match", "target_loss", "watch_loss", "leaked", "picked_share", "loss", "grad_norm")
    for name in (*names, "picked/even", "floors_bound", "relaxed"):
        assert one[name] == pytest.approx(logged(whole, name), rel=1e-3), name  # the log has four digits
    ours, theirs = (report.read(tmp_path / f"{name}.jsonl").runs[0].steps for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for step, line in ours.items():
        mine, other = ([(s.get("pool", 0), s["index"], s["length"]) for s in x["picked"]] for x in (line, theirs[step]))
        assert mine == other

    assert one["uniform"] == two["uniform"]
    assert one["uniform_share"] == [1.0]
    model, train, target = opposite()
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "optim": "sgd"}
    trainer(tmp_path, model, train=train, target=target, options=options, nothing_useful="uniform").train()
    assert bool((model.layer.weight != 0).any())
    torch.testing.assert_close(torch.tensor(one["uniform"]), model.layer.weight.detach())


def test_sharded_parameters_are_refused(tmp_path):
    made = trainer(tmp_path)
    refuse(made)
    for name in ("fsdp", "deepspeed"):
        setattr(made, f"is_{name}_enabled", True)
        with pytest.raises(ValueError, match=f"{name} shards parameters"):
            refuse(made)
        setattr(made, f"is_{name}_enabled", False)


def test_rows_of_documents_are_refused(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.padding_free = True  # as TRL's SFTTrainer has it
    refuse(made)
    monkeypatch.setattr(type(made.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match=r"not shared by several processes yet: padding_free=False"):
        refuse(made)
