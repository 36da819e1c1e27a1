"""The reference's gradients from factors, against one-hot sums in closed form and finite differences of a loss."""

import ftw_reference as ref
import numpy as np
from numpy.testing import assert_allclose


def test_a_layer_of_documents(rng):
    samples = np.array([1, -1, 0, 1, 1, 3, -1])  # document 2 is empty
    a, b = rng.normal(size=(7, 4)), rng.normal(size=(7, 3))
    hot = samples[None, :] == np.arange(4)[:, None]  # (4, 7)
    wanted = np.einsum("ns,sr,sc->nrc", hot, b, a)
    assert_allclose(ref.gradients.packed(a, b, samples, 4), wanted, rtol=1e-13)
    i = np.array([0, 4, 4, 2, 0, 1, 3])
    one_hot = np.eye(5)[i]  # an embedding is a layer with one-hot inputs, transposed
    got = ref.gradients.packed_rows(i, b, samples, 4, 5)
    assert_allclose(got, np.einsum("ns,sr,sc->nrc", hot, one_hot, b), rtol=1e-13)


def test_samples_of_equal_length(rng):
    a, b = rng.normal(size=(3, 5, 4)), rng.normal(size=(3, 5, 2))
    assert_allclose(ref.gradients.outer_products(a, b), np.swapaxes(b, 1, 2) @ a, rtol=1e-13)
    i = rng.integers(0, 6, size=(3, 5))
    assert_allclose(ref.gradients.rows(i, b, 6), np.swapaxes(np.eye(6)[i], 1, 2) @ b, rtol=1e-13)


def test_finite_differences_of_each_documents_own_loss(rng):
    samples, n = np.array([0, 0, 1, -1, 1, 1]), 2
    a, y, W = rng.normal(size=(6, 3)), rng.normal(size=(6, 2)), rng.normal(size=(2, 3))

    def losses(W):
        token = 0.5 * np.sum((a @ W.T - y) ** 2, axis=1)
        return np.array([token[samples == i].sum() for i in range(n)])

    got = ref.gradients.packed(a, a @ W.T - y, samples, n)
    for r in range(2):
        for c in range(3):
            step = np.zeros((2, 3))
            step[r, c] = 1e-6
            assert_allclose(got[:, r, c], (losses(W + step) - losses(W - step)) / 2e-6, rtol=1e-7, atol=1e-8)
