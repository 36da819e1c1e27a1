"""The trial from the command line: transformers models made here, files with every defect, no downloads."""

import csv
import functools
import json
import os
import random
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from ftw_torch.trial import command, data, experiment, models
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ftw import report

SMALL = {"vocab_size": 258, "bos_token_id": 257, "eos_token_id": 257}
GPT2 = {"n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, **SMALL}
LLAMA = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32, **SMALL,
}  # fmt: skip


def byte_tokenizer():
    vocabulary = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(BPE(vocab={**vocabulary, "<pad>": 256, "<eos>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function from a kind of model to the folder it is saved in."""
    root = tmp_path_factory.mktemp("models")

    @functools.cache
    def make(kind):
        torch.manual_seed(0)
        build = {
            "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
            "classifier": lambda: GPT2ForSequenceClassification(
                GPT2Config(**GPT2, pad_token_id=256, id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
            ),
            "neither": lambda: GPT2Model(GPT2Config(**GPT2)),
        }[kind]
        build().save_pretrained(root / kind)
        byte_tokenizer().save_pretrained(root / kind)
        return str(root / kind)

    return make


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Count time by calls of the clock, 0.01 s each: results do not depend on the machine."""

    class Ticks:
        count = 0

        def __call__(self):
            self.count += 1
            return self.count * 0.01

    monkeypatch.setattr(command, "run", lambda *args, **options: experiment.run(*args, clock=Ticks(), **options))


def words(count, salt, letters):
    rng = random.Random(f"{salt}")
    return ["".join(rng.choice(letters) for _ in range(rng.randrange(4, 14))) for _ in range(count)]


def rows(kind, count, salt, letters="abcdefgh "):
    found = words(count, salt, letters)
    if kind == "text":
        return [{"text": word + str(i), "source": "x"} for i, word in enumerate(found)]
    if kind == "prompt":
        return [{"prompt": word, "completion": f" is {salt} {i}"} for i, word in enumerate(found)]
    return [{"text": word + f"{salt}{i}", "label": kind[1:][i % 2]} for i, word in enumerate(found)]


def save(path, found):
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, found[0].keys())
            writer.writeheader()
            writer.writerows(found)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


def files(tmp_path, kind="text", suffix=".jsonl"):
    splits = {"pool": (40, "abcdefgh "), "target": (15, "stuvwxyz "), "test": (6, "stuvwxyz ")}
    return {
        name: save(tmp_path / f"{name}{suffix}", rows(kind, count, name, letters))
        for name, (count, letters) in splits.items()
    }


def main(tmp_path, model, splits, *more):
    given = ["--model", model, "--output", tmp_path / "page.html", "--minutes", 0.06, "--lr", 1e-2]
    given += ["--keep", 2, "--pool-size", 6, "--target-size", 4, "--seeds", 3, "--max-length", 24]
    given += [word for name, path in splits.items() for word in (f"--{name}", path)]
    return command.main([*map(str, given), *map(str, more)])


@pytest.mark.parametrize(
    ("model", "kind", "suffix", "more"),
    [
        ("gpt2", "text", ".jsonl", []),
        ("llama", "prompt", ".csv", ["--micro-batch", 2]),
        ("classifier", ("label", "good", "bad"), ".csv", []),
        ("classifier", ("label", 0, 1), ".jsonl", []),
    ],
)
def test_from_files_to_the_page(made, tmp_path, capsys, model, kind, suffix, more):
    code = main(tmp_path, made(model), files(tmp_path, kind, suffix), *more)
    printed = capsys.readouterr()
    assert code == 0, printed.err
    for name in ("random", "rand+T", "whole pool", "forward top-k", "Filter-then-Weight", "95 % interval", "test"):
        assert name in printed.out
    assert "is left out" not in printed.out
    sentence = next(line for line in printed.out.splitlines() if line.startswith(("Use ", "None can be told")))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert sentence.split(":")[0] in page
    assert "<svg" in page
    assert "<script" not in page
    record = report.read(tmp_path / "page.jsonl")
    assert [run.seed for run in record.methods["Filter-then-Weight"]] == [1, 2, 3]
    assert record.header["task"] == ("sequence classifier" if model == "classifier" else "causal language model")
    assert str(tmp_path / "page.jsonl") in printed.out


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora(made, tmp_path, capsys):
    pytest.importorskip("peft")
    assert main(tmp_path, made("llama"), files(tmp_path), "--lora") == 0
    assert "is left out" not in capsys.readouterr().out
    header = report.read(tmp_path / "page.jsonl").header
    assert header["model"].endswith("with LoRA")
    whole = sum(p.numel() for p in LlamaForCausalLM(LlamaConfig(**LLAMA)).parameters())
    assert 0 < int(header["trained"].split()[0].replace(",", "")) < whole


def test_a_prompt_is_not_learned(made):
    user = models.load(made("llama"), lora=False, device=None, max_length=24)
    row = data.Row("ab", "cd", None, 1)
    (found,), _ = user.encode(data.Table("x", (row,), ("prompt", "completion")))
    assert len(found.tokens) == 5  # and the end
    assert found.labels[:2] == [-100, -100]
    assert found.labels[2:] == found.tokens[2:]
    assert found.tokens[-1] == 257
    batch = user.collate([found, models.Encoded(found.tokens[:4], found.labels[:4])])
    assert batch["attention_mask"].sum(1).tolist() == [5, 4]
    assert batch["labels"][1, 4] == -100
    logits = user.model(input_ids=batch["input_ids"][:1]).logits[0].log_softmax(-1)
    by_hand = -sum(logits[i - 1, found.tokens[i]] for i in (2, 3, 4)) / 3
    torch.testing.assert_close(user.per_sample_loss(user.model, batch)[0], by_hand)


def test_a_long_prompt_leaves_nothing_to_learn(made):
    user = models.load(made("llama"), lora=False, device=None, max_length=24)
    long, short = data.Row("a" * 30, "b", None, 1), data.Row("a" * 20, "b" * 9, None, 2)
    found, notes = user.encode(data.Table("x", (long, short), ("prompt", "completion")))
    assert len(found) == 1
    assert notes == [
        "x: 1 rows are left out: nothing to predict in 24 tokens",
        "x: 1 of 1 samples fill 24 tokens or are cut there",
    ]


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong is said before it starts


def refused(capsys, code, *patterns):
    err = capsys.readouterr().err
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, err
    for pattern in patterns:
        assert pattern in lines[0]


@pytest.mark.parametrize("split", ["pool", "target", "test"])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "there is no such file"),
        ("x.jsonl", b"", "is empty"),
        ("x.csv", b"", "is empty"),
        ("x.csv", b"text\n", "is empty"),
        ("x.jsonl", b'{"words": "a"}\n', "no text column among ['words']"),
        ("x.jsonl", b'{"prompt": "a"}\n', "no text column among ['prompt']"),
        ("x.csv", b"a,b\n1,2\n", "no text column among ['a', 'b']"),
        ("x.jsonl", b'{"text": "a"}\n\n{"text": "a", "label": 1}\n', "unequal columns: line 3 has ['label', 'text']"),
        ("x.csv", b"text,label\na,1\nb\n", "unequal columns: the row that ends in line 3 has 1 fields, the heading 2"),
        ("x.csv", b"text\na,1\n", "unequal columns: the row that ends in line 2 has 2 fields, the heading 1"),
        ("x.jsonl", b'{"text": 3}\n', "line 1: text is a int; expected text"),
        ("x.jsonl", b'{"text": null}\n', "line 1: text is a NoneType"),
        ("x.jsonl", b'{"text": "a", "label": [1]}\n', "line 1: label is a list"),
        ("x.jsonl", b'{"text": " "}\n', "no row has any text"),
        ("x.jsonl", b"[1]\n", "line 1 is a list"),
        ("x.jsonl", b"{\n", "line 1 is not JSON"),
        ("x.jsonl", b'{"text": "\xff"}\n', "not UTF-8"),
        ("x.pdf", b"x", "unknown suffix '.pdf'"),
        ("x.parquet", b"x", "cannot be read"),
        ("folder", None, "is a folder"),
    ],
)
def test_bad_files(tmp_path, capsys, split, name, content, words):
    if name.endswith(("pdf", "parquet")):
        pytest.importorskip("datasets")
    splits = files(tmp_path)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name == "folder":
        path.mkdir()
    splits[split] = str(path)
    refused(capsys, main(tmp_path, "no-model", splits), str(path), words)
    assert not (tmp_path / "page.jsonl").exists()


def test_an_unreadable_file(tmp_path, capsys, monkeypatch):
    splits = files(tmp_path)

    def refuse(*args, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data, "_json_rows", refuse)
    refused(capsys, main(tmp_path, "no-model", splits), splits["pool"], "Permission denied")


def test_files_with_other_columns_than_the_first(tmp_path, capsys):
    splits = files(tmp_path)
    splits["target"] = save(tmp_path / "other.csv", rows("prompt", 15, "t"))
    refused(
        capsys, main(tmp_path, "no-model", splits), "unequal columns", "pool.jsonl has text, ", "prompt, completion"
    )


@pytest.mark.parametrize(("one", "other"), [("target", "pool"), ("test", "pool"), ("test", "target")])
def test_samples_in_two_files(tmp_path, capsys, one, other):
    splits = files(tmp_path)
    shared = rows("text", 40, other, "abcdefgh " if other == "pool" else "stuvwxyz ")[3]
    Path(splits[one]).write_text(
        Path(splits[one]).read_text() + json.dumps({**shared, "text": f"  {shared['text']}\n"}) + "\n"
    )
    count = len(Path(splits[one]).read_text().splitlines())
    refused(
        capsys, main(tmp_path, "no-model", splits), f"1 of the {count} samples of {splits[one]}",
        f"are in {splits[other]} too (line {count}, there line 4)",
    )  # fmt: skip


def test_too_few_samples_or_minutes(made, tmp_path, capsys):
    splits = files(tmp_path)
    refused(
        capsys, main(tmp_path, made("gpt2"), splits, "--pool-size", 41), "too few samples: the pool has 40", "--keep"
    )
    refused(capsys, main(tmp_path, made("gpt2"), splits, "--minutes", 0.02), "too few minutes", "--minutes")
    splits["target"] = save(tmp_path / "few.jsonl", rows("text", 6, "t", "xyz") * 3)
    refused(capsys, main(tmp_path, made("gpt2"), splits), "too few samples: the target has 6")


def test_models_that_do_not_fit(made, tmp_path, capsys):
    splits = files(tmp_path)
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(capsys, main(tmp_path, str(empty), splits), f"--model {empty}", "no config.json")
    refused(capsys, main(tmp_path, made("neither"), splits), "['GPT2Model']", "save_pretrained")
    refused(capsys, main(tmp_path, made("classifier"), splits), "pool.jsonl: no label column")
    labelled = files(tmp_path, ("label", 0, 2))
    refused(
        capsys, main(tmp_path, made("classifier"), labelled), "line 2: label 2 is none of the model's 2", "bad, good"
    )


def test_a_model_without_weights_or_tokenizer(made, tmp_path, capsys):
    splits = files(tmp_path)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text(Path(made("gpt2"), "config.json").read_text())
    code = main(tmp_path, str(bare), splits)
    refused(capsys, code, f"--model {bare}", "cannot be loaded")  # which of the two comes first is transformers' affair
    GPT2LMHeadModel(GPT2Config(**GPT2)).save_pretrained(bare)
    refused(capsys, main(tmp_path, str(bare), splits), f"--model {bare}", "tokenizer")
    byte_tokenizer().save_pretrained(bare)
    (bare / "model.safetensors").unlink()
    refused(capsys, main(tmp_path, str(bare), splits), f"--model {bare}", "a model cannot be loaded")


def test_outputs_that_cannot_be_written(tmp_path, capsys):
    splits = files(tmp_path)
    code = main(tmp_path, "no-model", splits, "--output", tmp_path)
    refused(capsys, code, f"--output {tmp_path}: is a folder")
    code = main(tmp_path, "no-model", splits, "--output", tmp_path / "no/page.html")
    refused(capsys, code, "there is no folder")
    code = main(tmp_path, "no-model", splits, "--output", tmp_path / "pool.html")
    refused(capsys, code, "would overwrite the input", "pool.jsonl")
    assert len(Path(splits["pool"]).read_text().splitlines()) == 40
    code = main(tmp_path, "no-model", splits, "--output", tmp_path / "page.jsonl")
    refused(capsys, code, "another suffix")


def test_a_read_only_output(tmp_path, capsys, monkeypatch):
    splits, closed = files(tmp_path), tmp_path / "closed"
    closed.mkdir()
    access = os.access  # root may write everywhere: ask as if it were somebody else
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    code = main(tmp_path, "no-model", splits, "--output", closed / "page.html")
    refused(capsys, code, f"--output {closed / 'page.html'}", "read-only")


@pytest.mark.parametrize("after", [0, 20])
def test_an_interrupt_names_the_record(made, tmp_path, capsys, monkeypatch, after):
    (tmp_path / "page.jsonl").write_text("from another run\n")
    race, count = experiment.race, [0]

    def interrupted(*args, **options):
        count[0] += 1
        if count[0] > after:
            raise KeyboardInterrupt
        return race(*args, **options)

    monkeypatch.setattr(experiment, "race", interrupted)
    assert main(tmp_path, made("gpt2"), files(tmp_path)) == 130
    err = capsys.readouterr().err
    assert f"Interrupted before the verdict: the record {tmp_path / 'page.jsonl'} has what was measured" in err
    record = report.read(tmp_path / "page.jsonl")
    assert sum(bool(run.values("watch_loss")) for run in record.runs) == after
    assert not (tmp_path / "page.html").exists()


def test_an_interrupt_before_the_record(tmp_path, capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "read_tables", interrupted)
    assert main(tmp_path, "no-model", files(tmp_path)) == 130
    assert f"the record {tmp_path / 'page.jsonl'} not begun" in capsys.readouterr().err


def test_text_of_the_user_is_escaped(made, tmp_path):
    name = tmp_path / "<script>"
    name.symlink_to(made("gpt2"))
    assert main(tmp_path, str(name), files(tmp_path)) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_a_long_file_is_cut_at_random(tmp_path):
    path = save(tmp_path / "long.jsonl", rows("text", 50, "x"))
    found = data.read(path, most=20)
    assert len(found.rows) == 20
    assert found.rows == data.read(path, most=20).rows
    assert [row.line for row in found.rows] != list(range(1, 21))
    assert found.notes == (f"{path}: a random 20 of its 50 rows are used",)


def test_parquet_goes_through_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "x.parquet"
    datasets.Dataset.from_list(rows("text", 5, "x")).to_parquet(str(path))
    found = data.read(str(path))
    assert [row.text for row in found.rows] == [row["text"] for row in rows("text", 5, "x")]
