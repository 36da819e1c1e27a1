"""The adapters' matrix: some of its rows, and that it fails where a rule is wrong, missing, or has no row."""

import pytest

pytest.importorskip("torch")

import torch
import torch.nn.functional as F
from ftw_conformance.verify import adapters
from ftw_conformance.verify.matrix.rows import rows
from ftw_conformance.verify.matrix.steps import MODES, USES, applies
from ftw_torch.capture import registry


def failed(only, name="ftw_torch"):
    found = adapters.verify(name, only=only)
    assert found
    return [r for r in found if r.verdict == "FAIL"]


def test_pairs_cover_each_use_and_each_mode_of_each_layer():
    seen = {}
    for name, layer, use, mode in rows():
        assert applies(layer, use, mode)
        seen.setdefault(name.split("/")[2], (layer, set(), set()))[1].add(use)
        seen[name.split("/")[2]][2].add(mode)
    for layer, uses, modes in seen.values():
        assert uses == {u for u in USES if any(applies(layer, u, m) for m in MODES)}
        assert modes == {m for m in MODES if any(applies(layer, u, m) for u in USES)}


@pytest.mark.parametrize("only", ["linear*", "conv2d, same*", "*embedding*", "layer norm*", "gru*", "torch.mul"])
def test_some_layers(only):
    assert not failed(f"matrix/layer/{only}/*")


def test_some_optimizers():
    assert not failed("matrix/optimizer/Adam/*")


def test_some_optimizers_of_optax():
    pytest.importorskip("optax")
    assert not failed("matrix/optax/adamw/*", "ftw_jax")


def wrong_padding(capture, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """As the rule, but an even kernel's odd column of padding comes first."""
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        with capture:
            input = F.pad(input, [side for t in reversed(total) for side in (t - t // 2, t // 2)])
        padding = 0
    return PLAIN(capture, input, weight, bias, stride, padding, dilation, groups)


PLAIN = registry.rule_of(F.conv2d)


@pytest.mark.parametrize(
    ("function", "rule", "only"),
    [
        (F.conv2d, wrong_padding, "conv2d, same*"),
        (F.embedding, lambda capture, x, w, padding_idx=None, *rest: registry_embedding(capture, x, w), "*padding_idx"),
        (F.layer_norm, lambda capture, *args: NotImplemented, "layer norm"),
    ],
    ids=["padding on the other side", "padding_idx is forgotten", "declines"],
)
def test_a_wrong_rule_fails(monkeypatch, function, rule, only):
    monkeypatch.setitem(registry._functions, function, rule)
    assert failed(f"matrix/layer/{only}/*")


registry_embedding = registry.rule_of(F.embedding)


def test_a_rule_without_a_row_fails(monkeypatch):
    assert not failed("matrix/every rule has a row")
    monkeypatch.setitem(registry._functions, torch.tensordot, lambda capture, *args, **kwargs: NotImplemented)
    (result,) = failed("matrix/every rule has a row")
    assert result.detail.endswith("no row runs the rule of tensordot")
