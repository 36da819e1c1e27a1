"""Rules: how each layer family runs under capture, and which factors its backward hands over.

Importing this package registers them (`ftw_torch.capture.registry`).
"""

from . import attention, convolution, einsum, elementwise, embedding, experts, linear, normalization, recurrent

__all__ = [
    "attention",
    "convolution",
    "einsum",
    "elementwise",
    "embedding",
    "experts",
    "linear",
    "normalization",
    "recurrent",
]
