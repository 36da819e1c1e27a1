"""The small model of the tests of learned plans: ``way`` says what else its forward does."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["VOCABULARY", "Net", "net", "tokens"]

VOCABULARY = 13


class Net(nn.Module):
    """A block between an embedding and a head; ``way`` says what else is done."""

    def __init__(self, d=8, *, tied=False, norm=nn.LayerNorm):
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, d, padding_idx=0)
        self.first, self.last = norm(d), nn.RMSNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d, bias=False)
        self.more = nn.ModuleList(nn.Linear(d, d) for _ in range(3))
        self.spare = nn.Linear(d, d)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(d, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.words.weight
        self.way = None
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        h = self.words(x)
        h = h + self.down(F.gelu(self.up(self.first(h))))
        for layer in self.more:
            h = h + torch.tanh(layer(h))
        if self.way is not None:
            h = self.way(self, h)
        return self.head(self.last(self.dropout(h)))


def net(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Net(**options).to(dtype)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def tokens(n, t=7):
    return torch.randint(0, VOCABULARY, (n, t + 1))
