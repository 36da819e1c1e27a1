"""Filter-then-Weight in a hand-written NumPy trainer: one hidden layer, Adam, a pool of mostly random labels."""

import numpy as np

import ftw

rng = np.random.default_rng(0)
D, H, POOL, KEEP, LR, BETAS = 20, 32, 64, 8, 3e-3, (0.9, 0.999)
teacher = rng.normal(size=D)


def draw(n, noise):
    """Points (n, D) and labels (n,) in {0, 1}, a share ``noise`` of them drawn by lot."""
    x = rng.normal(size=(n, D))
    return x, np.where(rng.random(n) < noise, rng.integers(0, 2, n), x @ teacher > 0).astype(float)


def gradients(params, x, y):
    """Losses (n,), and each sample's own gradient, layer by layer, as the factors it comes from."""
    h = np.tanh(x @ params["hidden"].T)  # (n, H)
    p = 1 / (1 + np.exp(-h @ params["out"].T))[:, 0]  # (n,)
    losses = -np.log(np.where(y > 0, p, 1 - p) + 1e-12)
    at_out = (p - y)[:, None]  # (n, 1)
    at_hidden = at_out * params["out"] * (1 - h * h)  # (n, H)
    return losses, {
        "hidden": ftw.OuterProduct(x[:, None, :], at_hidden[:, None, :]),  # one token a sample
        "out": ftw.OuterProduct(h[:, None, :], at_out[:, None, :]),
    }


def train(select, steps=150):
    """Return the loss on clean data after ``steps`` steps on a pool that is three quarters noise."""
    params = {"hidden": 0.3 * rng.normal(size=(H, D)), "out": 0.1 * rng.normal(size=(1, H))}
    state = {name: (np.zeros_like(p), np.zeros_like(p)) for name, p in params.items()}
    target, mean = draw(40, 0.0), np.full(40, 1 / 40)
    for step in range(steps):
        pool = draw(POOL, 0.75)
        _, candidates = gradients(params, *pool)
        if select:
            _, samples = gradients(params, *target)
            g = ftw.combine(samples, mean)
            options = {"lr": LR, "betas": BETAS, "damping": 0.1}
            geometry = {k: ftw.optimizers.adam(*state[k], step, anticipate=g[k], **options).operator for k in params}
            chosen = ftw.filter_then_weight(candidates, g, geometry, keep=KEEP, target_samples=samples)
            update = ftw.combine(ftw.take(candidates, chosen.indices), chosen.weights)
        else:
            update = ftw.combine(ftw.take(candidates, np.arange(KEEP)), np.full(KEEP, 1 / KEEP))
        for name, g in update.items():
            m, v = (b * s + (1 - b) * x for b, s, x in zip(BETAS, state[name], (g, g * g), strict=True))
            state[name] = m, v
            scale = np.sqrt(1 - BETAS[1] ** (step + 1)) / (1 - BETAS[0] ** (step + 1))
            params[name] -= LR * scale * m / (np.sqrt(v) + 1e-8)
    return gradients(params, *draw(2000, 0.0))[0].mean()


if __name__ == "__main__":
    print(f"loss on clean data: random {train(False):.3f}, Filter-then-Weight {train(True):.3f}")
