"""Two processes of a trainer with forward scores, under FSDP2 or DDP, are one with both pools; what is refused."""

import functools
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from ftw_torch.trainer import FilterThenWeightTrainer
from ftw_torch.trainer.setup import refuse
from test_forward_ranks import whole
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from trainers import TARGET, TRAIN, arguments, data, gpt, logged, processes, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

FORWARD = {"score": "forward", "filter": "top_k", "weight": "uniform"}
COMMON = {"target_dataset": TARGET, "train_dataset": TRAIN, "select_after": 1, "watch_dataset": data(5, 7, step=1)}
OPTIONS = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 1}


def run(folder, rank, port, sharded):
    """Train as one of two processes, and write down what came of it."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["GPT2Block"]}
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2, "ddp_backend": "gloo"}
    more = {"fsdp": True, "fsdp_config": config} if sharded else {}
    args = arguments(folder, **OPTIONS, **sizes, **more)
    assert args.device.type == "cpu"
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # Accelerate shards on GPUs alone
    made = FilterThenWeightTrainer(gpt().double(), args, keep=2, **FORWARD, **COMMON)
    made.train()
    assert made.is_fsdp_enabled == sharded
    parameters = dict(made.model.named_parameters())
    assert all(hasattr(p, "placements") == sharded for p in parameters.values())
    result = {name: whole(p.detach()).flatten().tolist() for name, p in parameters.items()}
    names = ("match", "target_loss", "watch_loss", "picked_share", "loss", "grad_norm")
    Path(folder, f"{rank}.json").write_text(json.dumps([result, {name: logged(made, name) for name in names}]))


@pytest.mark.parametrize("sharded", [True, False])
def test_two_processes_are_one_with_both_pools(tmp_path, sharded):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    codes, errors = processes(functools.partial(run, port=port, sharded=sharded), tmp_path, 2)
    assert codes == [0, 0], errors
    one, two = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    sizes = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 4}
    alone = FilterThenWeightTrainer(
        gpt().double(), arguments(tmp_path, **OPTIONS, **sizes), keep=4, **FORWARD, **COMMON
    )
    alone.train()
    for name, p in alone.model.named_parameters():
        ours = torch.tensor(one[0][name], dtype=p.dtype)
        torch.testing.assert_close(ours, p.detach().flatten(), rtol=1e-6, atol=1e-9, msg=name)
    for name, values in one[1].items():
        assert values == pytest.approx(logged(alone, name), rel=1e-3), name  # the log has four digits


def sharding(folder, plugin, **options):
    """Return a trainer that believes itself under FSDP."""
    made = trainer(folder, **options)
    made.is_fsdp_enabled = True
    made.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), num_processes=2)
    return made


def test_settings_that_do_not_go_with_shards_are_refused(tmp_path):
    plugin = {"fsdp_version": 2, "cpu_offload": OffloadPolicy()}
    refuse(sharding(tmp_path, SimpleNamespace(**plugin), **FORWARD))
    for change, options, message in (
        ({"fsdp_version": 1}, FORWARD, "version 1"),
        ({"cpu_offload": CPUOffloadPolicy()}, FORWARD, "cpu_offload"),
        ({}, {**FORWARD, "nothing_useful": "uniform"}, "nothing_useful"),
        ({}, {}, "score='forward', filter='top_k', weight='uniform'"),
        ({}, {"score": "forward"}, "score='forward', filter='top_k', weight='uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(sharding(tmp_path, SimpleNamespace(**plugin | change), **options))
