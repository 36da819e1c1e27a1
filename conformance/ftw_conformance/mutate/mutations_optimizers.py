"""Deliberate errors in the update rules."""

from __future__ import annotations

from .mutation import Mutation, errors_in

OPTIMIZERS: list[Mutation] = [
    *errors_in(
        "optimizers/_update.py",
        (
            "xp.sqrt(total / max(math.prod(v.shape), 1))",
            "xp.sum(xp.sqrt(v)) / max(math.prod(v.shape), 1)",
            "the damping by the mean, not the rms",
        ),
        (
            "return -xp.expm1(t * math.log(beta))",
            "return -xp.expm1((t + 1) * math.log(beta))",
            "a correction a step late, for arrays",
        ),
        ("(xp.sqrt(v + eps_root) if eps_root else xp.sqrt(v)) + shift", "xp.sqrt(v + shift)", "eps inside the root"),
        (
            "shift = eps + damping *",
            "shift = eps + 0.0 * damping *",
            "the damping is missing",
        ),
        (
            "return offset + scalar_like(lr, param) * weight_decay * param",
            "return offset - scalar_like(lr, param) * weight_decay * param",
            "decay with the wrong sign",
        ),
        ("return Scale(0.0)", "return Scale(at_start)", "an untouched parameter moves"),
    ),
    *errors_in(
        "optimizers/_adam.py",
        ("early = rho_t <= 5", "early = rho_t <= 4", "RAdam rectifies a step early"),
        ("xp.maximum(b2 * u, xp.abs(a) + eps)", "xp.maximum(u, xp.abs(a) + eps)", "Adamax does not decay its maximum"),
        (
            "own = pick(xp, start, 1.0, correction(b2, step), v)\n    if v_max",
            "own = pick(xp, start, 1.0, correction(b2, step + 1), v)\n    if v_max",
            "the raw moment's correction is a step late",
        ),
        (
            "own = correction(b2, step + 1)\n        a = widen",
            "own = correction(b2, step)\n        a = widen",
            "step in place of step + 1",
        ),
        ("return v / own, start", "return v, start", "an undivided bias correction"),
        (
            "now = 1 / correction(b1, step + 1)",
            "now = 1 / correction(b1, step + 2)",
            "the numerator's correction is a step late",
        ),
        ("v = xp.maximum(v, widen(xp, v_max))", "v = widen(xp, v_max)", "AMSGrad forgets to take the maximum"),
        ("rectified = ((safe - 4) * (safe - 2)", "rectified = ((safe - 2) * (safe - 2)", "RAdam's rectification"),
        ("mu_next / (1 - product * mu * mu_next)", "mu_next / (1 - product * mu_next)", "NAdam's product of momenta"),
    ),
    *errors_in(
        "optimizers/_adagrad.py",
        ("v = alpha * v + (1 - alpha) * a**2", "v = alpha * v + a**2", "RMSprop adds the whole square"),
        (
            "rate = lr / (1 + step * lr_decay)",
            "rate = lr / (1 + (step + 1) * lr_decay)",
            "Adagrad's decay is a step early",
        ),
        ("v = v - mean**2", "v = v - mean", "the centred second moment"),
    ),
    *errors_in(
        "optimizers/_factored.py",
        (
            "xp.mean(a * a, axis=-1, keepdims=True)",
            "xp.sum(a * a, axis=-1, keepdims=True)",
            "Adafactor's rows are sums",
        ),
        (
            "mean = xp.mean(r, axis=-2, keepdims=True)",
            "mean = xp.mean(c, axis=-1, keepdims=True)",
            "Adafactor divides by the mean of the columns",
        ),
        ("(step + 1) ** -0.5, p)", "(step + 2) ** -0.5, p)", "Adafactor's relative step is a step late"),
        ("clip = xp.where(size > 1, size, 1.0)", "clip = size", "Adafactor stretches what it should clip"),
    ),
    *errors_in(
        "optimizers/_sign.py",
        ("b1 * m + (1 - b1) * _array", "b1 * m - (1 - b1) * _array", "Lion's anticipated gradient with the wrong sign"),
        (
            "share = 1.0 if momentum_buffer is None or not momentum else 1.0 - dampening",
            "share = 1.0 - dampening",
            "dampening in the first step",
        ),
    ),
    *errors_in(
        "optimizers/_matrix.py",
        (
            "a = a if left is None else left.T @ a",
            "a = a if left is None else left @ a",
            "SOAP rotates the anticipated gradient the wrong way",
        ),
        (
            "offset = offset if right is None else offset @ right.T",
            "offset = offset if right is None else offset @ right",
            "SOAP's momentum comes back transposed",
        ),
        (
            "return math.sqrt(max(1.0, height / width))",
            "return math.sqrt(max(1.0, width / height))",
            "Muon's scale of wide matrices",
        ),
        (
            "operator = Rotated(left, inner.values, right)",
            "operator = Rotated(left, inner.values[:, ::-1], right)",
            "SOAP's values in the wrong order",
        ),
        (
            "of_gradient = 1 - momentum**2 if nesterov",
            "of_gradient = 1 - momentum if nesterov",
            "Muon's Nesterov coefficient",
        ),
        ("xp.where(slope < 0, 0.0, slope)", "xp.abs(slope)", "Muon keeps its negative part, turned over"),
        ("_slope(steps, x, -y)", "_slope(steps, x, y)", "Muon: one slope for both parts"),
    ),
    *errors_in(
        "optimizers/_schedule_free.py",
        (
            "gamma * (1 - beta * (1 - share))",
            "gamma * (1 - beta * share)",
            "the share of z taken for that of the average",
        ),
        (
            "weight / pick(xp, some, both, 1.0, like)",
            "weight / pick(xp, some, before, 1.0, like)",
            "weights less the last",
        ),
        ("1.0, (step + 1) / warmup_steps", "1.0, step / warmup_steps", "a warm-up that begins at zero"),
    ),
    *errors_in(
        "optimizers/_factored.py",
        ("square = a * a + eps[0]", "square = a * a", "the floor of transformers' Adafactor left out"),
        (
            "offset + beta1 * widen(xp, exp_avg)",
            "offset + alpha * beta1 * widen(xp, exp_avg)",
            "a rate on past updates",
        ),
    ),
    *errors_in(
        "optimizers/_adagrad.py",
        ("xp.sqrt(u + eps)", "xp.sqrt(u)", "Adadelta's floor of the updates left out"),
    ),
]
