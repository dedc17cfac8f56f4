"""Duplicates: exactly one of each text stays, the first; the list is believed for the shards it was made for only."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fbitrain.base.errors import UserError
from fbitrain.commands.verbs import call
from fbitrain.data.commands.duplicates import find_duplicates
from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.duplicate_list import DuplicateList, write_duplicates
from fbitrain.data.loader import TokenLoader
from fbitrain.data.reading.documents import Document
from fbitrain.data.sources.shards import Shard
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.data.tools.corpus import text_shards

Corpus = dict[str, dict[str, list[str]]]  # source -> shard name -> texts
SMALL: Corpus = {
    "arxiv": {"0.jsonl": ["one", "two", "one"], "1.jsonl": ["three", "two"]},
    "book": {"0.jsonl": ["four", "one", "four"], "1.jsonl": ["five"]},
}


def write_corpus(folder: Path, corpus: Corpus) -> DataConfig:
    for source, shards in corpus.items():
        (folder / source).mkdir(parents=True)
        for name, texts in shards.items():
            (folder / source / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return DataConfig(sources=[SourceConfig(name=source, paths=[str(folder / source)]) for source in corpus])


def write_config(folder: Path, data: DataConfig) -> Path:
    sources = [{"name": source.name, "paths": source.paths} for source in data.sources]
    (folder / "config.yaml").write_text(json.dumps({"data": {"sources": sources}}))  # JSON is YAML
    return folder / "config.yaml"


def texts_in_order(corpus: Corpus) -> list[str]:
    return [text for shards in corpus.values() for _, texts in sorted(shards.items()) for text in texts]


def texts_left(corpus: Corpus, duplicates: DuplicateList) -> list[str]:
    return [
        text
        for source, shards in corpus.items()
        for name, texts in sorted(shards.items())
        for line, text in enumerate(texts)
        if line not in duplicates.lines(source, name)
    ]


corpora = st.dictionaries(
    st.sampled_from(["arxiv", "book", "c4"]),
    st.dictionaries(
        st.sampled_from(["a.jsonl", "b.jsonl", "c.jsonl"]),
        st.lists(st.sampled_from(["one", "two", "three", "déjà vu", "a\nb", "a\tb"]), min_size=1, max_size=12),
        min_size=1,
    ),
    min_size=1,
)


@settings(deadline=None, max_examples=25)
@given(corpus=corpora)
def test_exactly_the_first_of_each_text_stays(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> None:
    folder = tmp_path_factory.mktemp("corpus")
    counts = find_duplicates(write_corpus(folder, corpus), folder / "duplicates.npz", memory_mb=16, n_workers=1)
    everything = texts_in_order(corpus)
    firsts = list(dict.fromkeys(everything))
    assert texts_left(corpus, DuplicateList(str(folder / "duplicates.npz"))) == firsts
    assert sum(source.within + source.across for source in counts.values()) == len(everything) - len(firsts)


@pytest.mark.parametrize("pretokenized", [False, True])
def test_training_reads_each_text_once_per_epoch(tmp_path: Path, byte_tokenizer: str, pretokenized: bool) -> None:
    data = dataclasses.replace(write_corpus(tmp_path, SMALL), n_lanes=1, n_workers=0, seq_len=3)
    find_duplicates(data, tmp_path / "d.npz", memory_mb=16, n_workers=1)
    data = dataclasses.replace(data, duplicates=str(tmp_path / "d.npz"))
    if pretokenized:
        pretokenize(data, byte_tokenizer, tmp_path / "tokens", 1)
        data = dataclasses.replace(data, pretokenized=str(tmp_path / "tokens"))
    places: list[str] = []
    with TokenLoader(data, load_tokenizer(byte_tokenizer), 0, 1, 1, log_documents=True) as loader:
        for _ in range(30):
            next(loader)
            places += loader.take_documents()
    passes: dict[str, list[str]] = {}  # texts by the mark of their epoch, which the first has not
    for place in places:
        where, _, epoch = place.partition("#")
        source, shard, line = where.replace(":", "/").split("/")
        passes.setdefault(epoch, []).append(SMALL[source][shard][int(line)])
    assert sorted(passes[""]) == sorted(passes["2"]) == ["five", "four", "one", "three", "two"]


def test_counts_tell_copies_within_a_source_from_those_across(tmp_path: Path) -> None:
    counts = find_duplicates(write_corpus(tmp_path, SMALL), tmp_path / "d.npz", memory_mb=16, n_workers=1)
    assert dataclasses.astuple(counts["arxiv"]) == (5, len("onetwoonethreetwo"), 0, 2, 0, len("onetwo"))
    assert dataclasses.astuple(counts["book"]) == (4, len("fouronefourfive"), 0, 1, 1, len("onefour"))


def test_workers_and_memory_do_not_change_the_file(tmp_path: Path) -> None:
    data = write_corpus(tmp_path, SMALL)
    find_duplicates(data, tmp_path / "a.npz", memory_mb=512, n_workers=1)
    find_duplicates(data, tmp_path / "b.npz", memory_mb=1, n_workers=2)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "arxiv", "b.npz", "book"]


def test_bad_records_are_counted_and_never_listed(tmp_path: Path) -> None:
    data = write_corpus(tmp_path, {"arxiv": {"0.jsonl": ["one"]}})
    with (tmp_path / "arxiv" / "0.jsonl").open("a") as file:
        file.write('{broken\n\n{broken\n{"text": "one"}\n')
    counts = find_duplicates(data, tmp_path / "d.npz", memory_mb=16, n_workers=1)
    assert (counts["arxiv"].documents, counts["arxiv"].bad_records) == (2, 2)
    assert DuplicateList(str(tmp_path / "d.npz")).lines("arxiv", "0.jsonl") == {4}


def test_ready_made_ids_have_a_content_too() -> None:
    ids = Document(token_ids=np.array([1, 2, 3], np.uint32))
    same, other = Document(token_ids=np.array([1, 2, 3], np.int64)), Document(token_ids=np.array([1, 2, 4], np.uint32))
    assert ids.content_digest(16) == same.content_digest(16) != other.content_digest(16)


def test_a_list_for_other_shards_is_refused_by_name(tmp_path: Path) -> None:
    data = write_corpus(tmp_path, SMALL)
    find_duplicates(data, tmp_path / "d.npz", memory_mb=16, n_workers=1)
    duplicates = DuplicateList(str(tmp_path / "d.npz"))
    duplicates.require_shards(text_shards(data))
    with (tmp_path / "book" / "1.jsonl").open("a") as file:
        file.write('{"text": "six"}\n')
    with pytest.raises(UserError, match=r"1\.jsonl of source 'book' had 17 bytes and has 33; make it again"):
        duplicates.require_shards(text_shards(data))
    (tmp_path / "book" / "1.jsonl").unlink()
    with pytest.raises(UserError, match=r"1\.jsonl of source 'book' has vanished"):
        duplicates.require_shards(text_shards(data))
    (tmp_path / "arxiv" / "2.jsonl").write_text('{"text": "six"}\n')
    with pytest.raises(UserError, match=r"2\.jsonl of source 'arxiv' has appeared"):
        duplicates.require_shards(text_shards(data))
    with pytest.raises(UserError, match="its sources were arxiv, book, they are now arxiv"):
        duplicates.require_shards({"arxiv": []})


def test_a_size_that_nobody_asked_a_server_for_is_not_compared(tmp_path: Path) -> None:
    write_duplicates(tmp_path / "d.npz", {"c4": [Shard("/a/0.jsonl", "0.jsonl", 100)]}, [])
    DuplicateList(str(tmp_path / "d.npz")).require_shards({"c4": [Shard("https://x/0.jsonl", "0.jsonl", -1)]})


def test_lines_beyond_32_bits(tmp_path: Path) -> None:
    lines = np.array([3, 1 << 33], np.uint64)
    write_duplicates(tmp_path / "d.npz", {"c4": [Shard("/0.jsonl", "0.jsonl", 1)]}, [("c4", "0.jsonl", lines)])
    assert DuplicateList(str(tmp_path / "d.npz")).lines("c4", "0.jsonl") == {3, 1 << 33}


def test_shards_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    sources = {"a": [Shard("/0", "b/0.jsonl", 1)], "a/b": [Shard("/1", "0.jsonl", 1)]}
    with pytest.raises(UserError, match=r"two shards are called a/b/0\.jsonl"):
        write_duplicates(tmp_path / "d.npz", sources, [])


def test_a_list_of_ten_thousand_shards_is_cheap(tmp_path: Path) -> None:
    shards = [Shard(f"/{i}.jsonl", f"{i}.jsonl", i) for i in range(10_000)]
    lines = (("c4", shard.name, np.array([7], np.uint64)) for shard in shards)
    write_duplicates(tmp_path / "d.npz", {"c4": shards}, lines)
    start = time.process_time()
    duplicates = pickle.loads(pickle.dumps(DuplicateList(str(tmp_path / "d.npz"))))
    duplicates.require_shards({"c4": shards})
    assert duplicates.lines("c4", "9999.jsonl") == {7}
    assert time.process_time() - start < 2


@pytest.mark.parametrize("damage", ["missing", "not a zip", "cut", "another npz", "a changed byte"])
def test_a_damaged_list_is_an_error_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "d.npz"
    write_duplicates(path, {"c4": [Shard("/0", "0.jsonl", 1)]}, [("c4", "0.jsonl", np.arange(9, dtype=np.uint64))])
    if damage == "missing":
        path.unlink()
    elif damage == "not a zip":
        path.write_text("hello")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-30])
    elif damage == "another npz":
        np.savez(path, weights=np.zeros(3))
    else:
        content = bytearray(path.read_bytes())
        content[content.index(np.arange(9, dtype="<u4").tobytes())] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"does not exist; make it with|is damaged or no list of duplicates"):
        DuplicateList(str(path)).lines("c4", "0.jsonl")


def test_the_command_prints_a_table_and_one_sentence_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_config(tmp_path, write_corpus(tmp_path, SMALL))
    assert call(["data", "duplicates", str(config), "--out", str(tmp_path / "d.npz"), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["arxiv", "5", "17", "B", "0", "2", "0", "6", "B", "40.00%"]
    assert lines[3].split()[:2] == ["all", "9"]
    assert call(["data", "duplicates", str(config), "--out", str(tmp_path / "d.txt")]) == 1
    assert (
        call(
            [
                "data",
                "duplicates",
                str(config),
                "--out",
                str(tmp_path / "d.npz"),
                "data.pretokenized=x",
                "data.sources=[{name: a}]",
            ]
        )
        == 1
    )
    errors = capsys.readouterr().err
    assert "d.txt must end in .npz" in errors
    assert "source 'a' lists no paths; this command needs the text that data.pretokenized=x was made from" in errors


def test_a_killed_run_leaves_no_list_and_the_next_one_works(tmp_path: Path) -> None:
    data = write_corpus(tmp_path, {"c4": {"0.jsonl": [f"text {i % 1000}" for i in range(100_000)]}})
    config, out = write_config(tmp_path, data), tmp_path / "d.npz"
    command = [sys.executable, "-m", "fbitrain", "data", "duplicates", str(config), "--out", str(out), "--workers", "1"]
    scratch = tmp_path / ".d.npz.tmp"
    killed = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (scratch / "rows_0").exists():
        assert killed.poll() is None
        time.sleep(0.01)
    with pytest.raises(UserError, match="is in use by another run"):
        find_duplicates(data, out, memory_mb=16, n_workers=1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert scratch.exists()
    assert not out.exists()
    find_duplicates(data, out, memory_mb=16, n_workers=1)
    assert not scratch.exists()
    assert len(DuplicateList(str(out)).lines("c4", "0.jsonl")) == 99_000
