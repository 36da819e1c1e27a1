"""Three sources, a floor for the rarest of them in samples and in weight, and the reasons of each decision."""

import sys

import torch
import torch.nn.functional as F
from ftw_torch import FilterThenWeight
from ftw_torch.pools import Pools

from ftw import Quota, Reason, SourceShares
from ftw.report import Recorder, decisions, read, why

CENTRES = {"news": (2.0, 0.0), "forum": (-1.0, 1.7), "law": (-1.0, -1.7)}


def stream(n, shares, seed):
    """Yield points of three sources, each with a rule of its own for the label."""
    generator = torch.Generator().manual_seed(seed)
    names = list(CENTRES)
    for i in range(n):
        name = names[int(torch.multinomial(torch.tensor(shares), 1, generator=generator))]
        offset = torch.randn(2, generator=generator)
        label = int(offset[names.index(name) % 2] > 0)
        yield {"x": torch.tensor(CENTRES[name]) + offset, "y": label, "source": name, "id": f"{seed}-{i}"}


def per_sample_loss(model, batch):
    """Return one loss a sample."""
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")  # (n,)


def train(options, record, steps=60):
    """Train toward news; return the mean match, the weight and the test loss of each source, and the last step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    selector = FilterThenWeight(model, optimizer, per_sample_loss, keep=8, fill="relax", explain=True, **options)
    target = next(iter(Pools(stream(40, [1.0, 0.0, 0.0], seed=1), 40)))
    match, weight = 0.0, dict.fromkeys(CENTRES, 0.0)
    for step, pool in enumerate(Pools(stream(steps * 32, [0.3, 0.6, 0.1], seed=2), 32)):
        optimizer.zero_grad()
        selection = selector.backward(pool, target)
        optimizer.step()
        match += float(selection.match) / steps
        for i, w in zip(selection.indices.tolist(), selection.weights.tolist(), strict=True):
            weight[pool["source"][i]] += w / steps
        reasons = decisions(selection, pool["id"], sources=pool["source"])
        record.step("mixture", step, match=selection.match, decisions=reasons)
    test = next(iter(Pools(stream(900, [1.0, 1.0, 1.0], seed=3), 900)))
    with torch.no_grad():
        losses = per_sample_loss(model, test)  # (n,)
    mine = {name: torch.tensor([source == name for source in test["source"]]) for name in CENTRES}
    return match, weight, {name: float(losses[mask].mean()) for name, mask in mine.items()}, pool, selection


def main(path="mixture.jsonl"):
    """Train without and with a floor, and ask why a sample of the last step was refused."""
    arms = {
        "no floor": {},
        "2 of 8 samples": {"quota": Quota("source", at_least={"law": 2})},
        "a quarter of the weight": {"constraint": SourceShares("source", lower={"law": 0.25})},
    }
    found = {}
    for name, options in arms.items():
        with Recorder(path, fresh=True, title=f"Law: {name}") as record:
            match, weight, losses, pool, selection = train(options, record)
        shown = ", ".join(f"{source} {weight[source]:.2f} ({losses[source]:.2f})" for source in CENTRES)
        print(f"law, {name}: match {match:.2f}; weight (and test loss): {shown}")
        found[name] = match, weight, losses
    refused = (selection.reasons.code != int(Reason.PICKED)).nonzero()[0, 0]
    print("\n".join(why(read(path), pool["id"][int(refused)])))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
