"""A plain PyTorch loop over a stream in which half of the labels are wrong."""

import torch
import torch.nn.functional as F
from ftw_torch import FilterThenWeight
from ftw_torch.pools import Pools


def stream(n, wrong, seed):
    """Yield points of three classes; a share of the labels is drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    for _ in range(n):
        label = int(torch.randint(3, (), generator=generator))
        x = centres[label] + torch.randn(2, generator=generator)
        if float(torch.rand((), generator=generator)) < wrong:
            label = int(torch.randint(3, (), generator=generator))
        yield x, label


def per_sample_loss(model, batch):
    """Return one loss a sample."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")  # (n,)


def main():
    """Train, and return what was reached."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = FilterThenWeight(model, optimizer, per_sample_loss, keep=8)
    target = next(iter(Pools(stream(40, 0.0, seed=1), 40)))
    test = next(iter(Pools(stream(500, 0.0, seed=2), 500)))
    for step, pool in enumerate(Pools(stream(1600, 0.5, seed=3), 32)):
        optimizer.zero_grad()
        selection = selector.backward(pool, target)
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}: match {float(selection.match):.2f}, target loss {float(selection.target_loss):.3f}")
    loss = float(per_sample_loss(model, test).mean().detach())
    print(f"test loss {loss:.3f}")
    return loss


if __name__ == "__main__":
    main()
