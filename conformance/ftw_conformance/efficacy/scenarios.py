"""The scenarios: what is learned, from what, with which optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from . import tasks_digits, tasks_sentiment, tasks_text
from .learner import Task

__all__ = ["SCENARIOS", "Scenario", "files"]


class Scenario(NamedTuple):
    """A task by name, its options, and what it is, in words."""

    task: str
    options: Mapping[str, Any]
    words: str
    labelled: bool = True  # whether it is known which samples are good
    seeds: int = 8  # paired, by default; more where runs scatter
    budget: float | None = None  # sample passes of a run; None: all methods take the task's steps

    def build(self, seed: int, steps: int | None = None) -> Task:
        """Return the task of a seed."""
        kinds: dict[str, Callable[..., Task]] = {"digits": tasks_digits.Digits, "sentiment": tasks_sentiment.Sentiment}
        kind = kinds.get(self.task, tasks_text.Text)
        options: dict[str, Any] = dict(self.options) if steps is None else {**self.options, "steps": steps}
        return kind(seed, **options)


def _digits(words: str, seeds: int = 8, **options: Any) -> Scenario:
    return Scenario("digits", options, words, seeds=seeds)


def _sentiment(words: str, **options: Any) -> Scenario:
    return Scenario("sentiment", options, words, seeds=16, budget=12000.0)


def _text(words: str, task: str = "text", **options: Any) -> Scenario:
    return Scenario(task, options, words)


SCENARIOS: dict[str, Scenario] = {
    "digits-10": _digits("digits, 10 targets", targets=10),
    "digits-20": _digits("digits, 20 targets", targets=20),
    "digits-40": _digits("digits, 40 targets"),
    "weak-20": _digits("digits with noisy pixels, 20 targets", 24, targets=20, noise=0.8),
    "weak-40": _digits("digits with noisy pixels, 40 targets", 24, noise=0.8),
    "clean-70": _digits("digits, 70 % true labels", clean=0.7),
    "clean-90": _digits("digits, 90 % true labels", clean=0.9),
    "clean-100": _digits("digits, 100 % true labels", clean=1.0),
    "sgd-.05": _digits("digits, SGD with momentum, lr .05", optimizer="sgd", lr=0.05),
    "sgd-.015": _digits("digits, SGD with momentum, lr .015", optimizer="sgd", lr=0.015),
    "missing": _digits("digits, 10 targets that lack half of the classes", targets=10, missing=5),
    "text-6": _text("text, 6 targets", targets=6),
    "text-24": _text("text, 24 targets"),
    "lora-24": _text("text, LoRA of rank 4, 24 targets", rank=4, lr=3e-3),
    "sentiment-48": _sentiment("sentiment, 48 targets"),
    "sentiment-1500": _sentiment("sentiment, 1500 targets", held=1500),
    "sentiment-useful": _sentiment("sentiment, a mostly useful pool", flipped=0.05, neutral=0.05),
    "languages-24": _text("text in several languages, 24 targets", "languages", kind="languages"),
}


def files(pool: list[str], target: list[str]) -> Scenario:
    """Return the scenario of a user's own files."""
    return Scenario("files", {"kind": "files", "files": (tuple(pool), tuple(target))}, "your files", labelled=False)
