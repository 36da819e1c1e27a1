"""Tiny models of many kinds with samples whose losses differ, for the tests of the trainer's losses."""

import torch
import transformers as hf
from trainers import V, llama

SMALL = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
T = 8


class MyLlama(hf.LlamaForCausalLM):
    """Stands in no mapping of transformers."""


def made(kind, config, seed=0):
    torch.manual_seed(seed)
    return kind(config)


def bert(kind, **options):
    return made(kind, hf.BertConfig(**SMALL, **STILL, type_vocab_size=1, **options))


def texts(n, seed, labels):
    """Samples of ragged length with ``labels(generator, ids, mask)``."""
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(n):
        ids = torch.randint(1, V, (T,), generator=g)
        mask = torch.arange(T) < 3 + (5 * i + seed) % (T - 2)
        extra = labels(g, ids, mask)
        samples.append({"input_ids": ids.where(mask, 0).tolist(), "attention_mask": mask.long().tolist(), **extra})
    return samples


def next_token(g, ids, mask):
    return {"labels": ids.where(mask, -100).tolist()}


def some_tokens(g, ids, mask):
    some = mask & (torch.rand(T, generator=g) < 0.5)
    some[1] = True
    return {"labels": ids.where(some, -100).tolist()}


def tags(g, ids, mask):
    return {"labels": (ids % 3).where(mask, -100).tolist()}


def a_class(g, ids, mask):
    return {"labels": int(torch.randint(0, 3, (), generator=g))}


def numbers(*size):
    def labels(g, ids, mask):
        return {"labels": torch.randn(size, generator=g).tolist()}

    return labels


def shares(g, ids, mask):
    return {"labels": torch.rand(3, generator=g).tolist()}


def a_span(g, ids, mask):
    start, end = sorted(torch.randint(0, 3, (2,), generator=g).tolist())
    return {"start_positions": start, "end_positions": end}


def choices(n, seed):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        ids = torch.randint(1, V, (3, T), generator=g)
        samples.append(
            {"input_ids": ids.tolist(), "attention_mask": [[1] * T] * 3, "labels": int(ids.sum() % 3)},
        )
    return samples


def speech(n, seed):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for i in range(n):
        labels = torch.randint(1, 12, (4,), generator=g)
        labels[2 + i % 3 :] = -100
        samples.append({"input_values": torch.randn(400, generator=g).tolist(), "labels": labels.tolist()})
    return samples


def wav2vec2(reduction):
    config = hf.Wav2Vec2Config(
        vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(8, 4), num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
        hidden_dropout=0.0, activation_dropout=0.0, attention_dropout=0.0, feat_proj_dropout=0.0, final_dropout=0.0,
        ctc_loss_reduction=reduction, pad_token_id=0, feat_extract_norm="layer",
    )  # fmt: skip
    return made(hf.Wav2Vec2ForCTC, config)


def t5():
    config = hf.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return made(hf.T5ForConditionalGeneration, config)


def bart():
    config = hf.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16, dropout=0.0,
        decoder_start_token_id=2, bos_token_id=0, pad_token_id=1, eos_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return made(hf.BartForConditionalGeneration, config)


def llava():
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    text = hf.LlamaConfig(**{**SMALL, "max_position_embeddings": 32})
    return made(
        hf.LlavaForConditionalGeneration,
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=V - 1, image_token_id=V - 1),
    )


def captions(n, seed):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for x in texts(n, seed, lambda *_: {}):
        ids = [V - 1] * 4 + [i % (V - 1) for i in x["input_ids"]]  # an image of four patches
        mask = [1] * 4 + x["attention_mask"]
        labels = [-100] * 5 + [i if m else -100 for i, m in zip(ids[5:], mask[5:], strict=True)]
        pixels = torch.randn(3, 8, 8, generator=g).tolist()
        samples.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels})
    return samples


def vit():
    config = hf.ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_labels=3, **STILL,
    )  # fmt: skip
    return made(hf.ViTForImageClassification, config)


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=g).tolist(), "labels": i % 3} for i in range(n)]


def mixtral(router=True):
    config = hf.MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, output_router_logits=router,
        router_aux_loss_coef=0.5,
    )  # fmt: skip
    return made(hf.MixtralForCausalLM, config)


def sharp(logits, labels, vocab_size, **kwargs):
    """A loss of the user's own, shifted, with a term that torch has no loss function for."""
    kept = labels[..., 1:] != -100
    log_p = (2 * logits[..., :-1, :].float()).log_softmax(-1)  # (n, t, v)
    nll = -log_p.gather(-1, labels[..., 1:].where(kept, 0)[..., None])[..., 0]
    return (nll * kept).sum() / kept.sum() + 0.01 * (logits.logsumexp(-1) ** 2).mean()


def with_own_loss():
    model = llama()
    model.loss_function = sharp
    return model


class LlamaOfItsOwn(hf.LlamaForCausalLM):
    def loss_function(self, logits, labels, vocab_size, **kwargs):
        return sharp(logits, labels, vocab_size)


def with_method():
    torch.manual_seed(0)
    return LlamaOfItsOwn(llama().config)


def my_llama(kind=MyLlama):
    torch.manual_seed(0)
    return kind(llama().config)


def with_adapters():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(my_llama(), config)


def gpt_classes():
    config = hf.GPT2Config(
        vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        num_labels=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return made(hf.GPT2ForSequenceClassification, config)


SEQUENCE = hf.BertForSequenceClassification
KINDS = {
    "causal": (llama, next_token),
    "causal, a class of one's own": (my_llama, next_token),
    "causal, a class of one's own with adapters": (with_adapters, next_token),
    "causal, a loss function of one's own": (with_own_loss, next_token),
    "causal, a method of one's own": (with_method, next_token),
    "masked": (lambda: bert(hf.BertForMaskedLM), some_tokens),
    "sequence classes": (lambda: bert(SEQUENCE, num_labels=3), a_class),
    "sequence classes, causal": (gpt_classes, a_class),
    "soft labels": (lambda: bert(SEQUENCE, num_labels=3), shares),
    "several labels": (lambda: bert(SEQUENCE, num_labels=3, problem_type="multi_label_classification"), shares),
    "one number": (lambda: bert(SEQUENCE, num_labels=1), numbers()),
    "one number, in a list": (lambda: bert(SEQUENCE, num_labels=1), numbers(1)),
    "integer ratings": (lambda: bert(SEQUENCE, num_labels=1, problem_type="regression"), a_class),
    "three numbers": (lambda: bert(SEQUENCE, num_labels=3, problem_type="regression"), numbers(3)),
    "tokens": (lambda: bert(hf.BertForTokenClassification, num_labels=3), tags),
    "answers": (lambda: bert(hf.BertForQuestionAnswering), a_span),
    "choices": (lambda: bert(hf.BertForMultipleChoice), choices),
    "images": (vit, images),
    "speech, mean": (lambda: wav2vec2("mean"), speech),
    "speech, sum": (lambda: wav2vec2("sum"), speech),
    "T5": (t5, some_tokens),
    "BART": (bart, some_tokens),
    "images and text": (llava, captions),
}
SAMPLES = {choices, speech, images, captions}


def kind(name, n, seed):
    """Return a model of a kind and n samples."""
    model, labels = KINDS[name]
    return model(), labels(n, seed) if labels in SAMPLES else texts(n, seed, labels)
