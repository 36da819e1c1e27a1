"""Reasons: why each candidate was picked or refused, from the numbers that the choice has already.

The stages refuse in turn. The shortlist refuses by score. On it a candidate is refused as harmful where its score is
not positive, by the quota where it was better than a pick in the filter's own order, and otherwise because the picks
explain it: the one with the largest cosine in the P metric is its rival.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

from . import _array

__all__ = ["Chosen", "Reason", "Reasons", "reasons"]


class Reason(IntEnum):
    """Why a candidate was picked or refused; arrays carry it as int32.

    Examples
    --------
    >>> Reason(2).message
    'refused: a kept sample explains most of it'
    """

    PICKED = 0
    REFUSED_SCORE = 1
    REFUSED_REDUNDANT = 2
    REFUSED_HARMFUL = 3
    REFUSED_QUOTA = 4
    DROPPED = 5

    @property
    def message(self) -> str:
        """One phrase for people."""
        return _MESSAGES[self]


_MESSAGES = {
    Reason.PICKED: "picked",
    Reason.REFUSED_SCORE: "refused: its score is too low",
    Reason.REFUSED_REDUNDANT: "refused: a kept sample explains most of it",
    Reason.REFUSED_HARMFUL: "refused: its update does not lower the target loss",
    Reason.REFUSED_QUOTA: "refused: the quota gave its place to another source",
    Reason.DROPPED: "dropped: its gradient is not finite",
}


class Reasons(NamedTuple):
    """Why each of n candidates was picked or refused.

    Attributes
    ----------
    code : int32 array (n,)
        A `Reason`. REFUSED_SCORE is a candidate off the shortlist, or one that the filter's own limit on scores refused
        (top_k and threshold compare nothing else).
    residual : array (n,)
        ``(b - K w)_i`` with the non-negative weights of the last refit, in their own scale: what the kept samples leave
        unmatched of the candidate's score. NaN off the shortlist; after ``filter="top_k"``, which forms no Gram matrix
        beyond that of the picks, NaN for all but them.
    rival : integer array (n,)
        Of a candidate refused as redundant, the kept candidate with the largest cosine to it; -1 for the others.
    similarity : array (n,)
        That cosine, in the P metric; NaN for the others.
    """

    code: Any
    residual: Any
    rival: Any
    similarity: Any


class Chosen(NamedTuple):
    """What a choice knows about its candidates when it is made; s are on the shortlist, k are kept."""

    short: Any  # (s,): the candidates on the shortlist, in ascending order
    picks: Any  # (k,): places in the shortlist, in pick order
    passed: Any  # (k,) booleans: picks that the filter let pass
    linear: Any  # (s,): b as the filter saw it
    gram: Any  # (s, s), or None
    part: Any  # (k, k): the Gram matrix of the picks, or None
    fitted: Any  # (k,): the weights of the last refit, or None
    sound: Any  # (s,) booleans: the candidate's row of the Gram matrix is finite
    over: Any  # (s,) booleans: refused by the quota in the filter, or None
    passed_over: Any  # (n,) booleans: refused by the quota on the way to the shortlist, or None


def reasons(xp: Any, scores: Any, chosen: Chosen) -> Reasons:
    """Return the reasons of all candidates, given their scores (n,)."""
    c, device = chosen, _array.device(scores)
    hit = xp.arange(c.short.shape[0], device=device)[:, None] == xp.astype(c.picks, c.short.dtype)[None, :]  # (s, k)
    picked = xp.any(hit & c.passed[None, :], axis=1)  # (s,)
    b = xp.take(scores, c.short)  # (s,)
    explained = int(Reason.REFUSED_SCORE if c.gram is None else Reason.REFUSED_REDUNDANT)
    code = xp.full(c.short.shape, explained, dtype=xp.int32, device=device)  # (s,)
    code = xp.where(xp.any(hit, axis=1), int(Reason.REFUSED_SCORE), code)  # kept in shape only
    if c.over is not None:
        code = xp.where(c.over, int(Reason.REFUSED_QUOTA), code)
    code = xp.where(b <= 0, int(Reason.REFUSED_HARMFUL), code)
    code = xp.where(picked, int(Reason.PICKED), code)
    code = xp.where(xp.isfinite(b) & c.sound, code, int(Reason.DROPPED))

    nan = xp.full_like(b, xp.nan)  # (s,)
    residual, rival, similarity = nan, xp.zeros_like(c.short) - 1, nan
    if c.gram is not None:
        columns = xp.take(c.gram, c.picks, axis=1)  # (s, k)
        if c.fitted is not None:
            residual = c.linear - columns @ c.fitted
        lengths = xp.linalg.diagonal(c.gram)  # (s,)
        root = xp.sqrt(xp.where(lengths > 0, lengths, 1.0))
        cosines = columns / root[:, None] / xp.take(root, c.picks)[None, :]  # (s, k)
        cosines = xp.where(c.passed[None, :], cosines, -xp.inf)
        nearest = xp.argmax(cosines, axis=1)  # (s,)
        redundant = code == int(Reason.REFUSED_REDUNDANT)
        rival = xp.where(redundant, xp.take(c.short, xp.take(c.picks, nearest)), rival)
        similarity = xp.where(redundant, xp.max(cosines, axis=1), nan)
    elif c.part is not None and c.fitted is not None:
        left = xp.take(c.linear, c.picks) - c.part @ c.fitted  # (k,)
        left = xp.sum(xp.where(hit, left[None, :], 0.0), axis=1)  # (s,)
        residual = xp.where(xp.any(hit, axis=1), left, nan)

    everyone = xp.arange(scores.shape[0], dtype=c.short.dtype, device=device)  # (n,)
    where = xp.searchsorted(c.short, everyone)  # (n,)
    where = xp.where(where < c.short.shape[0], where, 0)
    there = xp.take(c.short, where) == everyone

    def spread(x: Any, other: Any) -> Any:
        return xp.where(there, xp.take(x, where), other)

    refused = xp.full(everyone.shape, int(Reason.REFUSED_SCORE), dtype=xp.int32, device=device)
    if c.passed_over is not None:
        refused = xp.where(c.passed_over, int(Reason.REFUSED_QUOTA), refused)
    refused = xp.where(xp.isfinite(scores), refused, int(Reason.DROPPED))
    return Reasons(
        xp.astype(spread(code, refused), xp.int32),
        spread(residual, xp.nan),
        spread(rival, -1),
        spread(similarity, xp.nan),
    )
