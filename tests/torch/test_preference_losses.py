"""Losses of preferences and policies, against the numbers of TRL's own trainers."""

import pytest
import torch
from ftw_torch import losses
from trainers import llama, tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]
COMMON = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "per_device_train_batch_size": 4}
PROMPTS, GOOD, BAD = ["a b", "c d e", "f", "g a b"], [" c d", " a", " b c d e", " f"], [" b", " g f e", " a a", " c c"]


def logps(model, ids, mask, completion):
    return losses.sequence_logps(model(ids, attention_mask=mask).logits, ids.masked_fill(completion == 0, -100))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dpo(tmp_path, smoothing):
    """Each pair alone; TRL divides its smoothed loss by 1 - 2 s, to have no bias ("robust")."""
    data = datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD})
    kind = {"loss_type": ["robust"], "label_smoothing": smoothing} if smoothing else {}
    made = trl.DPOTrainer(
        model=llama(), ref_model=llama(seed=5), args=trl.DPOConfig(str(tmp_path), beta=0.3, **kind, **COMMON),
        train_dataset=data, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    for row in made.train_dataset:
        batch = made.data_collator([row])
        theirs = made.compute_loss(made.model, dict(batch))
        parts = (batch["input_ids"], batch["attention_mask"], batch["completion_mask"])
        (c, r), (rc, rr) = (logps(m, *parts).chunk(2) for m in (made.model, made.ref_model))
        if smoothing:
            d = 0.3 * ((c - rc) - (r - rr))
            flipped = smoothing * torch.nn.functional.logsigmoid(-d)
            theirs = theirs * (1 - 2 * smoothing) - 2 * flipped
        ours = losses.dpo(c, r, rc, rr, beta=0.3, label_smoothing=smoothing)
        torch.testing.assert_close(ours, theirs.reshape(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("desirable", [True, False])
def test_kto(tmp_path, desirable):
    data = datasets.Dataset.from_dict({"prompt": PROMPTS, "completion": GOOD, "label": [desirable] * 3 + [True]})
    args = trl.KTOConfig(
        str(tmp_path), beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, **COMMON
    )  # fmt: skip
    made = trl.KTOTrainer(
        model=llama(), ref_model=llama(seed=5), args=args, train_dataset=data, processing_class=tiny_tokenizer()
    )
    batch = made.data_collator(list(made.train_dataset))
    theirs = made.compute_loss(made.model, dict(batch))
    parts = [batch[name] for name in ("input_ids", "attention_mask", "completion_mask")]
    other = [batch["KL_" + name] for name in ("input_ids", "attention_mask", "completion_mask")]
    kl = (logps(made.model, *other) - logps(made.ref_model, *other)).mean().clamp(min=0)
    ours = losses.kto(
        logps(made.model, *parts), logps(made.ref_model, *parts), torch.as_tensor(batch["label"]), kl, beta=0.3,
        desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    assert ours.shape == (4,)
    torch.testing.assert_close(ours.mean(), theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("centre", [None, 0.1])
def test_reward_pairs(tmp_path, centre):
    from test_trainer_trl import rewards

    data = datasets.Dataset.from_dict({"prompt": PROMPTS, "chosen": GOOD, "rejected": BAD})
    args = trl.RewardConfig(str(tmp_path), center_rewards_coefficient=centre, **COMMON)
    made = trl.RewardTrainer(model=rewards(), args=args, train_dataset=data, processing_class=tiny_tokenizer())
    for i, row in enumerate(made.train_dataset):
        batch = {**made.data_collator([row]), "margin": torch.tensor([0.1 * i])}
        theirs = made.compute_loss(made.model, dict(batch))
        c, r = made.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].chunk(2)
        ours = losses.reward_pairs(c, r, margin=batch["margin"], centre=centre)
        torch.testing.assert_close(ours, theirs.reshape(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
@pytest.mark.parametrize(("beta", "corrected"), [(0.0, False), (0.2, False), (0.2, True)])
def test_grpo(tmp_path, kind, beta, corrected):
    """Each group alone, of three rollouts, with ratios on both sides of the clip."""
    args = trl.GRPOConfig(
        str(tmp_path), loss_type=kind, use_bias_correction_kl=corrected, num_generations=3, max_completion_length=5,
        epsilon=0.1, epsilon_high=0.3, **(COMMON | {"per_device_train_batch_size": 6}),
    )  # fmt: skip
    made = trl.GRPOTrainer(
        model=llama(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
        train_dataset=datasets.Dataset.from_dict({"prompt": PROMPTS}), processing_class=tiny_tokenizer(),
    )  # fmt: skip
    made.beta = beta  # afterwards: it would load a reference from a path
    g = torch.Generator().manual_seed(0)
    policy, old, ref = (-torch.rand(6, 5, generator=g) for _ in range(3))
    policy.requires_grad_()
    mask = (torch.arange(5) < torch.tensor([5, 3, 1, 2, 5, 4])[:, None]).long()
    advantages = losses.group_advantages(torch.rand(6, generator=g), 3)
    ours = losses.grpo(
        policy, advantages, mask, group=3, old_logps=old, ref_logps=ref if beta else None, beta=beta, clip=(0.1, 0.3),
        corrected=corrected,
        length=5 if kind == "dr_grpo" else None,
    )  # fmt: skip
    assert ours.shape == (2,)
    for i in range(2):
        rows = slice(3 * i, 3 * i + 3)
        made._get_per_token_logps_and_entropies = lambda *_, rows=rows, **__: (policy[rows], torch.zeros(3, 5), None)
        ids = torch.zeros(3, 5, dtype=torch.long)
        inputs = {
            "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": mask[rows],
            "advantages": advantages[rows], "old_per_token_logps": old[rows], "ref_per_token_logps": ref[rows],
        }  # fmt: skip
        made.current_gradient_accumulation_steps = 1
        theirs = made.compute_loss(made.model, inputs)
        torch.testing.assert_close(ours[i], theirs, rtol=1e-5, atol=1e-6)
        (one,), (two,) = (torch.autograd.grad(x, policy, retain_graph=True) for x in (ours[i], theirs))
        torch.testing.assert_close(one, two)


def test_advantages_are_those_of_the_group():
    rewards = torch.tensor([1.0, 2.0, 6.0, 0.5, 0.5, 0.5])
    found = losses.group_advantages(rewards, 3)
    first = (rewards[:3] - 3) / (rewards[:3].std() + 1e-4)
    torch.testing.assert_close(found, torch.cat([first, torch.zeros(3)]))
    each = losses.grpo(-torch.ones(6, 2), found, torch.ones(6, 2))
    assert each.shape == (6,)
