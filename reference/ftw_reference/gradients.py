r"""From what a backward pass has in its hands to one gradient per sample.

A linear layer ``y = W x`` meets the tokens s of a sample with inputs a_s (d_in,). Let b_s (d_out,) be the gradient of
the sample's own loss with respect to y at token s. By the chain rule the sample's gradient with respect to W is

    G_i = sum over its tokens s of  b_s a_s'          (d_out, d_in),

a sum of outer products. An embedding is the same layer with one-hot inputs: token s adds b_s to the row it looked up.

Samples of equal length stand in arrays (n, t, d). DOCUMENTS of different lengths are PACKED side by side into one line
of tokens (t, d), each token with the number of its document: the sum above then runs over the tokens s with
samples[s] == i. Tokens with the number -1, such as padding, belong to no document and enter no gradient. This is exact
only if no document's loss depends on another's tokens: attention must not look across their borders.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ._jit import jit

__all__ = ["outer_products", "packed", "packed_rows", "rows"]

Array = Any


def outer_products(inputs: Array, output_grads: Array) -> Array:
    """Return the gradients (n, d_out, d_in) of samples of equal length.

    Parameters
    ----------
    inputs : array (n, t, d_in)
        What the layer saw.
    output_grads : array (n, t, d_out)
        Gradient of each sample's own loss with respect to the layer's output.

    Examples
    --------
    >>> outer_products([[[1.0, 2.0], [0.0, 1.0]]], [[[3.0], [10.0]]])
    array([[[ 3., 16.]]])
    """
    a, b = _floats(inputs), _floats(output_grads)
    n, t = a.shape[:2]
    samples = np.repeat(np.arange(n), t)  # (n t,)
    return packed(a.reshape(n * t, -1), b.reshape(n * t, -1), samples, n)


def rows(indices: Array, output_grads: Array, size: int) -> Array:
    """Return the gradients (n, size, d) of an embedding from row numbers (n, t) and output gradients (n, t, d)."""
    i, b = np.asarray(indices), _floats(output_grads)
    n, t = i.shape
    return packed_rows(i.reshape(-1), b.reshape(n * t, -1), np.repeat(np.arange(n), t), n, size)


def packed(inputs: Array, output_grads: Array, samples: Array, size: int) -> Array:
    """Return the gradients (size, d_out, d_in) of packed documents.

    Parameters
    ----------
    inputs : array (t, d_in)
        What the layer saw: the tokens of all documents.
    output_grads : array (t, d_out)
        Gradient of the loss of the token's own document with respect to the layer's output.
    samples : integer array (t,)
        Number of each token's document, -1 for tokens of none.
    size : int
        Number of documents.

    Examples
    --------
    >>> packed([[1.0, 2.0], [5.0, 5.0], [0.0, 1.0]], [[3.0], [1.0], [10.0]], [1, -1, 1], 2)
    array([[[ 0.,  0.]],
    <BLANKLINE>
           [[ 3., 16.]]])
    """
    return _packed(_floats(inputs), _floats(output_grads), np.asarray(samples).astype(np.int64), int(size))


def packed_rows(indices: Array, output_grads: Array, samples: Array, size: int, height: int) -> Array:
    """Return the gradients (size, height, d) of an embedding of ``height`` rows for packed documents.

    Examples
    --------
    >>> packed_rows([2, 0, 2], [[1.0], [10.0], [100.0]], [0, 0, -1], 1, 3)
    array([[[10.],
            [ 0.],
            [ 1.]]])
    """
    i, s = (np.asarray(x).astype(np.int64) for x in (indices, samples))
    return _packed_rows(i, _floats(output_grads), s, int(size), int(height))


@jit
def _packed(a: Array, b: Array, samples: Array, n: int) -> Array:
    """Add up the outer products token by token: (t, d_in), (t, d_out), (t,) -> (n, d_out, d_in)."""
    out = np.zeros((n, b.shape[1], a.shape[1]))
    for s in range(len(samples)):
        i = samples[s]
        if i >= 0:
            for r in range(b.shape[1]):
                out[i, r] += b[s, r] * a[s]
    return out


@jit
def _packed_rows(indices: Array, b: Array, samples: Array, n: int, height: int) -> Array:
    """Add up the rows token by token: (t,), (t, d), (t,) -> (n, height, d)."""
    out = np.zeros((n, height, b.shape[1]))
    for s in range(len(samples)):
        if samples[s] >= 0:
            out[samples[s], indices[s]] += b[s]
    return out


def _floats(x: Array) -> Array:
    return np.ascontiguousarray(x, dtype=np.float64)
