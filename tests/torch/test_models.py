"""Tiny random transformers, padded batches: captured factors against per-sample autograd."""

import warnings

import pytest
import torch
import torch.nn.functional as F
import torch_models as models
from ftw_torch import FilterThenWeight

transformers = pytest.importorskip("transformers")

V, N = 37, 4
COMMON = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
LANGUAGE = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        **SPECIAL,
    ),
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama, tied": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True, attention_bias=True),
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=4),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**COMMON, head_dim=6),
    "gemma": lambda: transformers.GemmaConfig(**COMMON, head_dim=4),
    "gemma2": lambda: transformers.Gemma2Config(**COMMON, head_dim=4, sliding_window=4),
    "neox": lambda: transformers.GPTNeoXConfig(
        **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"}, attention_dropout=0.0, hidden_dropout=0.0
    ),
    "opt": lambda: transformers.OPTConfig(
        **{k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")},
        ffn_dim=24,
        dropout=0.0,
        word_embed_proj_dim=16,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
}
EAGER = {"gpt2", "gemma2", "llama"}


def build(config, kind=None, attention="sdpa", dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    config._attn_implementation = attention
    for name, value in options.items():
        setattr(config, name, value)
    return (kind or transformers.AutoModelForCausalLM).from_config(config).to(dtype)


def text(n, t, seed=1):
    """Token ids (n, t) and a mask (n, t) that pads on the right: every sequence has a length of its own."""
    torch.manual_seed(seed)
    ids = torch.randint(3, V, (n, t))
    lengths = torch.arange(n) % (t - 2) + 3
    mask = (torch.arange(t) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def next_token(model, batch):
    """Mean loss over the real tokens of each sequence: (n,)."""
    ids, mask = batch["input_ids"], batch["attention_mask"][:, 1:]
    logits = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return (loss * mask).sum(1) / mask.sum(1)


CASES = [(name, "sdpa", dtype) for name in LANGUAGE if name != "gemma2" for dtype in (torch.float32, torch.float64)]
CASES.remove(("mixtral", "sdpa", torch.float64))  # grouped products of doubles are not there
CASES += [(name, "eager", torch.float64) for name in sorted(EAGER)]


@pytest.mark.parametrize("t", [N, 9])
@pytest.mark.parametrize(("name", "attention", "dtype"), CASES)
def test_language_models(name, attention, dtype, t):
    model = build(LANGUAGE[name](), attention=attention, dtype=dtype)
    if dtype == torch.float64:  # norms compute in float32 whatever the model's dtype
        model = _doubled(model)
    models.assert_exact(model, next_token, text(N, t), dtype=dtype)


def _doubled(model):
    """Return the model with ``.float()`` inside it taken for ``.double()``, lest rounding is what is compared."""
    forward = model.forward

    def wide(*args, **kwargs):
        with Wide():
            return forward(*args, **kwargs)

    model.forward = wide
    return model


class Wide(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to and torch.float32 in args:
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def test_experts_whose_weights_are_transposed_and_rows_that_nobody_reads():
    class Mixture(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 4, 8))  # (e, d_out, d_in)
            self.out = torch.nn.Linear(4, 4)

        def forward(self, x):  # (n, t, d_in)
            flat = x.reshape(-1, 8)
            expert = torch.where(flat[:, 0] < 0, 0, torch.where(flat[:, 1] < 0, 2, 3))  # 1 without rows; none is 3
            order = expert.argsort()
            offs = (expert[:, None] == torch.arange(3)).sum(0).cumsum(0).to(torch.int32)
            y = torch._grouped_mm(flat[order], self.weight.mT, offs=offs)
            y = torch.where((torch.arange(len(flat)) < offs[-1])[:, None], y, 0.0)
            out = torch.zeros(len(flat), 4).index_copy(0, order, y)
            return self.out(out).reshape(*x.shape[:-1], 4)  # its rows are where the samples are, not where y's were

    torch.manual_seed(0)
    batch = {"x": torch.randn(N, 6, 8), "y": torch.randn(N, 6, 4)}
    models.assert_exact(Mixture(), lambda m, b: ((m(b["x"]) - b["y"]) ** 2).mean((1, 2)), batch)


def test_experts_run_one_by_one_have_a_rule():
    model = build(LANGUAGE["mixtral"](), _experts_implementation="eager")
    models.assert_exact(model, next_token, text(N, 9))


def test_gpt2_classifier_takes_the_last_token():
    model = build(LANGUAGE["gpt2"](), transformers.AutoModelForSequenceClassification, pad_token_id=0, num_labels=3)

    def loss(m, b):
        out = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"], use_cache=False)
        return F.cross_entropy(out.logits, b["y"], reduction="none")

    models.assert_exact(model, loss, text(N, 9) | {"y": torch.arange(N) % 3})


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bert(attention):
    config = transformers.BertConfig(
        **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    model = build(config, transformers.AutoModelForSequenceClassification, attention)

    def loss(m, b):
        logits = m(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits
        return F.cross_entropy(logits, b["y"], reduction="none")

    models.assert_exact(model, loss, text(N, 9) | {"y": torch.arange(N) % 3})
    models.assert_exact(model, loss, text(N, N) | {"y": torch.arange(N) % 3})


def test_vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=8,
        patch_size=4,
        num_labels=3,
    )
    model = build(config, transformers.AutoModelForImageClassification)
    with torch.no_grad():
        for p in (model.vit.embeddings.cls_token, model.vit.embeddings.position_embeddings):
            p.normal_()
    batch = {"x": torch.randn(N, 3, 8, 8), "y": torch.arange(N) % 3}
    models.assert_exact(model, lambda m, b: F.cross_entropy(m(b["x"]).logits, b["y"], reduction="none"), batch)


def test_t5_shares_its_relative_positions():
    config = transformers.T5Config(
        vocab_size=V,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        relative_attention_num_buckets=8,
    )
    model = build(config, transformers.AutoModelForSeq2SeqLM)

    def loss(m, b):
        logits = m(
            b["input_ids"], attention_mask=b["attention_mask"], decoder_input_ids=b["input_ids"], use_cache=False
        ).logits
        return F.cross_entropy(logits.transpose(1, 2), b["input_ids"], reduction="none").mean(1)

    models.assert_exact(model, loss, text(N, 6))
    models.assert_exact(model, loss, text(N, N))


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def lora(kind="qwen2", **options):
    peft = pytest.importorskip("peft")
    model = build(LANGUAGE[kind]())
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **options))


def shake(model):
    """Give every trained parameter a value, as if training had begun."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
    return model


LORA = {
    "default": {},
    "every linear layer": {"target_modules": "all-linear"},
    "rank stabilised, head": {
        "use_rslora": True,
        "modules_to_save": ["lm_head"],
        "target_modules": ["o_proj", "q_proj"],
    },
    "dora": {"use_dora": True, "target_modules": ["q_proj", "down_proj"]},
    "biases": {"bias": "all", "target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}


@pytest.mark.parametrize("name", LORA)
def test_lora(name):
    model = shake(lora(**LORA[name]))
    models.assert_exact(model, next_token, text(N, 9))


def test_lora_on_gpt2():
    models.assert_exact(shake(lora("gpt2", fan_in_fan_out=True)), next_token, text(N, 9))


def test_lora_at_its_first_step():
    """B = 0: A has no gradient, and what is frozen stays frozen and without one."""
    model = lora(target_modules="all-linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    flags = [p.requires_grad for p in model.parameters()]
    selector = FilterThenWeight(model, optimizer, next_token, keep=3)
    for step in range(3):
        selection = selector.backward(text(8, 9), text(3, 7, seed=5))
        assert bool(torch.isfinite(selection.weights).all())
        moved = [name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())]
        assert moved
        assert step > 0 or all("lora_B" in name for name in moved)
        optimizer.step()
        optimizer.zero_grad()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_an_expert_that_the_target_never_touches():
    """Its own update is free of the target: no score from it and no NaN; a gradient only from samples chosen."""
    model = build(LANGUAGE["mixtral"](), _experts_implementation="eager")
    with torch.no_grad():  # tokens below 20 are routed to experts 0 and 1, the others to 2 and 3
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selection = FilterThenWeight(model, optimizer, next_token, keep=3).backward(text(8, 9), text(3, 7, seed=5))
    assert bool(torch.isfinite(selection.scores).all())
    assert bool(torch.isfinite(selection.weights).all())
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
