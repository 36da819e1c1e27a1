"""Packing and padding-free batches in trainers: documents are the candidates, each with the loss it has alone."""

import pytest
import torch
from ftw_torch import PackedBatch
from ftw_torch.trainer import FilterThenWeightMixin
from ftw_torch.trainer.documents import Documents, in_one_row
from trainers import TARGET, TRAIN, Watched, assert_close, gpt, grads, llama, logged, tiny_tokenizer, trainer
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from ftw import Quota, report

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
EVERYTHING = {"keep": 1.0, "filter": "top_k", "weight": "uniform", "shortlist": None, "guard": 0.0}


class SelectingSFTTrainer(FilterThenWeightMixin, trl.SFTTrainer):
    """Keeps the gradient after each pool."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.found = grads(self.model)
        return loss


def words(n, seed):
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(3, 9, (n,), generator=g).tolist()
    return datasets.Dataset.from_dict(
        {"text": [" ".join("abcdefg"[i] for i in torch.randint(7, (k,), generator=g).tolist()) for k in sizes]}
    )


def tuned(path, name, **options):
    """Train one step on the whole of 16 documents, in whatever rows."""
    args = trl.SFTConfig(
        output_dir=str(path), per_device_train_batch_size=16, per_device_eval_batch_size=4, max_steps=1,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        **{"max_length": 12, **options},
    )  # fmt: skip
    made = SelectingSFTTrainer(
        model=llama(), args=args, train_dataset=words(16, 0), target_dataset=words(4, 1), keep=5, guard=0.2,
        processing_class=tiny_tokenizer(), record=path / f"{name}.jsonl", record_text=True,
    )  # fmt: skip
    made.train()
    (run,) = report.read(path / f"{name}.jsonl").runs
    return made, {sample["text"]: sample["weight"] for sample in run.steps[1]["picked"]}


@pytest.mark.filterwarnings("ignore:.*flash.attention.*:UserWarning")
def test_packed_documents_are_selected_as_those_apart(tmp_path, caplog):
    """Rows are of several documents with packing, and one of all without padding."""
    apart, picked = tuned(tmp_path, "apart")
    assert len(picked) == 5
    for name, options in (("packed", {"packing": True}), ("free", {"padding_free": True, "max_length": None})):
        made, found = tuned(tmp_path, name, **options)
        assert "were dropped" not in caplog.text
        assert (len(made.train_dataset) < 16) == (name == "packed")
        assert found == pytest.approx(picked, abs=1e-5)
        assert_close(made.found, apart.found, 1e-5)
        for key in ("loss", "match", "effective_size", "picked_share", "num_tokens", "target_loss"):
            assert logged(made, key) == pytest.approx(logged(apart, key), rel=1e-4), key


def test_sources_of_documents(tmp_path):
    def tuned_by(**options):
        args = trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=16, max_steps=2, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
            **{"max_length": None, **options},
        )  # fmt: skip
        train = words(16, 0).add_column("kind", ["a", "b"] * 8)
        made = SelectingSFTTrainer(
            model=llama(), args=args, train_dataset=train, target_dataset=words(4, 1), keep=4, sources="kind",
            quota=Quota(None, at_most={"a": 1}), processing_class=tiny_tokenizer(), steps_per_pool=2,
        )  # fmt: skip
        made.train()
        return made

    made = tuned_by(padding_free=True)
    assert logged(made, "picked_share") == [0.25, 0.25]
    assert max(logged(made, "picked/a")) <= 0.25
    assert logged(made, "num_tokens")[0] == logged(made, "num_tokens")[-1]
    with pytest.raises(ValueError, match="packing=True drops the column 'kind'"):
        tuned_by(packing=True, max_length=12)


def ragged(samples):
    """Samples without their padding."""
    return [{k: x[k][: sum(x["attention_mask"])] for k in ("input_ids", "labels")} for x in samples]


def flattened(path, model=None, collator=None, **kwargs):
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True) if collator is None else collator
    model = gpt() if model is None else model
    model.config.use_cache = False  # transformers 4.57 lets documents look at each other where there is a cache
    return trainer(
        path, model, Watched, train=ragged(TRAIN), target=ragged(TARGET), data_collator=collator, **kwargs
    )  # fmt: skip


@pytest.mark.parametrize("extra", [{"micro_batch": 3, "loss_unit": "token"}, {"filter": "top_k"}])
def test_a_flattening_collator_is_the_padded_run(tmp_path, extra):
    """Documents of pools that are accumulated: gradients and what is logged."""
    options = {"max_steps": 2, "gradient_accumulation_steps": 2}
    ours = flattened(tmp_path, llama(), options=options, **extra)
    apart = [{**x, "labels": [-100, *x["labels"][1:]]} for x in TRAIN]  # which transformers 4 would count
    theirs = trainer(tmp_path, llama(), Watched, train=apart, options=options, **extra)
    ours.train()
    theirs.train()
    for mine, other in zip(ours.found, theirs.found, strict=True):
        assert_close(mine, other, 1e-5)
    for key in ("loss", "grad_norm", "match", "effective_size", "picked_share", "target_loss", "shrinkage"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-3), key


def test_all_documents_by_token_are_the_trainers_own_step(tmp_path):
    options = {"max_steps": 1, "gradient_accumulation_steps": 2}
    plain = flattened(tmp_path, gpt(), options=options, select_after=5)
    ours = flattened(tmp_path, gpt(), options=options, loss_unit="token", **EVERYTHING)
    plain.train()
    ours.train()
    assert_close(ours.found[-1], plain.found[-1], 1e-5)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=0.05)


def test_losses_of_ones_own_get_the_packed_batch(tmp_path):
    def own(model, batch):
        assert isinstance(batch, PackedBatch)
        logits = model(**{k: batch.tensors[k] for k in ("input_ids", "position_ids")}, use_cache=False).logits
        labels = torch.nn.functional.pad(batch.tensors["labels"], (0, 1), value=-100)[:, 1:]
        values = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return batch.mean(values.view_as(labels), labels != -100)

    def by_function(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:])

    wanted = flattened(tmp_path, options={"max_steps": 1})
    wanted.train()
    for extra in ({"per_sample_loss": own}, {"compute_loss_func": by_function}):
        made = flattened(tmp_path, options={"max_steps": 1}, **extra)
        made.train()
        assert_close(made.found[0], wanted.found[0], 1e-5)


class Blind(LlamaForCausalLM):
    """Counts positions through the row, and looks across it."""

    def forward(self, input_ids, position_ids=None, labels=None, **kwargs):
        return super().forward(input_ids, labels=labels, **kwargs)


def test_documents_that_look_at_each_other_are_refused(tmp_path):
    for own in (None, lambda model, batch: torch.zeros(batch.n)):
        made = flattened(tmp_path, Blind(llama().config), per_sample_loss=own and crossing)
        with pytest.raises(RuntimeError, match="look at each other"):
            made.train()


def crossing(model, batch):
    logits = model(input_ids=batch.tensors["input_ids"], use_cache=False).logits
    values = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.tensors["input_ids"].flatten(), reduction="none"
    )
    return batch.mean(values.view_as(batch.samples))


def test_rows_that_do_not_say_where_documents_begin_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not say where they begin"):
        flattened(tmp_path, collator=DataCollatorWithFlattening(return_position_ids=False))


def test_documents_of_a_row():
    """Any of them make a row; a token that is a document without a label is padding."""
    row = {
        "input_ids": torch.tensor([[4, 5, 6, 7, 8, 9, 0, 0]]),
        "labels": torch.tensor([[-100, 5, 6, -100, 8, 9, -100, -100]]),
        "position_ids": torch.tensor([[2, 3, 4, 2, 3, 4, 0, 0]]),
        "cu_seq_lens_q": torch.tensor([0, 3, 6, 7, 8], dtype=torch.int32), "max_length_q": 3,
        "seq_idx": torch.tensor([[0, 0, 0, 1, 1, 1, 2, 3]], dtype=torch.int32), "domain": ["a", "b"],
    }  # fmt: skip
    found = in_one_row(row)
    assert isinstance(found, Documents)
    assert found.samples.tolist() == [[0, 0, 0, 1, 1, 1]]
    assert found.tensors["cu_seq_lens_q"].tolist() == [0, 3, 6]
    twice = found.take(torch.tensor([1, 1]))
    assert twice.tensors["input_ids"].tolist() == [[7, 8, 9, 7, 8, 9]]
    assert twice.tensors["seq_idx"].tolist() == [[0, 0, 0, 1, 1, 1]]
    assert twice.tensors["position_ids"].tolist() == [[2, 3, 4, 2, 3, 4]]
    assert (twice.tensors["domain"], twice.tensors["max_length_q"]) == (["b", "b"], 3)
    assert [x.tensors["domain"] for x in found.split(1)] == [["a"], ["b"]]
    plain = {name: row[name] for name in ("input_ids", "labels", "position_ids")}
    assert in_one_row(plain).samples.tolist() == [[0, 0, 0, 1, 1, 1]]
    ordinary = {"input_ids": torch.ones(2, 3, dtype=torch.int64), "position_ids": torch.arange(3).expand(2, 3)}
    assert in_one_row(ordinary) is None
    with pytest.raises(ValueError, match="attention_mask stands beside"):
        in_one_row({**plain, "attention_mask": torch.ones(1, 8)})
    with pytest.raises(ValueError, match=r"'mask': \(1, 1, 8, 8\).*neither"):
        in_one_row({**plain, "mask": torch.ones(1, 1, 8, 8)})
