"""Batches that are not rectangular: Qwen-VL's patches, one or two images a sample."""

import pytest
import torch
import transformers as hf
from ftw_torch import batches
from ftw_torch.trainer.ragged import cut, joined, known_counts
from trainers import V, Watched, assert_close, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*exact but slow:UserWarning"),
]
EVERYTHING = {"keep": 1.0, "filter": "top_k", "weight": "uniform", "shortlist": None, "guard": 0.0}
IMAGE, START, END = V - 1, V - 2, V - 3
PATCH = 3 * 2 * 4 * 4  # channels, frames, height, width


def qwen(frozen=True):
    torch.manual_seed(0)
    text = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    config = hf.Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=START,
        vision_end_token_id=END, video_token_id=V - 4,
    )  # fmt: skip
    model = hf.Qwen2VLForConditionalGeneration(config)
    for name, p in model.named_parameters():
        p.requires_grad_(not (frozen and "visual" in name))
    return model


def sample(sizes, seed):
    """A text with an image of ``2 h x 2 w`` patches for each of ``sizes``."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V - 4, (4,), generator=g).tolist()
    for h, w in sizes:
        ids += [START, *[IMAGE] * (h * w), END]
    ids += torch.randint(1, V - 4, (3,), generator=g).tolist()
    grid = [[1, 2 * h, 2 * w] for h, w in sizes]
    pixels = torch.randn(sum(4 * h * w for h, w in sizes), PATCH, generator=g)
    return {"ids": ids, "grid": grid, "pixels": pixels}


def collate(samples):
    """Lay samples side by side as Qwen's processor does."""
    t = 20
    rows = [x["ids"] + [0] * (t - len(x["ids"])) for x in samples]
    ids = torch.tensor(rows)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.tensor([[int(i < len(x["ids"])) for i in range(t)] for x in samples]),
    }
    batch["labels"] = ids.where((ids > 0) & (ids < V - 4), -100)
    batch["mm_token_type_ids"] = (ids == IMAGE).long()
    grids = [row for x in samples for row in x["grid"]]
    if grids:
        batch["pixel_values"] = torch.cat([x["pixels"] for x in samples])
        batch["image_grid_thw"] = torch.tensor(grids)
    return batch


SIZES = [[(1, 1)], [(1, 2), (1, 1)], [], [(2, 2)], [(1, 1)], [(1, 2)], [(2, 1), (1, 2)], [(1, 1)]]


def samples(n, seed):
    return [sample(SIZES[i % len(SIZES)], 100 * seed + i) for i in range(n)]


def test_known_counts_follow_the_placeholders():
    batch = collate(samples(8, 1))
    counts = known_counts(batch, qwen().config)
    assert counts["image_grid_thw"] == [len(x) for x in SIZES]
    assert counts["pixel_values"] == [sum(4 * h * w for h, w in x) for x in SIZES]
    there = joined(cut(batch, counts))
    assert all(torch.equal(there[name], batch[name]) for name in batch)
    some = joined(batches.take(cut(batch, counts), torch.tensor([6, 2, 1])))
    assert torch.equal(some["pixel_values"], collate([samples(8, 1)[i] for i in (6, 2, 1)])["pixel_values"])
    batch["input_ids"][0, 0] = IMAGE
    with pytest.raises(ValueError, match=r"do not fit the 9 rows of 'image_grid_thw'.*ragged="):
        known_counts(batch, qwen().config)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_step_on_patches_is_that_of_the_samples_alone(tmp_path, frozen):
    made = trainer(
        tmp_path, qwen(frozen), Watched, train=samples(8, 1), target=samples(4, 2), data_collator=collate,
        options={"max_steps": 1, "remove_unused_columns": False}, **EVERYTHING,
    )  # fmt: skip
    made.train()
    again = qwen(frozen).train()
    for x in samples(8, 1):
        (again(**collate([x])).loss / 8).backward()
    assert_close(made.found[0], {name: p.grad for name, p in again.named_parameters() if p.grad is not None}, 1e-5)


def test_counts_are_asked_for_by_name(tmp_path):
    options = {"max_steps": 1, "remove_unused_columns": False}

    def unknown(some):
        batch = collate(some)
        return {**batch, "boxes": torch.zeros(2 * len(some) + 1, 4)}

    made = trainer(
        tmp_path, qwen(), train=samples(8, 1), target=samples(4, 2), data_collator=unknown, options=options
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"disagree in the number of samples: .*'boxes': 17.*ragged=\(inputs\)"):
        made.train()
