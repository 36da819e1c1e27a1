"""The table of docs/trainers.md: families of models by styles of training, each cell tried.

``python tests/torch/test_trainer_table.py`` writes it anew.
"""

import functools
import json
import os
import socket
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from ftw_torch import CaptureWarning
from loss_kinds import KINDS, SAMPLES, a_class, gpt_classes, mixtral, next_token, texts
from test_trainer_ragged import collate, qwen, samples
from trainers import Watched, gpt, llama, processes, trainer

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*pattern keys:RuntimeWarning"),  # by peft, of Mixtral
]
PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
BEGIN, END = "<!-- table: tests/torch/test_trainer_table.py -->\n", "<!-- end of table -->\n"
EVERYTHING = {"keep": 1.0, "filter": "top_k", "weight": "uniform", "shortlist": None, "guard": 0.0}


def of_kind(name):
    model, labels = KINDS[name]
    return model, labels if labels in SAMPLES else lambda n, seed: texts(n, seed, labels)


FAMILIES = {
    "Llama": (llama, lambda n, seed: texts(n, seed, next_token)),
    "GPT-2": (gpt, lambda n, seed: texts(n, seed, next_token)),
    "GPT-2, classes": (gpt_classes, lambda n, seed: texts(n, seed, a_class)),
    "Mixtral, router loss": (mixtral, lambda n, seed: texts(n, seed, next_token)),
    "BERT, masked": of_kind("masked"),
    "BERT, classes": of_kind("sequence classes"),
    "T5": of_kind("T5"),
    "BART": of_kind("BART"),
    "LLaVA": of_kind("images and text"),
    "Qwen2-VL": (lambda: qwen(frozen=False), samples),
    "ViT": of_kind("images"),
    "Wav2Vec2, CTC": of_kind("speech, mean"),
}
QUANTIZED = {
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "8": {"load_in_8bit": True},
}
STYLES = {
    "full": {},
    "LoRA": {"adapter": {}},
    "DoRA": {"adapter": {"use_dora": True}},
    "QLoRA, 4 bits": {"adapter": {}, "bits": "4"},
    "LoRA on 8 bits": {"adapter": {}, "bits": "8", "tol": 3e-2},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "bf16": {"options": {"bf16": True}, "tol": 3e-2},
    "compiled": {"options": {"torch_compile": True, "torch_compile_backend": "eager"}},
    "packing": {"packed": True},
    "two processes": {},  # all families in one pair of processes
}


def tuned(make, adapter, bits=None, folder=None):
    model = make()
    if bits is not None:
        if not (folder / "config.json").exists():
            model.save_pretrained(folder)
        quantized = transformers.BitsAndBytesConfig(**QUANTIZED[bits])
        model = type(model).from_pretrained(
            folder, quantization_config=quantized, dtype=torch.float32, device_map={"": "cpu"}
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # its kernel for inference takes no layers as narrow
    model.config.use_cache = False
    if adapter is None:
        return model
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **adapter)
    return peft.get_peft_model(model, config)


def documents(sample):
    """Return a sample without padding, if its labels are those of its tokens; None if it cannot be packed."""
    labels = sample.get("labels")
    if set(sample) != {"input_ids", "attention_mask", "labels"} or not isinstance(labels, list):
        return None
    size = sum(sample["attention_mask"])
    return {"input_ids": sample["input_ids"][:size], "labels": [-100, *labels[1:size]]}


def verdict(path, make, data, adapter=None, options=(), tol=1e-4, bits=None, packed=False, world=1):
    """Return whether a step on everything is the plain trainer's, and how it was had: exact, slow, refused or wrong.

    "none" where peft or bitsandbytes has no such adapter for the model, or its samples cannot be packed.
    """
    extra = {"data_collator": collate} if data is samples else {}
    pool, target = data(8, 1), data(4, 2)
    if packed:
        pool, target = (list(map(documents, some)) for some in (pool, target))
        if None in pool:
            return "none"
        extra = {"data_collator": transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)}
    try:
        tuned(make, adapter, bits, path)
    except (ValueError, TypeError, RuntimeError):
        return "none"
    sizes = {"per_device_train_batch_size": 8 // world, "per_device_eval_batch_size": 4 // world}
    sizes |= {"ddp_backend": "gloo"} if world > 1 else {}
    options = {"max_steps": 1, "remove_unused_columns": data is not samples, **sizes, **dict(options)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = trainer(
                path, tuned(make, adapter, bits, path), Watched, train=pool, target=target, options=options, **extra,
                **EVERYTHING,
            )  # fmt: skip
            made.train()
        except (RuntimeError, ValueError, TypeError):
            return "refused"
    seen = [made.seen[0]]
    if world > 1:
        seen = [None] * world
        torch.distributed.all_gather_object(seen, made.seen[0])
    again = tuned(make, adapter, bits, path).train()
    term = 0.0

    def outputs_of(inputs):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
            return again(**inputs)

    for x in pool:
        outputs = outputs_of(made.data_collator([x]))
        loss = outputs["loss"]
        if getattr(outputs, "aux_loss", None) is not None:  # the whole batches' follows
            loss = loss - again.config.router_aux_loss_coef * outputs.aux_loss
        (loss / 8).backward()
    if getattr(outputs, "aux_loss", None) is not None:
        term = sum(again.config.router_aux_loss_coef * outputs_of(x).aux_loss for x in seen) / world
        term.backward()
    theirs = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    ours, whole = made.found[0], torch.cat([g.flatten() for g in theirs.values()]).norm()
    ours = {name.removeprefix("_orig_mod."): g for name, g in ours.items()}
    if ours.keys() != theirs.keys() or any((ours[k] - g).norm() > tol * whole for k, g in theirs.items()):
        return "wrong"
    return "slow" if any(issubclass(w.category, CaptureWarning) for w in caught) else "exact"


def shared(folder, rank, port):
    """Try every family as one of two processes."""
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    found = {name: verdict(Path(folder) / name, make, data, world=2) for name, (make, data) in FAMILIES.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def by_two(path):
    """Return the verdict of each family in two processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    codes, errors = processes(functools.partial(shared, port=port), path, 2, timeout=600)
    assert codes == [0, 0], errors
    one, two = (json.loads((path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == two
    return one


def table(path, families=FAMILIES):
    """Return the table in Markdown."""
    lines = ["| | " + " | ".join(STYLES) + " |", "|---|" + "---|" * len(STYLES)]
    together = by_two(path)
    for family, (make, data) in families.items():
        folders = [path / family / name for name in STYLES]
        styles = [style for name, style in STYLES.items() if name != "two processes"]
        cells = [verdict(folder, make, data, **style) for folder, style in zip(folders, styles, strict=False)]
        cells.append(together[family])
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written():
    return PAGE.read_text().split(BEGIN)[1].split(END)[0]


def test_the_table_is_what_comes_of_trying(tmp_path):
    assert "wrong" not in written()
    assert table(tmp_path) == written()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = table(Path(folder))
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + found + END + rest.split(END)[1])
    print(found)
