"""Adapters of peft in the trainer: the step on everything is the mean of the plain gradients of the samples alone."""

import pytest
import torch
from trainers import V, Watched, assert_close, llama, trainer

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
EVERYTHING = {"keep": 1.0, "filter": "top_k", "weight": "uniform", "shortlist": None, "guard": 0.0}
TASK = {"task_type": "CAUSAL_LM"}
TUNED = {"target_modules": ["q_proj", "v_proj"]}
CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=2, init_lora_weights=False, **TUNED, **TASK),
    "DoRA": lambda: peft.LoraConfig(r=2, use_dora=True, init_lora_weights=False, **TUNED, **TASK),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, **TASK),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, **TASK),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, **TASK),
    "SHiRA": lambda: peft.ShiraConfig(r=2, **TUNED),
    "VeRA": lambda: peft.VeraConfig(r=2, **TUNED),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **TASK),
}


class Sparse(torch.nn.Module):
    """A model with sparse gradients."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = torch.nn.Embedding(V, 8, sparse=True), torch.nn.Linear(8, V)

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.head(self.embed(input_ids))
        return {"loss": torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def adapted(config):
    model = llama()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config())


def check(tmp_path, make, options=()):
    made = trainer(tmp_path, make(), Watched, options={"max_steps": 1, **dict(options)}, **EVERYTHING)
    made.train()
    again, inputs = make().train(), made.seen[0]
    for i in range(8):
        (again(**{name: x[i : i + 1] for name, x in inputs.items()})["loss"] / 8).backward()
    theirs = {name: p.grad.to_dense() for name, p in again.named_parameters() if p.grad is not None}
    assert_close(made.found[0], theirs, 1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_are_exact(tmp_path, name):
    check(tmp_path, lambda: adapted(CONFIGS[name]))


def test_sparse_gradients_become_dense(tmp_path):
    check(tmp_path, Sparse, {"optim": "sgd"})
