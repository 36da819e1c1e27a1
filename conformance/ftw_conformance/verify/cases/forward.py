"""Scores from losses before and after a step: against exact scores on quadratics, the curvature term written out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ftw_reference as ref
import numpy as np

import ftw
from ftw.spi import namespace
from ftw_conformance.verify.table import Case, Expect, rounded

Array = Any


def scored(before: Any, after: Any, step: Any) -> dict[str, Any]:
    """Return the scores."""
    return {"scores": ftw.forward_scores(before, after, step)}


def account_scored(got: Mapping[str, Array], before: Array, after: Array, step: Array) -> dict[str, Expect]:
    """Return the reference's quotient; its rounding is that of the losses, divided by the step."""
    value = ref.forward_scores(before, after, float(step))
    sizes = np.abs(np.concatenate([before, after]))
    return {"scores": rounded(value, np.max(sizes, where=np.isfinite(sizes), initial=0.0) / float(step))}


def of_quadratic(theta: Any, d: Any, grads: Any, hessians: Any, step: Any) -> dict[str, Any]:
    """Return the scores of ``loss_i(x) = <g_i, x> + 1/2 <x, H_i x>`` at theta, along d."""
    xp = namespace(theta)

    def losses(x: Any) -> Any:
        bent = xp.matmul(hessians, xp.broadcast_to(x, (hessians.shape[0], *x.shape))[:, :, None])[:, :, 0]  # (n, p)
        return xp.matmul(grads, x) + xp.sum(bent * x[None, :], axis=-1) / 2  # (n,)

    return {"scores": ftw.forward_scores(losses(theta), losses(theta - step * d), step)}


def account_quadratic(
    got: Mapping[str, Array], theta: Array, d: Array, grads: Array, hessians: Array, step: Array
) -> dict[str, Expect]:
    """Return the exact score and the second-order term: on a quadratic there is no other."""
    s = float(step)
    exact = np.array([(g + H @ theta) @ d for g, H in zip(grads, hessians, strict=True)])  # <gradient at theta, d>
    bent = np.array([d @ H @ d for H in hessians])
    size = np.abs(grads) @ (np.abs(theta) + s * np.abs(d))
    size = np.max(size + np.array([np.sum(np.abs(H) * np.outer(np.abs(theta), np.abs(theta))) for H in hessians]))
    return {"scores": rounded(exact - s / 2 * bent, size / s, len(theta))}


def stepped(losses: Any, decrease: Any) -> dict[str, Any]:
    """Return the step for two roundings."""
    return {
        "step": ftw.forward_step(losses, decrease, 2.0**-8),
        "fine": ftw.forward_step(losses, decrease, 1e-7),
    }


def account_stepped(got: Mapping[str, Array], losses: Array, decrease: Array) -> dict[str, Expect]:
    """Return the reference's steps."""
    found = [ref.forward_step(losses, float(decrease), e) for e in (2.0**-8, 1e-7)]
    return {"step": rounded(found[0]), "fine": rounded(found[1])}


def cases() -> list[Case]:
    """Return the table's part."""
    rng = np.random.default_rng(11)
    n, p = 7, 5
    before, after = rng.uniform(1, 3, size=n), rng.uniform(1, 3, size=n)
    lost = np.where(np.arange(n) == 2, np.nan, after)
    gone = np.where(np.arange(n) == 4, np.inf, before)
    half = ("float64", "float32", "float16", "bfloat16")
    out = [
        Case("forward_scores/losses", scored, (before, after, np.asarray(0.25)), account_scored, half),
        Case("forward_scores/a NaN", scored, (before, lost, np.asarray(0.25)), account_scored),
        Case("forward_scores/an infinity", scored, (gone, after, np.asarray(0.25)), account_scored),
        Case("forward_scores/one sample", scored, (before[:1], after[:1], np.asarray(2.0)), account_scored),
    ]
    H = rng.normal(size=(n, p, p))
    quadratic = rng.normal(size=p), rng.normal(size=p), rng.normal(size=(n, p)), H + np.swapaxes(H, 1, 2)
    for step in (1.0, 0.125, 2.0**-7):
        inputs = (*quadratic, np.asarray(step))
        out.append(Case(f"forward_scores/quadratic, step {step}", of_quadratic, inputs, account_quadratic))
    for name, losses, decrease in (
        ("losses", rng.uniform(1, 3, size=4), 0.3),
        ("losses of both signs", rng.normal(size=6), 2.0),
        ("no loss", np.zeros(3), 0.3),
        ("no slope", np.ones(3), 0.0),
        ("a slope upward", np.ones(3), -1.0),
    ):
        out.append(Case(f"forward_step/{name}", stepped, (losses, np.asarray(decrease)), account_stepped))
    return out
