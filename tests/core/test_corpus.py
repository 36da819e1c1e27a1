"""The demos' text: always the same, never overlapping, labelled, and careful with a user's files."""

import hashlib
import os
import subprocess
import sys
from collections import Counter

import pytest

from ftw.demo import corpus as corpora
from ftw.demo import text_files
from ftw.demo.corpus import COPIED, LABELS, SHUFFLED, WINDOW, Stream, load
from ftw.demo.text_files import TextError, read_files


@pytest.fixture(scope="module")
def corpus():
    return load()


def windows(samples):
    """Every run of WINDOW bytes, white space as one blank; written apart from the code it checks."""
    found = set()
    for sample in samples:
        text = b" ".join(sample.text.split())
        found.update(text[i : i + WINDOW] for i in range(len(text) - WINDOW + 1))
    return found


DIGEST = """
import hashlib
from ftw.demo.corpus import Stream, load
corpus = load()
stream = Stream(corpus, seed=3)
print(hashlib.sha256(repr((corpus, stream.pool(7), stream.target(24))).encode()).hexdigest())
"""


def test_the_text_and_the_stream_depend_on_nothing_but_seeds(corpus):
    stream = Stream(corpus, seed=3)
    here = hashlib.sha256(repr((corpus, stream.pool(7), stream.target(24))).encode()).hexdigest()
    environment = os.environ | {"PYTHONHASHSEED": "12345"}
    there = subprocess.run([sys.executable, "-c", DIGEST], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert stream.pool(7) == Stream(corpus, seed=3).pool(7)
    assert stream.pool(7) != stream.pool(8)
    assert stream.pool(7) != Stream(corpus, seed=4).pool(7)
    assert stream.target(24) != Stream(corpus, seed=4).target(24)


def test_nothing_of_target_or_test_occurs_elsewhere(corpus):
    test, target = windows(corpus.test), windows(corpus.target)
    others = windows([*corpus.pretrain, *corpus.stream, *corpus.hidden])
    assert len(test) > 10_000
    assert not test & others
    assert not target & others
    assert not test & target
    assert corpus.dropped > 0  # pydoc's topics do repeat themselves


def test_splits_are_large_enough_and_labelled(corpus):
    assert corpus.sources == ("library source", "encodings tables", "Unicode names")
    assert {s.source for s in corpus.pretrain} == set(corpus.sources)
    assert {s.source for s in [*corpus.hidden, *corpus.target, *corpus.test]} == {corpus.domain}
    assert {len(s.text) for split in (corpus.pretrain, corpus.hidden, corpus.test) for s in split} == {65}
    assert len(corpus.test) >= 256
    assert len(corpus.target) >= 240


def test_shares_of_a_pool(corpus):
    for size in (1, 10, 64):
        counts = Counter(sample.source for sample in Stream(corpus, size, seed=0).pool(0))
        assert counts.total() == size
        assert [counts[s] for s in (corpus.domain, SHUFFLED, COPIED)] == [round(size * x) for x in (0.1, 0.25, 0.2)]
    stream = Stream(corpus, seed=0)
    pools = [sample for step in range(20) for sample in stream.pool(step)]
    assert len({s.text for s in pools if s.source == COPIED}) == 3
    texts = {bytes(sorted(s.text)) for s in corpus.stream}
    spoilt = [s.text for s in pools if s.source == SHUFFLED]
    assert all(bytes(sorted(text)) in texts for text in spoilt)
    assert not {s.text for s in corpus.stream} & set(spoilt)
    plain = Stream(corpus, seed=0, domain=0, shuffled=0, copied=0).pool(0)
    assert {s.source for s in plain} <= set(corpus.sources)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"domain": 0.9}, {"copied": -0.5}])
def test_shares_that_make_no_pool(corpus, wrong):
    with pytest.raises(ValueError, match="do not make a pool"):
        Stream(corpus, **({"size": 64, "seed": 0} | wrong))


def test_a_python_without_the_text_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(TextError, match=r"pydoc_data.*install"):
        load()
    monkeypatch.setattr(corpora.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TextError, match="library source: 0 bytes"):
        load(domain={"mine": b"text " * 1000})


def test_the_core_is_not_loaded():
    code = "import ftw.demo.corpus, ftw.report, sys; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# A user's files


def prose(words=3000, salt=""):
    return " ".join(hashlib.sha256(f"{salt}{i}".encode()).hexdigest()[: 3 + i % 7] for i in range(words)).encode()


