"""`fbitrain data inspect`: numbers that are right, or said to be estimates; borders where they are in the stream."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import sentencepiece

from fbitrain.commands.verbs import call
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.reading.documents import Document
from fbitrain.data.sources.shards import Shard
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.data.tools.excerpt import excerpt
from fbitrain.data.tools.segments import CONTINUED, UNKNOWN, first_sequences, segments
from fbitrain.data.tools.survey import Sample, Survey, evenly_spaced, survey

BOS, EOS = 256, 257
WriteShard = Callable[[Path, Sequence[str]], Path]


def counted(data: DataConfig, tokenizer: str, max_shards: int = 0, sample_bytes: int = 1 << 20) -> Survey:
    return survey(data, tokenizer, max_shards=max_shards, sample_bytes=sample_bytes, n_first=2, n_workers=1)[0]


@pytest.fixture
def wiki(tmp_path: Path, write_shard: WriteShard) -> DataConfig:
    """Four shards of four documents, the last shard with a bad record."""
    for i, suffix in enumerate(("jsonl", "jsonl.gz", "jsonl.zst", "jsonl")):
        write_shard(tmp_path / "wiki" / f"{i}.{suffix}", [f"document {i}.{j} " + "é" * 10 * j for j in range(4)])
    with (tmp_path / "wiki" / "3.jsonl").open("a") as file:
        file.write("{broken\n")
    return DataConfig(sources=[SourceConfig(name="wiki", paths=[str(tmp_path / "wiki")])], n_lanes=2, seq_len=40)


def test_a_source_read_whole_is_counted_exactly(wiki: DataConfig, byte_tokenizer: str) -> None:
    of_wiki = counted(wiki, byte_tokenizer)
    n_bytes = 16 * len("document 0.0 ") + 4 * 2 * 10 * (0 + 1 + 2 + 3)
    assert of_wiki.is_complete
    assert of_wiki.has_all_tokens
    assert (of_wiki.documents, of_wiki.n_bytes, of_wiki.bad_records) == (16, n_bytes, 1)
    assert (of_wiki.tokens_per_byte, of_wiki.tokens) == (1.0, n_bytes + 2 * 16)  # one token per byte, BOS and EOS
    assert sorted(of_wiki.lengths.tolist()) == sorted([13, 33, 53, 73] * 4)
    assert [(first.shard, first.line) for first in of_wiki.first] == [("0.jsonl", 0), ("0.jsonl", 1)]


def test_a_part_of_a_source_is_scaled_by_the_size_of_what_was_read(
    tmp_path: Path, write_shard: WriteShard, byte_tokenizer: str
) -> None:
    for i in range(8):
        write_shard(tmp_path / f"{i}.jsonl", ["a text of this length"] * 50)
    data = DataConfig(sources=[SourceConfig(name="c4", paths=[str(tmp_path)])])
    of_c4 = counted(data, byte_tokenizer, max_shards=2, sample_bytes=1000)
    assert sorted(of_c4.sizes) == ["0.jsonl", "4.jsonl"]
    assert not of_c4.is_complete
    assert not of_c4.has_all_tokens
    assert of_c4.documents == pytest.approx(400)
    assert of_c4.tokens == pytest.approx(400 * (21 + 2))
    assert 900 < of_c4.read.sampled_bytes <= 1000


def test_ready_made_ids_are_counted_as_tokens(tmp_path: Path, byte_tokenizer: str) -> None:
    token_id = load_tokenizer(byte_tokenizer).encode("A")
    lines = [json.dumps({"token_ids": token_id * n}) for n in (3, 5)]
    (tmp_path / "0.jsonl").write_text("\n".join(lines))
    data = DataConfig(sources=[SourceConfig(name="amber", paths=[str(tmp_path)], kind="token_ids")])
    amber = counted(data, byte_tokenizer)
    assert (amber.documents, amber.tokens, amber.n_bytes) == (2, 8, 0)
    assert (amber.lengths.tolist(), amber.first[0].excerpt) == ([3, 5], "AAA")


def test_a_sample_keeps_to_its_bytes_and_to_the_content() -> None:
    documents = [Document(f"{i:03d}", n_bytes=3) for i in range(100)]
    samples = []
    for order in (documents, documents[::-1]):
        sample = Sample(30)
        for document in order:
            sample.add(document)
        samples.append({document.text for document in sample.documents()})
    assert samples[0] == samples[1]
    assert len(samples[0]) == 10
    long = Sample(30)
    long.add(Document("x" * 100, n_bytes=100))
    assert len(long.documents()) == 1


@pytest.mark.parametrize(("n", "expected"), [(0, "01234"), (2, "02"), (3, "013"), (5, "01234"), (9, "01234")])
def test_shards_are_chosen_evenly(n: int, expected: str) -> None:
    shards = [Shard(f"/{i}", str(i), 1) for i in range(5)]
    assert "".join(shard.name for shard in evenly_spaced(shards, n)) == expected


def test_everything_in_an_excerpt_is_visible() -> None:
    assert excerpt("a\nb\t\\n\x00\u200b\ufeffé漢") == "a␊b␉\\n␀<U+200B><U+FEFF>é漢"
    assert excerpt("x" * 50 + "y" * 1000 + "z" * 50, head=3, tail=2) == "xxx [... 1,095 characters ...] zz"


@pytest.mark.parametrize(
    ("ids", "begun", "bos", "eos", "expected"),
    [
        ([1, 5, 2, 1, 6], ["a", "b"], 1, 2, [(0, "a"), (3, "b")]),
        ([5, 2, 1, 6, 7], ["b"], 1, 2, [(0, CONTINUED), (2, "b")]),
        ([5, 1, 6, 2, 1], ["b"], 1, 2, [(0, CONTINUED), (4, "b")]),  # a text that holds the BOS token itself
        ([5, 6, 7], [], 1, 2, [(0, CONTINUED)]),
        ([5, 2, 6, 2, 7], ["b", "c"], None, 2, [(0, CONTINUED), (2, "b"), (4, "c")]),
        ([5, 2, 6], ["a", "b"], None, 2, [(0, "a"), (2, "b")]),
        ([5, 1, 6], ["b"], 1, None, [(0, CONTINUED), (1, "b")]),
        ([0, 5, 0, 0, 6], ["a", "b"], 0, 0, [(0, "a"), (3, "b")]),  # one token for both, as GPT-2's
        ([0, 0, 5], ["b"], 0, 0, [(0, CONTINUED), (1, "b")]),
        ([5, 6, 7], ["a", "b"], 1, 2, [(0, UNKNOWN)]),  # ready-made ids without borders
    ],
)
def test_sequences_are_cut_where_documents_begin(
    ids: list[int], begun: list[str], bos: int | None, eos: int | None, expected: list[tuple[int, str]]
) -> None:
    found = segments(np.array(ids, np.int64), begun, bos, eos)
    assert [(segment.start, segment.origin) for segment in found] == expected
    assert np.concatenate([segment.token_ids for segment in found]).tolist() == ids


def test_the_first_sequences_are_those_of_the_stream_with_their_documents(
    wiki: DataConfig, byte_tokenizer: str
) -> None:
    tokenizer = load_tokenizer(byte_tokenizer)
    n_checked = 0
    for token_ids, begun in first_sequences(wiki, tokenizer, 12):
        for segment in segments(token_ids, begun, BOS, EOS):
            assert segment.origin != UNKNOWN
            if segment.origin != CONTINUED:
                shard, _, line = segment.origin.removeprefix("wiki/").rpartition(":")
                text = tokenizer.decode(segment.token_ids.tolist())
                start = f"document {shard[0]}.{line.partition('#')[0]} "
                assert start.startswith(text[: len(start)])
                n_checked += 1
    assert n_checked > 6


def test_the_command(tmp_path: Path, wiki: DataConfig, byte_tokenizer: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    sources = [{"name": "wiki", "paths": wiki.sources[0].paths, "weight": 3.0}]
    sources += [{"name": "one", "paths": [str(tmp_path / "wiki" / "1.jsonl.gz")]}]
    phases = [{"from_step": 1, "weights": {"wiki": 0}}]
    data = {"sources": sources, "phases": phases, "tokenizer": byte_tokenizer, "seq_len": 40, "n_lanes": 2}
    config.write_text(json.dumps({"data": data}))
    assert (
        call(["data", "inspect", str(config), "--out", str(tmp_path / "out"), "--shards", "2", "data.n_lanes=1"]) == 0
    )
    out = capsys.readouterr().out
    table = out.splitlines()
    assert table[1].split()[:4] == ["wiki", "75.0%", "4", "2"]
    assert all(table[1].split()[i].startswith("~") for i in (4, 5, 7))
    assert table[2].split()[:5] == ["one", "25.0%", "1", "1", "4"]
    assert len({len(line) for line in table[:3]}) == 1
    assert "~ documents, text and bad records: in proportion to the bytes of the shards read" in out
    assert "wiki/0.jsonl:1  33 B\n          document 0.1 éééééééééé" in out
    assert "sequence 1: 41 tokens" in out
    assert "<BOS>document " in out
    assert matplotlib.image.imread(tmp_path / "out" / "lengths.png").std() > 0.01


def test_ids_of_another_vocabulary_are_shown_as_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["abc abd"] * 9), model_prefix=f"{tmp_path}/t", vocab_size=270, byte_fallback=True,
        model_type="bpe", hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "t.model")
    abc = tokenizer.encode("abc")
    sequences = [[*abc, 70000, tokenizer.vocab_size, *abc], abc]
    (tmp_path / "0.jsonl").write_text("".join(json.dumps({"token_ids": ids}) + "\n" for ids in sequences))
    source = {"name": "amber", "paths": [str(tmp_path / "0.jsonl")], "kind": "token_ids"}
    data = {"sources": [source], "tokenizer": tokenizer.path, "seq_len": 2 * len(abc), "n_lanes": 1}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    assert call(["data", "inspect", str(tmp_path / "config.yaml")]) == 0
    out = capsys.readouterr().out
    assert f"          abc<id 70000><id {tokenizer.vocab_size}>abc\n" in out
    assert "amber: 1 of the sequences read hold ids beyond the vocabulary" in out


def test_what_is_held_out_need_not_be_there_yet(
    tmp_path: Path, wiki: DataConfig, byte_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # A name may hold any character, also those that begin a formula in a picture's title.
    sources = [{"name": r"$\foo$", "paths": wiki.sources[0].paths}]
    data = {"sources": sources, "tokenizer": byte_tokenizer, "seq_len": 40, "heldout": [f"{tmp_path}/none.jsonl"]}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    assert call(["data", "inspect", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "sequence 1: 41 tokens" in capsys.readouterr().out
    assert (tmp_path / "out" / "lengths.png").is_file()


def test_errors_are_one_sentence(tmp_path: Path, wiki: DataConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"data": {"sources": [{"name": "wiki", "paths": wiki.sources[0].paths}]}}))
    assert call(["data", "inspect", str(config)]) == 1
    assert capsys.readouterr().err.endswith("config.yaml names no tokenizer; set data.tokenizer, or distill.teacher\n")
    assert call(["data", "inspect", str(config), f"data.tokenizer={tmp_path}/none"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
