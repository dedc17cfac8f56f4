"""Documents out of shards: every format, every entry point, every kind of damage."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import zstandard

from fbitrain.data import records
from fbitrain.data.records import BadRecord, Position, Record, read_record, read_records
from fbitrain.data.shards import DataError, Shard

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]
REDPAJAMA = Path(__file__).parents[2].parent / "shared" / "data" / "redpajama"


def shard(path: Path) -> Shard:
    return Shard(str(path), path.name, path.stat().st_size)


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def texts(items: Any) -> list[str]:
    return [item.text for item in items if isinstance(item, Record)]


def damage(items: Any) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, BadRecord)]


def random_texts(n: int) -> list[str]:
    """Documents with newlines, quotes and scripts, some longer than a reading chunk, and incompressible."""
    rng = random.Random(5)
    sizes = [rng.choice([1, 7, 300, 5000]) for _ in range(n)]
    sizes[n // 2] = records.CHUNK_BYTES + 11
    return ["".join(rng.choices('ab\n"\\é漢👍 ', k=size)) for size in sizes]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_document_in_order_from_every_line(tmp_path: Path, suffix: str, write_shard: Any) -> None:
    documents = random_texts(41)
    source = shard(write_shard(tmp_path / f"a{suffix}", documents))
    found = list(read_records(source))
    assert texts(found) == documents
    for i in (0, 1, 20, 21, 40):
        item = found[i]
        assert isinstance(item, Record)
        assert item.at.line == i
        assert texts(read_records(source, start=item.after)) == documents[i + 1 :]
        assert read_record(source, "text", item.at).text == documents[i]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("n_parts", [1, 2, 7, 50])
def test_parts_share_the_lines(tmp_path: Path, suffix: str, n_parts: int, write_shard: Any) -> None:
    documents = [f"document {i}" for i in range(23)]
    source = shard(write_shard(tmp_path / f"a{suffix}", documents))
    parts = [texts(read_records(source, part=part, n_parts=n_parts)) for part in range(n_parts)]
    assert parts == [documents[part::n_parts] for part in range(n_parts)]


def test_several_frames_and_members_with_padding(tmp_path: Path) -> None:
    halves = [line("one") + line("tw")[:5], line("tw")[5:] + line("three")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)) + b"\0" * 512)
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"meta"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable.join(map(zstandard.compress, halves)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        assert list(texts(read_records(shard(tmp_path / name)))) == ["one", "tw", "three"]


def test_long_windows(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # a stream: window as asked for
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(line("far")) + compressor.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 1 << 28
    assert texts(read_records(shard(tmp_path / "a.jsonl.zst"))) == ["far"]


def test_blank_lines_bom_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + line("one") + b"\n  \r\n" + line("two").replace(b"\n", b"\r\n") + line("three")[:-1]
    )
    found = list(read_records(shard(path)))
    assert texts(found) == ["one", "two", "three"]
    assert [item.at.line for item in found if isinstance(item, Record)] == [0, 3, 4]
    path.write_bytes(b"")
    assert list(read_records(shard(path))) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_corrupt_lines_are_named_and_passed_over(tmp_path: Path, suffix: str) -> None:
    bad = {
        b'{"text": "cut': "not JSON",
        b'{"text": "\xff\xfe"}': "not UTF-8",
        b'["text"]': "not a JSON object but list",
        b'{"content": "x"}': "has no field 'text'",
        b'{"text": null}': "is not a string but NoneType",
        b'{"text": ""}': "is empty",
        b'{"text": "\\ud800"}': "not JSON",  # half a surrogate pair is no text
    }
    raw = line("first") + b"".join(item + b"\n" + line(f"after {i}") for i, item in enumerate(bad))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(
        gzip.compress(raw) if suffix.endswith("gz") else zstandard.compress(raw) if suffix.endswith("zst") else raw
    )
    found = list(read_records(shard(path)))
    assert texts(found) == ["first", *(f"after {i}" for i in range(len(bad)))]
    assert [at for at, _ in damage(found)] == list(range(1, 14, 2))
    for (_, reason), wanted in zip(damage(found), bad.values(), strict=True):
        assert wanted in reason
    assert str(next(item for item in found if isinstance(item, BadRecord))).startswith(f"{path}, line 2: not JSON")


def test_another_text_key(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"content": "x", "text": 3}\n')
    assert texts(read_records(shard(tmp_path / "a.jsonl"), text_key="content")) == ["x"]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
@pytest.mark.parametrize("kept", [0, 3, 50, -1])
def test_a_cut_shard_is_noticed_once(tmp_path: Path, suffix: str, kept: int, write_shard: Any) -> None:
    documents = random_texts(30)
    path = write_shard(tmp_path / f"a{suffix}", documents)
    path.write_bytes(path.read_bytes()[:kept])
    found = list(read_records(shard(path)))
    assert texts(found) == documents[: len(texts(found))]
    assert len(damage(found)) == 1
    assert "the rest of the file is lost" in damage(found)[0][1]
    over_parts = [item for part in range(4) for item in read_records(shard(path), part=part, n_parts=4)]
    assert damage(over_parts) == damage(found)


def test_a_zst_cut_at_a_line_border_is_noticed(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    raw = compressor.compress(line("one")) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(raw)  # a whole line is there, the end of the frame is not
    found = list(read_records(shard(tmp_path / "a.jsonl.zst")))
    assert texts(found) == ["one"]
    assert damage(found) == [(1, "the rest of the file is lost: it is cut off in the middle of a compressed frame")]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_flipped_bits_and_trailing_rubbish_are_noticed(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(line(text) for text in random_texts(30))
    whole = gzip.compress(raw) if suffix.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    middle = len(whole) // 2
    for damaged in (whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :], whole + b"rubbish"):
        (tmp_path / f"a{suffix}").write_bytes(damaged)
        found = list(read_records(shard(tmp_path / f"a{suffix}")))
        assert "the rest of the file is lost" in damage(found)[-1][1]


def test_a_vanished_shard_is_a_bad_record(tmp_path: Path) -> None:
    found = list(read_records(Shard(str(tmp_path / "gone.jsonl"), "gone.jsonl", 3)))
    assert len(damage(found)) == 1
    assert "No such file" in damage(found)[0][1]


def test_a_document_that_is_no_longer_there(tmp_path: Path, write_shard: Any) -> None:
    source = shard(write_shard(tmp_path / "a.jsonl.gz", ["one", "two"]))
    with pytest.raises(DataError, match="line 3: the document of the checkpoint is no longer there"):
        read_record(source, "text", Position(2, 0))


def test_real_redpajama_records() -> None:
    if not REDPAJAMA.is_dir():
        pytest.skip(f"{REDPAJAMA} is absent: genuine RedPajama records are not read")
    for path in sorted(REDPAJAMA.glob("*/*.jsonl")):
        found = list(read_records(shard(path)))
        expected = [json.loads(raw)["text"] for raw in path.read_bytes().split(b"\n") if raw]
        assert texts(found) == expected
        assert not damage(found)
