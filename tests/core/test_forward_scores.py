"""Scores from losses before and after a step, on every backend."""

from __future__ import annotations

import numpy as np
import pytest
from backends import optional
from numpy.testing import assert_allclose

import ftw

ref = optional("ftw_reference")


def test_on_a_quadratic_only_the_curvature_term_is_left(xp, rng):
    n, p = 6, 4
    theta, d, G = rng.normal(size=p), rng.normal(size=p), rng.normal(size=(n, p))
    H = rng.normal(size=(n, p, p))
    H += H.transpose(0, 2, 1)

    def losses(x):
        return G @ x + np.einsum("p,npq,q->n", x, H, x) / 2

    exact = (G + H @ theta) @ d
    for step in (1.0, 1e-3):
        expected = exact - step / 2 * np.einsum("p,npq,q->n", d, H, d)
        found = xp.call(ftw.forward_scores, losses(theta), losses(theta - step * d), np.asarray(step))
        assert_allclose(xp.numpy(found), expected, rtol=1e-9, atol=1e-9)
        found = ftw.forward_scores(xp.array(losses(theta)), xp.array(losses(theta - step * d)), step)
        assert_allclose(xp.numpy(found), expected, rtol=1e-9, atol=1e-9)


def test_the_difference_of_16_bit_losses_is_taken_in_float32():
    torch = pytest.importorskip("torch")
    before = torch.tensor([2.0, 2.0], dtype=torch.bfloat16)
    after = torch.tensor([1.9921875, 2.0], dtype=torch.bfloat16)
    found = ftw.forward_scores(before, after, 0.3)
    assert found.dtype == torch.float32
    assert_allclose(found, [0.0078125 / 0.3, 0], rtol=1e-6)


def test_the_step_takes_a_share_off_the_target_loss_whatever_the_scales(xp):
    losses, eps = np.array([1.0, 2.0, 3.0]), 2.0**-20
    step = float(xp.numpy(xp.call(lambda x, y: ftw.forward_step(x, y, eps), losses, np.asarray(0.5))))
    assert_allclose(step * 0.5, 2.0**-10 * 2.0, rtol=1e-12)
    for loss_scale, metric_scale in ((1e4, 1.0), (1.0, 1e-6), (1e-3, 1e5)):
        other = float(ftw.forward_step(losses * loss_scale, 0.5 * loss_scale**2 * metric_scale, eps))
        assert_allclose(other * loss_scale * metric_scale, step, rtol=1e-12)  # the same s P g_T
    for values, decrease in ((losses, 0.0), (losses, -1.0), (losses, np.nan), (0 * losses, 1.0), (losses, 1e-320)):
        assert float(ftw.forward_step(values, decrease, eps)) == 1.0
    assert ref.forward_step(losses, 0.5, eps) == pytest.approx(step)


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((3, 1), (3, 1)), ((), ())], ids=str)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="losses"):
        ftw.forward_scores(*(np.zeros(shape) for shape in shapes), 1.0)
    with pytest.raises(ValueError, match="losses"):
        ref.forward_scores(*(np.zeros(shape) for shape in shapes), 1.0)
