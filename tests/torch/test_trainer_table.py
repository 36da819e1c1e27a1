"""The table of docs/trainers.md: families of models by styles of training, each cell tried.

``python tests/torch/test_trainer_table.py`` writes it anew.
"""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from ftw_torch import CaptureWarning
from loss_kinds import KINDS, SAMPLES, a_class, gpt_classes, mixtral, next_token, texts
from test_trainer_ragged import collate, qwen, samples
from trainers import Watched, gpt, llama, trainer

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
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
STYLES = {
    "full": {},
    "LoRA": {"adapter": {}},
    "DoRA": {"adapter": {"use_dora": True}},
    "checkpointing": {"options": {"gradient_checkpointing": True}},
    "bf16": {"options": {"bf16": True}, "tol": 3e-2},
}


def tuned(make, adapter):
    model = make()
    if adapter is None:
        return model
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **adapter)
    return peft.get_peft_model(model, config)


def verdict(path, make, data, adapter=None, options=(), tol=1e-4):
    """Return whether a step on everything is the plain trainer's, and how it was had: exact, slow, refused or wrong.

    "none" where peft has no such adapter for the model.
    """
    try:
        tuned(make, adapter)
    except ValueError:
        return "none"
    extra = {"data_collator": collate} if data is samples else {}
    options = {"max_steps": 1, "remove_unused_columns": not extra, **dict(options)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            made = trainer(
                path, tuned(make, adapter), Watched, train=data(8, 1), target=data(4, 2), options=options, **extra,
                **EVERYTHING,
            )  # fmt: skip
            made.train()
        except (RuntimeError, ValueError, TypeError):
            return "refused"
    again = tuned(make, adapter).train()
    term = 0.0
    for i, x in enumerate(data(8, 1)):
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
            outputs = again(**made.data_collator([x]))
        loss = outputs["loss"]
        if getattr(outputs, "aux_loss", None) is not None:  # the whole batch's follows
            loss = loss - again.config.router_aux_loss_coef * outputs.aux_loss
            if i == 0:
                with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in options):
                    term = again.config.router_aux_loss_coef * again(**made.seen[0]).aux_loss
        (loss / 8).backward()
    if isinstance(term, torch.Tensor):
        term.backward()
    theirs = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    ours, whole = made.found[0], torch.cat([g.flatten() for g in theirs.values()]).norm()
    if ours.keys() != theirs.keys() or any((ours[k] - g).norm() > tol * whole for k, g in theirs.items()):
        return "wrong"
    return "slow" if any(issubclass(w.category, CaptureWarning) for w in caught) else "exact"


def table(path, families=FAMILIES):
    """Return the table in Markdown."""
    lines = ["| | " + " | ".join(STYLES) + " |", "|---|" + "---|" * len(STYLES)]
    for family, (make, data) in families.items():
        cells = [verdict(path, make, data, **style) for style in STYLES.values()]
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
        found = table(folder)
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + found + END + rest.split(END)[1])
    print(found)
