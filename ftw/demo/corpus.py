"""The demos' text: what every Python carries, or a user's own files. Standard library only.

Two kinds of text make an experiment: a *domain* the model should get better at, and the *rest*, on which it was
pretrained and in which a little of the domain is hidden. Built in, the domain is English prose (pydoc's topics) and the
rest is library source, encodings tables and Unicode names. Text is bytes, cut into samples of one length; blocks of
neighbouring samples are dealt out to the splits, and a target or test sample that repeats anything found elsewhere is
dropped. Everything is a function of the text and of the seeds passed in.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
import sysconfig
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .text_files import TextError

__all__ = ["COPIED", "DOMAIN", "LABELS", "SHUFFLED", "Corpus", "Sample", "Stream", "load"]

LABELS = DOMAIN, SHUFFLED, COPIED = "domain", "shuffled", "copied"  # those that are not names of texts
WINDOW = 32  # bytes in a row that two samples may not have in common
BLOCK = 8  # neighbouring samples that go to the same split
PER_KIND = 5000  # samples taken of each kind of text


class Sample(NamedTuple):
    """Some bytes of text and the label of where they came from."""

    text: bytes
    source: str


@dataclass(frozen=True)
class Corpus:
    """The splits of an experiment's text: disjoint pieces, and nothing of target or test occurs in another split.

    Attributes
    ----------
    pretrain, stream : tuple of Sample
        The rest, in two parts: what the model is pretrained on, and what the stream is made of.
    hidden, target, test : tuple of Sample
        The domain, in three parts: what is hidden in the stream, what the target samples are drawn from, and what the
        result is measured on.
    domain : str
        The label of the domain's samples.
    dropped : int
        Target and test samples left out because they repeat something found elsewhere.
    """

    pretrain: tuple[Sample, ...]
    stream: tuple[Sample, ...]
    hidden: tuple[Sample, ...]
    target: tuple[Sample, ...]
    test: tuple[Sample, ...]
    domain: str
    dropped: int

    @property
    def sources(self) -> tuple[str, ...]:
        """The labels of the rest, in order of appearance."""
        return tuple(dict.fromkeys(sample.source for sample in self.stream))


def load(
    length: int = 65,
    *,
    rest: Mapping[str, bytes] | None = None,
    domain: Mapping[str, bytes] | None = None,
) -> Corpus:
    """Cut text into samples and deal them out to the splits.

    Parameters
    ----------
    length : int
        Bytes in a sample. A model that predicts the next byte sees ``length - 1`` of them.
    rest, domain : mapping of label to bytes, optional
        A user's own text (`ftw.demo.text_files`); None takes the built-in one.

    Raises
    ------
    TextError
        If there is too little text for the splits, or built-in text is asked for and this Python lacks it.
    """
    if length < 16:
        raise ValueError(f"length: samples of {length} bytes are too short to tell texts apart; take 16 or more")
    rest, domain = _rest() if rest is None else rest, _prose() if domain is None else domain
    name = next(iter(domain)) if len(domain) == 1 and not domain.keys() & rest.keys() else DOMAIN
    others = [_deal(_cut(text, label, length), (0.6, 0.4)) for label, text in rest.items()]
    pretrain = [sample for parts in others for sample in parts[0]]
    stream = [sample for parts in others for sample in parts[1]]
    prose = [sample for text in domain.values() for sample in _cut(text, name, length)]
    hidden, target, test = _deal(prose, (0.6, 0.2, 0.2))
    before = len(target) + len(test)
    target = _without_repeats(target, [*pretrain, *stream, *hidden], length)
    test = _without_repeats(test, [*pretrain, *stream, *hidden, *target], length)
    dropped = before - len(target) - len(test)
    corpus = Corpus(tuple(pretrain), tuple(stream), tuple(hidden), tuple(target), tuple(test), name, dropped)
    for split, least in {"pretrain": 64, "stream": 32, "hidden": 8, "target": 8, "test": 8}.items():
        if len(found := getattr(corpus, split)) < least:
            whose = "pool" if split in ("pretrain", "stream") else "target"
            raise TextError(
                f"too little {whose} text: the {split} split got {len(found)} samples of {length} bytes and needs "
                f"{least} ({dropped} target and test samples were dropped: their text occurs elsewhere too)"
            )
    return corpus


class Stream:
    """Pools of samples, most of them of no use, with a few from the domain hidden among them.

    Parameters
    ----------
    corpus : Corpus
        Where the samples come from.
    size : int
        Samples in a pool.
    seed : int
        Pools and targets are functions of the corpus, the seed and the step.
    domain, shuffled, copied : float
        Shares of the pool: samples of the domain; samples with their bytes in random order; copies of the hot samples.
    hot : int
        How many samples of the rest are copied over and over.
    """

    def __init__(
        self,
        corpus: Corpus,
        size: int = 64,
        *,
        seed: int,
        domain: float = 0.10,
        shuffled: float = 0.25,
        copied: float = 0.20,
        hot: int = 3,
    ) -> None:
        self._counts = [round(size * share) for share in (domain, shuffled, copied)]
        if size < 1 or min(self._counts) < 0 or sum(self._counts) > size:
            raise ValueError(
                f"size, domain, shuffled, copied: {size}, {domain}, {shuffled}, {copied} do not make a pool; "
                "the size must be positive, the shares not negative and their sum at most one"
            )
        self._corpus, self._size, self._seed = corpus, size, seed
        self._hot = _draw(random.Random(f"hot/{seed}"), corpus.stream, hot)

    def pool(self, step: int) -> list[Sample]:
        """Return the pool of one step, in random order."""
        rng = random.Random(f"pool/{self._seed}/{step}")
        domain, shuffled, copied = self._counts
        plain = _draw(rng, self._corpus.stream, self._size - domain - copied)
        spoilt = [Sample(bytes(rng.sample(s.text, len(s.text))), SHUFFLED) for s in plain[:shuffled]]
        copies = [Sample(rng.choice(self._hot).text, COPIED) for _ in range(copied)]
        pool = [*_draw(rng, self._corpus.hidden, domain), *spoilt, *copies, *plain[shuffled:]]
        rng.shuffle(pool)
        return pool

    def target(self, count: int) -> list[Sample]:
        """Return ``count`` target samples of this seed, fewer if the split has no more."""
        rng = random.Random(f"target/{self._seed}")
        return rng.sample(self._corpus.target, min(count, len(self._corpus.target)))


# ---------------------------------------------------------------------------------------------------------------------
# The built-in text


def _prose() -> dict[str, bytes]:
    """Return pydoc's topics, each paragraph once: topics quote each other at length."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise TextError(
            "this Python comes without pydoc_data, the text of its help topics: install the complete standard library "
            "(Debian and Ubuntu: apt install python3), or give a target text of your own"
        ) from error
    seen: set[str] = set()
    kept = []
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            if words not in seen and len(words) > 40:
                seen.add(words)
                kept.append(paragraph.strip("\n"))
    return {"English prose": "\n\n".join(kept).encode()}


