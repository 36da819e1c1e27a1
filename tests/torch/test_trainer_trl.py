"""TRL's trainers with selection: their losses, their log, their data."""

import logging

import pytest
import torch
from ftw_torch import SelectionError
from ftw_torch.trainer import FilterThenWeightMixin
from loss_kinds import mixtral
from trainers import llama, logged, tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exact but slow:UserWarning"),
]
WORDS = ["a b c d e f", "b c d e", "f e d c b a", "a a a a", "c d e f g", "g f e"] * 4
EVERYTHING = {"keep": 1.0, "filter": "top_k", "weight": "uniform", "shortlist": None, "guard": 0.0}


class SelectingSFTTrainer(FilterThenWeightMixin, trl.SFTTrainer):
    pass


def text(words):
    return datasets.Dataset.from_dict({"text": words})


def trained(path, kind, model, options=(), train=None, **kwargs):
    defaults = {
        "per_device_train_batch_size": 6, "per_device_eval_batch_size": 2, "max_steps": 2, "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True, "max_length": 12,
        "learning_rate": 1e-2, "bf16": False,
    }  # fmt: skip
    args = trl.SFTConfig(output_dir=str(path), **(defaults | dict(options)))
    if kind is not trl.SFTTrainer:
        kwargs = {"target_dataset": text(["a b c d", "b c d e"]), "keep": 0.5, **kwargs}
    data = text(WORDS) if train is None else train
    made = kind(model=model, args=args, train_dataset=data, processing_class=tiny_tokenizer(), **kwargs)
    made.train()
    return made


def test_supervised_fine_tuning(tmp_path):
    made = trained(tmp_path, SelectingSFTTrainer, llama(), {"max_steps": 3}, select_after=1)
    assert logged(made, "picked_share") == [0.5, 0.5]
    assert all(0 < x <= 1.0001 for x in logged(made, "match"))


@pytest.mark.parametrize(
    ("make", "options"),
    [(llama, {}), (llama, {"loss_type": "dft"}), (llama, {"label_smoothing_factor": 0.1}), (mixtral, {})],
)
def test_the_whole_pool_is_trls_own_step_and_log(tmp_path, make, options):
    """Loss and gradient, and entropy, accuracy and tokens: once a step, whatever is passed through the model."""
    plain = trained(tmp_path, trl.SFTTrainer, make(), options)
    made = trained(tmp_path, SelectingSFTTrainer, make(), options, loss_unit="token", **EVERYTHING)
    names = ["loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"]
    names += ["aux_loss"] if make is mixtral else []
    for name in names:
        assert len(logged(plain, name)) == 2
        assert logged(made, name) == pytest.approx(logged(plain, name), rel=1e-4), name


def test_tokens_are_counted_once_in_micro_batches(tmp_path):
    plain = trained(tmp_path, trl.SFTTrainer, llama())
    made = trained(tmp_path, SelectingSFTTrainer, llama(), micro_batch=4)
    assert logged(made, "num_tokens") == logged(plain, "num_tokens")
    assert logged(made, "entropy")[0] == pytest.approx(logged(plain, "entropy")[0], rel=1e-2)


def answers(*sizes):
    return datasets.Dataset.from_dict(
        {"prompt": [" ".join("abcdefg"[i % 7] for i in range(n)) for n in sizes], "completion": [" a b"] * len(sizes)}
    )


def test_target_samples_that_the_preparation_drops(tmp_path, caplog):
    """Prompts as long as max_length leave nothing to predict."""
    train = answers(2, 3, 4, 2, 3, 4)
    with pytest.raises(ValueError, match="all 2 samples of target_dataset were dropped"):
        trained(tmp_path, SelectingSFTTrainer, llama(), train=train, target_dataset=answers(13, 14))
    with caplog.at_level(logging.WARNING, logger="ftw_torch.trainer"):
        trained(tmp_path, SelectingSFTTrainer, llama(), train=train, target_dataset=answers(13, 3, 2))
    assert "1 of the 3 samples of target_dataset were dropped" in caplog.text


def test_a_stream_as_target(tmp_path):
    stream = text(["a b c d", "b c d e", "d e"]).to_iterable_dataset().take(2)
    made = trained(tmp_path, SelectingSFTTrainer, llama(), target_dataset=stream)
    assert len(logged(made, "target_loss")) == 2


