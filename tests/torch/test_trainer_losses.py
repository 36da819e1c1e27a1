"""What the trainer selects on: the loss of each sample alone, as the plain trainer computes it, or nothing."""

from contextlib import nullcontext

import pytest
import torch
from ftw_torch import BatchingWarning, SelectionError
from ftw_torch.trainer import FilterThenWeightMixin
from loss_kinds import KINDS, kind, mixtral, my_llama, next_token, sharp, some_tokens, t5, texts
from trainers import TARGET, Watched, arguments, assert_close, batch, gpt, llama, logged, losses, trainer
from transformers import Trainer

from ftw import report

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exact but slow:UserWarning"),
]
EVERYTHING = {"keep": 1.0, "filter": "top_k", "weight": "uniform", "shortlist": None, "guard": 0.0}


def plain_losses(tmp_path, model, samples, options=(), cls=Trainer, **kwargs):
    """Return a plain trainer's losses of samples alone (n,), with their graph."""
    plain = cls(model=model, args=arguments(tmp_path, **dict(options)), train_dataset=samples, **kwargs)
    rows = [plain.data_collator([x]) for x in samples]
    model.train()
    found = [plain.compute_loss(model, dict(row)) for row in rows]
    return torch.stack([x.mean() for x in found])


def check(tmp_path, model, again, samples, target, options=(), tol=2e-5, **kwargs):
    """One step on everything has the mean of the plain trainer's gradients of the samples alone."""
    made = trainer(
        tmp_path, model, Watched, train=samples, target=target, options={"max_steps": 1, **dict(options)},
        **EVERYTHING, **kwargs,
    )  # fmt: skip
    expected = plain_losses(tmp_path, again, samples, options, **kwargs)
    inputs = made.data_collator(samples)
    model.train()
    torch.testing.assert_close(made.per_sample_loss(model, inputs), expected, rtol=tol, atol=tol)
    assert len({round(x, 5) for x in expected.tolist()}) > 4
    made.train()
    expected.mean().backward()
    theirs = {name: p.grad for name, p in again.named_parameters() if p.grad is not None}
    assert_close(made.found[0], theirs, tol)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_loss_is_the_models_own(tmp_path, name):
    """Where an answer may begin anywhere, padding counts: that is said."""
    model, samples = kind(name, 8, 1)
    with pytest.warns(BatchingWarning, match="Padding leaks") if name == "answers" else nullcontext():
        check(tmp_path, model, kind(name, 1, 1)[0], samples, kind(name, 4, 2)[1])


def after_the_first(g, ids, mask):
    """Labels with what their decoder reads, as the collator for sequences to sequences makes it."""
    return {**some_tokens(g, ids, mask), "decoder_input_ids": [0, *ids[:-1].tolist()]}


@pytest.mark.parametrize(("make", "labels"), [(gpt, next_token), (llama, next_token), (t5, after_the_first)])
def test_label_smoothing_is_the_trainers(tmp_path, make, labels):
    options = {"label_smoothing_factor": 0.2}
    check(tmp_path, make(), make(), texts(8, 1, labels), texts(4, 2, labels), options)


def test_label_smoothing_without_a_shift_is_said(tmp_path, caplog):
    """The trainer shifts for the classes of a list only; what it does is done, and said."""
    options = {"label_smoothing_factor": 0.2}
    check(tmp_path, my_llama(), my_llama(), texts(8, 1, next_token), texts(4, 2, next_token), options)
    assert "label smoothing does not shift the labels of MyLlama" in caplog.text


def of_outputs(outputs, labels, num_items_in_batch=None):
    return sharp(outputs.logits, labels, None)


def test_a_loss_function_given_to_the_trainer(tmp_path):
    samples, target = texts(8, 1, next_token), texts(4, 2, next_token)
    check(tmp_path, llama(), llama(), samples, target, compute_loss_func=of_outputs)


class Logs(Watched):
    """Says something of the loss, and returns the trainer's own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.log({"twice": 2 * loss.item(), "rows": len(inputs["input_ids"])})
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_an_override_that_logs_is_accepted_and_logs_once(tmp_path, micro_batch):
    plain = trainer(tmp_path, llama(), Watched, options={"max_steps": 2}, micro_batch=micro_batch)
    plain.train()
    made = trainer(tmp_path, llama(), Logs, options={"max_steps": 2}, micro_batch=micro_batch)
    made.train()
    assert_close(made.found[1], plain.found[1])
    assert logged(made, "rows") == ([8, 8] if micro_batch is None else [3, 3, 2, 3, 3, 2])
    assert all(x > 0 for x in logged(made, "twice"))


class ByToken(Watched):
    """Weighs tokens by where they stand, and regularises."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        each = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].reshape(-1, outputs.logits.shape[-1]), inputs["labels"][:, 1:].reshape(-1),
            reduction="none",
        ).view(len(inputs["labels"]), -1)  # fmt: skip
        each = each * torch.linspace(0, 1, each.shape[1])
        norm = sum((p**2).sum() for p in model.parameters())
        return each.mean() / 2 + 0.01 * norm


class PlainByToken(Trainer):
    compute_loss = ByToken.compute_loss