def test_own_text(tmp_path):
    (tmp_path / "pool").mkdir()
    for i in range(3):
        (tmp_path / "pool" / f"{i}.txt").write_bytes(prose(salt=str(i)))
    (tmp_path / "wanted.txt").write_bytes(prose(salt="wanted") * 2)  # said twice: most of it cannot be tested on
    pool, skipped = read_files([tmp_path / "pool"])
    target, _ = read_files([tmp_path / "wanted.txt"])
    assert list(pool) == ["pool"]
    assert not skipped
    corpus = load(rest=pool, domain=target)
    assert corpus.domain == "wanted.txt"
    assert corpus.dropped > 10
    assert not windows(corpus.test) & windows([*corpus.hidden, *corpus.target, *corpus.stream])
    with pytest.raises(TextError, match=r"too little target text: the \w+ split got \d+ samples .* dropped"):
        load(rest=pool, domain=pool)  # a target that stands in the pool
    with pytest.raises(TextError, match="too little pool text"):
        load(rest={"x": b"short" * 20}, domain=target)
    with pytest.raises(ValueError, match="length"):
        load(3)


def test_what_a_folder_holds_that_is_no_text(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "good.txt").write_bytes(b"good text")
    (inside / "latin.txt").write_bytes("Übermaß".encode("latin-1"))
    (inside / "utf16.txt").write_bytes("wide".encode("utf-16"))
    (inside / "empty.txt").write_bytes(b"\n \n")
    (inside / "binary").write_bytes(b"ELF\0\0")
    (inside / ".hidden").write_bytes(b"hidden")
    (inside / ".git").mkdir()
    (inside / ".git" / "config").write_bytes(b"config")
    (inside / "device").symlink_to("/dev/zero")
    (inside / "loop").symlink_to(inside)
    (tmp_path / "secret").write_bytes(b"secret")
    (inside / "out").symlink_to(tmp_path / "secret")
    (inside / "below").mkdir()
    (inside / "below" / "more.txt").write_bytes(b"more text")
    os.mkfifo(inside / "pipe")
    texts, skipped = read_files([inside])
    assert set(texts["inside"].split(b"\n")) >= {b"good text", b"more text", "Übermaß".encode("latin-1")}
    assert b"secret" not in texts["inside"]
    assert b"config" not in texts["inside"]
    reasons = {os.path.basename(path): reason for path, reason in skipped}
    assert reasons == {
        "empty.txt": "empty",
        "binary": "binary: it holds zero bytes",
        ".hidden": "hidden",
        ".git": "hidden",
        "device": "a symbolic link",
        "loop": "a symbolic link",
        "out": "a symbolic link",
        "pipe": "not a regular file",
    }


@pytest.mark.parametrize("make", ["fifo", "device", "link to a device", "empty", "nothing", "empty folder"])
def test_an_argument_without_text(tmp_path, make):
    path = tmp_path / "it"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "device":
        path = "/dev/zero"
    elif make == "link to a device":
        path.symlink_to("/dev/zero")
    elif make == "empty":
        path.touch()
    elif make == "empty folder":
        path.mkdir()
    with pytest.raises(TextError, match="no text to read"):
        read_files([path])


def test_limits_are_said(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 100)
    monkeypatch.setattr(text_files, "MAX_FILE", 60)
    monkeypatch.setattr(text_files, "MAX_TOTAL", 110)
    texts, skipped = read_files([tmp_path])
    assert sum(map(len, next(iter(texts.values())).split(b"\n"))) == 110
    assert [reason for _, reason in skipped][:2] == [
        "only the first 60 bytes are used",
        "only the first 50 bytes are used",
    ]
    assert "all that follows" in skipped[2].reason


def test_names_are_told_apart_and_can_be_printed(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_bytes(b"text of " + name.encode())
    (tmp_path / "domain").write_bytes(b"taken")
    texts, _ = read_files([tmp_path / "a" / "same", tmp_path / "b" / "same", tmp_path / "domain"], reserved=LABELS)
    assert len(texts) == 3
    assert next(iter(texts)) == "same"
    assert not {"domain", SHUFFLED, COPIED} & texts.keys()
    odd = os.fsencode(tmp_path) + b"/odd\x1b[31m\xff"
    with open(odd, "wb") as file:
        file.write(b"text")
    (label,) = read_files([os.fsdecode(odd)])[0]
    assert label == r"odd\x1b[31m\xff"