class SelectingDPOTrainer(FilterThenWeightMixin, trl.DPOTrainer):
    pass


class SelectingRewardTrainer(FilterThenWeightMixin, trl.RewardTrainer):
    pass


def preferences(n, seed):
    g = torch.Generator().manual_seed(seed)

    def words(k):
        return " ".join("abcdefg"[i] for i in torch.randint(0, 7, (k,), generator=g).tolist())

    rows = [(words(2 + i % 3), words(2 + i % 2), words(1 + i % 4)) for i in range(n)]
    return datasets.Dataset.from_dict(
        {"prompt": [x[0] for x in rows], "chosen": [" " + x[1] for x in rows], "rejected": [" " + x[2] for x in rows]}
    )


def rewards(seed=0):
    torch.manual_seed(seed)
    given = {name: x for name, x in llama().config.to_dict().items() if name not in ("id2label", "label2id")}
    config = LlamaConfig(**{**given, "num_labels": 1, "pad_token_id": 0})
    return LlamaForSequenceClassification(config)


PREFERENCES = {
    "sigmoid": (SelectingDPOTrainer, trl.DPOConfig, {}),
    "sigmoid and hinge": (SelectingDPOTrainer, trl.DPOConfig, {"loss_type": ["sigmoid", "hinge"]}),
    "ipo": (SelectingDPOTrainer, trl.DPOConfig, {"loss_type": ["ipo"]}),
    "reward": (SelectingRewardTrainer, trl.RewardConfig, {}),
    "reward, centred": (SelectingRewardTrainer, trl.RewardConfig, {"center_rewards_coefficient": 0.1}),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_a_pair_is_a_sample(tmp_path, name):
    """The whole pool is TRL's own step and log."""
    kind, config, options = PREFERENCES[name]
    plain = kind.__mro__[2]

    def run(kind, **kwargs):
        args = config(
            output_dir=str(tmp_path), per_device_train_batch_size=6, per_device_eval_batch_size=4, max_steps=2,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, max_length=12,
            learning_rate=1e-2, bf16=False, **options,
        )  # fmt: skip
        model = rewards() if config is trl.RewardConfig else llama()
        kwargs |= {} if config is trl.RewardConfig else {"ref_model": llama(seed=5)}
        made = kind(
            model=model, args=args, train_dataset=preferences(12, 0), processing_class=tiny_tokenizer(), **kwargs
        )  # fmt: skip
        made.train()
        return made

    theirs, ours = run(plain), run(kind, target_dataset=preferences(4, 1), **EVERYTHING)
    names = [name for name in theirs.state.log_history[0] if name not in ("epoch", "step", "learning_rate")]
    assert {"loss", "grad_norm", "num_tokens"} < set(names)
    for name in names:
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=2e-4, abs=1e-6), name
    if name in ("sigmoid", "reward"):
        chosen = run(kind, target_dataset=preferences(4, 1), keep=2, micro_batch=4)
        assert logged(chosen, "picked_share") == [2 / 6] * 2


def test_a_loss_that_sorts_pairs_is_refused_by_name(tmp_path):
    args = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=6, max_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, bf16=False, loss_type=["aot"],
    )  # fmt: skip
    made = SelectingDPOTrainer(
        model=llama(), args=args, train_dataset=preferences(12, 0), processing_class=tiny_tokenizer(),
        target_dataset=preferences(4, 1), keep=2, ref_model=llama(seed=5),
    )  # fmt: skip
    with pytest.raises(SelectionError, match=r"DPOTrainer\.compute_loss with LlamaForCausalLM"):
        made.train()


class SelectingGRPOTrainer(FilterThenWeightMixin, trl.GRPOTrainer):
    pass


def test_a_trainer_that_makes_its_samples_is_refused_with_the_loop(tmp_path):
    args = trl.GRPOConfig(str(tmp_path), report_to=[], use_cpu=True, bf16=False, num_generations=2)
    prompts = datasets.Dataset.from_dict({"prompt": ["a b", "c d"]})
    with pytest.raises(ValueError, match=r"GRPOTrainer makes its samples within the step.*ftw_torch\.losses\.grpo"):
        SelectingGRPOTrainer(
            model=llama(), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
            train_dataset=prompts, target_dataset=prompts, processing_class=tiny_tokenizer(), keep=1,
        )  # fmt: skip
