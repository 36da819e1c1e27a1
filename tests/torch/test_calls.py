"""How many operations a step dispatches, in plain steps: counts repeat exactly, so that none creeps in unseen."""

import pytest
import torch
import torch.nn.functional as F
from ftw_conformance.bench.torch_calls import calls_of
from ftw_conformance.bench.torch_models import Llama, lm_loss
from ftw_conformance.bench.torch_variants import TOP_K, Setup, ours, plain


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    model = Llama(256, 32, 12, 2, 1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    return Setup(model, optimizer, lm_loss, 4, 8)


def count(step):
    torch.manual_seed(1)
    pool, target = torch.randint(0, 256, (16, 17)), torch.randint(0, 256, (2, 17))
    for _ in range(4):
        step(pool, target)
    return calls_of(lambda: step(pool, target), 1)  # the fifth and the sixth use: no power of two, no audit


@pytest.mark.parametrize(
    ("options", "ops", "kernels"),
    [(TOP_K, 1.15, 1.15), ({"guard": 0}, 1.20, 1.20), ({}, 1.25, 1.25)],
    ids=["top-k", "guard off", "default"],
)
def test_a_step_calls_little_more_than_a_plain_one(setup, options, ops, kernels):
    assert_calls(setup, options, ops, kernels)


def assert_calls(setup, options, ops, kernels):
    base = count(plain(setup))
    step = ours(setup, **{"capture": "learned", **options})
    got = count(step)
    assert step.selector.memory.learned.steps == 6
    assert got.ops <= ops * base.ops
    assert got.kernels <= kernels * base.kernels


def llama(**options):
    """Transformers' Llama with a head tied to the embedding, and biases in its attention."""
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 12, "num_attention_heads": 2}
    ties = {"tie_word_embeddings": True, "attention_bias": True} | options
    config = transformers.LlamaConfig(
        vocab_size=256,
        num_key_value_heads=1,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
        **size,
        **ties,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    """Conv1D, and positions that all samples share."""
    transformers = pytest.importorskip("transformers")
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=32, n_embd=32, n_layer=12, n_head=2, bos_token_id=0, eos_token_id=0, **drop
    )
    return transformers.GPT2LMHeadModel(config)


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    return peft.get_peft_model(llama(tie_word_embeddings=False, attention_bias=False), config)


def logits_loss(model, batch):
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none").mean(1)


@pytest.mark.parametrize(
    ("make", "options", "ops", "kernels"),
    [
        (llama, TOP_K, 0.95, 1.05),
        (llama, {}, 1.05, 1.15),
        (gpt2, TOP_K, 1.10, 1.20),
        (gpt2, {}, 1.30, 1.45),
        (lora, TOP_K, 0.95, 1.05),
        (lora, {}, 1.00, 1.10),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_of_transformers_call_little_more_than_a_plain_step(make, options, ops, kernels):
    torch.manual_seed(0)
    model = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    for p in trained:
        p.grad = torch.randn_like(p) * 1e-3
    optimizer.step()
    assert_calls(Setup(model, optimizer, logits_loss, 4, 8), options, ops, kernels)