def test_an_override_made_of_torchs_losses_is_taken_apart(tmp_path):
    """What it adds that is no sample's own comes with the step, after the selection."""
    samples, target, again = texts(8, 1, next_token), texts(4, 2, next_token), llama()
    options = {"max_steps": 1}
    made = trainer(tmp_path, llama(), ByToken, train=samples, target=target, options=options, **EVERYTHING)
    expected = plain_losses(tmp_path, again, samples, cls=PlainByToken).mean()
    with pytest.warns(BatchingWarning, match="Padding leaks"):  # its mean is over all tokens
        made.train()
    expected.backward()
    assert_close(made.found[0], {name: p.grad for name, p in again.named_parameters()}, 2e-5)


class Among(Watched):
    """A loss between samples."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        x = model(input_ids=inputs["input_ids"]).logits.mean(1)
        return torch.nn.functional.cross_entropy(x @ x.T, torch.arange(len(x)))


class ByMask(Watched):
    """Leaves tokens out, so that samples have unequal parts."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        kept = inputs["labels"][:, 1:] != -100
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits[kept], inputs["labels"][:, 1:][kept])


class ByBatch(Watched):
    """Divides by all tokens of the batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss / (inputs["labels"] != -100).sum()


@pytest.mark.parametrize("cls", [Among, ByMask, ByBatch])
def test_what_cannot_be_taken_apart_is_refused_by_name(tmp_path, cls):
    made = trainer(tmp_path, llama(), cls)
    with pytest.raises(SelectionError, match=rf"{cls.__name__}\.compute_loss with LlamaForCausalLM .*per_sample_loss="):
        made.train()
    assert all(p.grad is None for p in made.model.parameters())
    trainer(tmp_path, llama(), cls, per_sample_loss=losses, options={"max_steps": 1}).train()


@pytest.mark.parametrize("keep", [1.0, 3])
def test_a_routers_balance_loss_is_that_of_the_samples_trained_on(tmp_path, keep):
    samples, target = texts(8, 1, next_token), texts(4, 2, next_token)
    options = {**EVERYTHING, "keep": keep}
    made = trainer(
        tmp_path, mixtral(), Watched, train=samples, target=target, options={"max_steps": 1},
        record=tmp_path / "run.jsonl", **options,
    )  # fmt: skip
    made.train()
    (line,) = report.read(tmp_path / "run.jsonl").runs[0].steps.values()
    picked = [x["index"] for x in line["picked"]]
    pool = made.seen[0]
    chosen = {name: x[picked] for name, x in pool.items()}
    again, without = mixtral(), mixtral(router=False)
    term = again(**chosen).aux_loss * again.config.router_aux_loss_coef
    alone = [without(**{name: x[i : i + 1] for name, x in chosen.items()}).loss for i in range(len(picked))]
    term.backward()
    torch.stack(alone).mean().backward()
    theirs = {
        name: p.grad + (0 if q.grad is None else q.grad)
        for (name, p), q in zip(without.named_parameters(), again.parameters(), strict=True)
    }
    assert float(torch.stack([q.grad.norm() for q in again.parameters() if q.grad is not None]).norm()) > 1e-3
    assert_close(made.found[0], theirs, 2e-5)


@pytest.mark.parametrize(("make", "accumulate"), [(my_llama, 2), (mixtral, 1)])
def test_uniform_weights_by_token_are_the_trainers_own_gradient(tmp_path, make, accumulate):
    """With a balance loss in one pool a step: of several, transformers adds them up and TRL takes their mean."""
    options = {"max_steps": 1, "gradient_accumulation_steps": accumulate}
    plain = trainer(tmp_path, make(), Watched, options=options, select_after=5)
    ours = trainer(tmp_path, make(), Watched, options=options, loss_unit="token", **EVERYTHING)
    plain.train()
    ours.train()
    assert_close(ours.found[-1], plain.found[-1], 2e-5)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=0.05)


def test_counting_up_is_learnt_without_a_place_in_transformers_lists(tmp_path):
    """A class of one's own is trained with the shift: the next token, not the token itself."""
    options = {"max_steps": 60, "per_device_train_batch_size": 8, "logging_steps": 60}
    made = trainer(tmp_path, my_llama(), train=TARGET * 8, options=options, keep=0.5)
    made.train()
    inputs = batch(TARGET)
    guesses = made.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.argmax(-1)
    kept = inputs["labels"][:, 1:] != -100
    assert float((guesses[:, :-1] == inputs["labels"][:, 1:])[kept].float().mean()) > 0.8


def test_a_sample_without_labels_has_no_loss(tmp_path):
    made = trainer(tmp_path, llama())
    inputs = batch(TARGET)
    inputs["labels"][1] = -100
    found = made.per_sample_loss(made.model, inputs)
    assert float(found[1].detach()) == 0
    torch.testing.assert_close(found[[0, 2, 3]], losses(made.model, {k: x[[0, 2, 3]] for k, x in inputs.items()}))


def test_a_subclass_of_the_mixin_may_give_its_own(tmp_path):
    class Mine(FilterThenWeightMixin, Trainer):
        def per_sample_loss(self, model, inputs):
            return 2 * losses(model, inputs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            raise AssertionError

    trainer(tmp_path, cls=Mine, options={"max_steps": 1}).train()
