"""An Accelerate loop: the selector takes the plain model and the plain optimizer, and stands where backward stood."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from ftw_torch import FilterThenWeight
from torch.utils.data import DataLoader, TensorDataset


def per_sample_loss(model, batch):
    """Return one loss a sample."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")  # (n,)


def main():
    """Train, and return what was reached."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
    torch.manual_seed(0)
    centres = torch.tensor([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
    labels = torch.randint(3, (1280,))
    points = centres[labels] + torch.randn(1280, 2)
    given = torch.where(torch.rand(1280) < 0.5, torch.randint(3, (1280,)), labels)  # half of them drawn at random
    loader = DataLoader(TensorDataset(points[64:], given[64:]), batch_size=32, drop_last=True)
    target = points[:40].to(accelerator.device), labels[:40].to(accelerator.device)

    model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    selector = FilterThenWeight(accelerator.unwrap_model(model), optimizer.optimizer, per_sample_loss, keep=8)
    first = None
    for pool in loader:
        optimizer.zero_grad()
        selection = selector.backward(pool, target)  # in place of accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        first = float(selection.target_loss) if first is None else first
    print(f"target loss {first:.3f} to {float(selection.target_loss):.3f}")
    return first, float(selection.target_loss)


if __name__ == "__main__":
    main()