def _rest() -> dict[str, bytes]:
    """Return library source, encodings tables and Unicode names."""
    library = Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec("encodings")
    tables = Path(next(iter((spec and spec.submodule_search_locations) or [str(library / "encodings")])))
    modules = [path for path in sorted(library.glob("*.py")) if path.stem in sys.stdlib_module_names]
    names = (f"{code:04X} {name}\n" for code in range(0x20, 0x3000) if (name := unicodedata.name(chr(code), "")))
    texts = {
        "library source": b"\n".join(path.read_bytes() for path in modules if path.is_file()),
        "encodings tables": b"\n".join(path.read_bytes() for path in sorted(tables.glob("*.py")) if path.is_file()),
        "Unicode names": "".join(names).encode(),
    }
    for label, text in texts.items():
        if len(text) < 100_000:
            raise TextError(
                f"this Python comes without enough of its own text ({label}: {len(text)} bytes found): install the "
                "complete standard library with its source files, or give a pool text of your own"
            )
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Cutting and dealing


def _cut(text: bytes, source: str, length: int) -> list[Sample]:
    """Cut ``text`` into samples, and keep at most PER_KIND of them, evenly spread in blocks."""
    samples = [Sample(text[i : i + length], source) for i in range(0, len(text) - length + 1, length)]
    blocks = [samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK)]
    keep = max(1, PER_KIND // BLOCK)
    if len(blocks) > keep:
        blocks = [blocks[i * len(blocks) // keep] for i in range(keep)]
    return [sample for block in blocks for sample in block]


def _deal(samples: Sequence[Sample], shares: Sequence[float]) -> list[list[Sample]]:
    """Deal blocks of neighbouring samples out to splits of the given shares, always in the same way."""
    blocks = [samples[i : i + BLOCK] for i in range(0, len(samples), BLOCK)]
    random.Random("deal").shuffle(blocks)
    ends = [round(len(blocks) * sum(shares[: i + 1])) for i in range(len(shares))]
    return [[s for block in blocks[start:end] for s in block] for start, end in zip([0, *ends], ends, strict=False)]


def _without_repeats(samples: Sequence[Sample], others: Iterable[Sample], length: int) -> list[Sample]:
    """Return the samples that share no window of text with ``others``, nor with an earlier one of their own."""
    width = min(WINDOW, length // 2)
    owners: dict[bytes, set[int]] = {}
    repeats: set[int] = set()
    for i, sample in enumerate(samples):
        for window in _windows(sample.text, width):
            mine = owners.setdefault(window, {i})
            if i not in mine:
                repeats.add(i)
    for sample in others:
        for window in _windows(sample.text, width):
            repeats |= owners.get(window, set())
    return [sample for i, sample in enumerate(samples) if i not in repeats]


def _windows(text: bytes, width: int) -> Iterator[bytes]:
    """Yield every run of ``width`` bytes, white space counted as one blank; all of a text that is shorter."""
    words = b" ".join(text.split())
    return (words[i : i + width] for i in range(max(1, len(words) - width + 1)))


def _draw(rng: random.Random, samples: Sequence[Sample], count: int) -> list[Sample]:
    """Draw ``count`` samples, all different while they last."""
    drawn: list[Sample] = []
    while len(drawn) < count:
        drawn += rng.sample(samples, min(count - len(drawn), len(samples)))
    return drawn
