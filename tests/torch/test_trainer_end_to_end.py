"""Real text, a transformers model from scratch, the Trainer: what is selected for one kind of text serves it."""

import random
import subprocess
import sys

import pytest
import torch
from ftw_torch.trainer import FilterThenWeightTrainer
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from ftw import report
from ftw.demo import corpus as corpora
from ftw.filters import Filtered

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

LENGTH, POOL, KEEP, WARM_UP, STEPS = 65, 64, 4, 150, 120


def samples(found):
    return [{"input_ids": list(s.text), "labels": list(s.text)} for s in found]


def model():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LENGTH, "vocab_size": 256}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop, bos_token_id=0, eos_token_id=0))


def trained(path, corpus, seed, name, **options):
    """Return the loss on the domain's test samples after some steps on whole pools and some that select."""
    stream = corpora.Stream(corpus, POOL, seed=seed)
    pools = [s for step in range(WARM_UP + STEPS) for s in stream.pool(step)]
    rng = random.Random(seed)
    target = rng.sample(corpus.target, 48)
    args = TrainingArguments(
        str(path), run_name=f"{name}, seed {seed}", per_device_train_batch_size=POOL, per_device_eval_batch_size=24,
        max_steps=WARM_UP + STEPS, learning_rate=2e-3, lr_scheduler_type="constant", logging_steps=20, seed=seed,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = FilterThenWeightTrainer(
        model(), args, train_dataset=samples(pools), target_dataset=samples(target[:24]),
        watch_dataset=samples(target[24:]), keep=KEEP, select_after=WARM_UP, **options,
    )  # fmt: skip
    trainer.train()
    test = random.Random(0).sample(corpus.test, 128)
    return trainer.evaluate(samples(test))["eval_loss"]


@pytest.mark.parametrize("seed", [0, 1])
def test_selection_beats_random_picks(tmp_path, seed):
    corpus = corpora.load(LENGTH)
    draw = torch.Generator().manual_seed(seed)

    def at_random(scores, gram, k):
        return Filtered(torch.randperm(len(scores), generator=draw)[:k], k)

    record = tmp_path / "run.jsonl"
    ours = trained(tmp_path, corpus, seed, "Filter-then-Weight", record=record)
    theirs = trained(tmp_path, corpus, seed, "random", filter=at_random, weight="uniform", guard=0.0)
    print(f"seed {seed}: loss on {corpus.domain} {ours:.3f} with selection, {theirs:.3f} with random picks")
    assert ours < theirs - 0.05

    (run,) = report.read(record).runs
    assert sorted(run.steps) == list(range(WARM_UP + 1, WARM_UP + STEPS + 1))
    assert len(run.values("watch_loss")) == STEPS // 10
    picked = [sample for _, sample in run.samples("picked")]
    assert len(picked) == STEPS * KEEP
    subprocess.run([sys.executable, "-m", "ftw.report", str(record)], check=True, capture_output=True)
    page = record.with_suffix(".html").read_text(encoding="utf-8")
    assert "Loss on the second target split by step" in page
    assert "Loss on the target samples" in page
    assert "<script" not in page
