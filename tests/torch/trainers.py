"""Small models, data and trainers that the tests of the trainer's mixin share."""

import multiprocessing
import traceback
from pathlib import Path

import torch
from ftw_torch import FilterThenWeight
from ftw_torch.trainer import FilterThenWeightTrainer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainingArguments

V, T = 32, 10


def gpt(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    drop = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    config = GPT2Config(
        vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, **drop
    )
    return GPT2LMHeadModel(config)


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def data(n, seed, step=None):
    """Sequences that count up by ``step`` (random ones for None), of ragged length, padded."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        size = int(torch.randint(5, T + 1, (), generator=g))
        start = int(torch.randint(0, V, (), generator=g))
        ids = torch.randint(0, V, (T,), generator=g) if step is None else (start + step * torch.arange(T)) % V
        mask = torch.arange(T) < size
        samples.append(
            {
                "input_ids": ids.tolist(),
                "attention_mask": mask.long().tolist(),
                "labels": ids.where(mask, -100).tolist(),
            }
        )
    return samples


TRAIN = [x for pair in zip(data(48, 1), data(48, 2, step=1), strict=True) for x in pair]
TARGET = data(4, 3, step=1)


def arguments(path, **options):
    defaults = {
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 3,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(path), **(defaults | options))


def trainer(path, model=None, cls=FilterThenWeightTrainer, train=TRAIN, target=TARGET, keep=3, options=(), **kwargs):
    return cls(
        model=gpt() if model is None else model,
        args=arguments(path, **dict(options)),
        train_dataset=train,
        target_dataset=target,
        keep=keep,
        **kwargs,
    )


def logged(made, name):
    return [line[name] for line in made.state.log_history if name in line]


def batch(samples):
    return {key: torch.tensor([x[key] for x in samples]) for key in samples[0]}


def losses(model, inputs, smoothing=0.0):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    rows = []
    for scores, labels in zip(logits, inputs["labels"], strict=True):  # (t, v), (t,)
        rows.append(torch.nn.functional.cross_entropy(scores[:-1], labels[1:], label_smoothing=smoothing))
    return torch.stack(rows)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours, theirs, tol=1e-6):
    assert ours.keys() == theirs.keys()
    assert ours
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}")


class Watched(FilterThenWeightTrainer):
    """Keeps the inputs of each pool, the number of tokens said to be in its step, and the gradients after it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen, self.found, self.items = [], [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
        self.items.append(num_items_in_batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.found.append(grads(self.accelerator.unwrap_model(model)))
        return loss


class Line(torch.nn.Module):
    """A linear model without bias, at zero."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(self.layer.weight)

    def forward(self, x, labels=None):
        logits = self.layer(x)
        loss = None if labels is None else torch.nn.functional.mse_loss(logits[:, 0], labels)
        return {"loss": loss, "logits": logits}


def opposite():
    """Return a model, a pool of 8 and a target with opposite labels: every candidate's gradient points away."""
    train = [{"x": [1.0, 1.0 + i], "labels": -1.0} for i in range(8)]
    target = [{"x": [1.0, 1.0], "labels": 1.0} for _ in range(4)]
    return Line(), train, target


def processes(job, folder, world, timeout=120):
    """Run ``job(folder, rank)`` in fresh processes; return their exit codes and what they raised.

    They are forked from one that has imported the trainer, and so do not import it again.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ftw_torch.trainer", "transformers.trainer"])
    route = FilterThenWeight.__init__.__kwdefaults__["capture"]  # see conftest.py
    started = [context.Process(target=told, args=(job, folder, rank, route)) for rank in range(world)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=timeout)
        process.kill()
    errors = [path.read_text() for path in sorted(Path(folder).glob("*.error"))]
    return [process.exitcode for process in started], "\n".join(errors)


def told(job, folder, rank, route):
    torch.set_num_threads(1)
    FilterThenWeight.__init__.__kwdefaults__["capture"] = route
    try:
        job(folder, rank)
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        raise


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *"abcdefg"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
