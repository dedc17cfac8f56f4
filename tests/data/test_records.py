"""Documents out of shards: every format, every entry point, every kind of damage."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from fbitrain.data.reading import line_files, records, table_files
from fbitrain.data.reading.documents import START, BadRecord, Document, Entry, Position
from fbitrain.data.reading.records import RecordFormat, decode, read_entries

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]
ALL_SUFFIXES = [*SUFFIXES, ".parquet"]
REDPAJAMA = Path(__file__).parents[2].parent / "shared" / "data" / "redpajama"
TEXT = RecordFormat("text", "text")
IDS = RecordFormat("token_ids", "token_ids")


def read(path: Path, format: RecordFormat = TEXT, *where: Any, **parts: int) -> Iterator[Document | BadRecord]:
    for item in read_entries(str(path), format, *where, **parts):
        yield decode(item, format, str(path)) if isinstance(item, Entry) else item


def entries(path: Path, *where: Any, format: RecordFormat = TEXT) -> list[Entry]:
    found = list(read_entries(str(path), format, *where))
    assert all(isinstance(item, Entry) for item in found)
    return [item for item in found if isinstance(item, Entry)]


def line(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def texts(items: Any) -> list[str]:
    return [item.text for item in items if isinstance(item, Document)]


def damage(items: Any) -> list[tuple[int, str]]:
    return [(item.line, item.reason) for item in items if isinstance(item, BadRecord)]


def bomb(path: Path, n_mib: int, byte: bytes) -> Path:
    """A small file that stands for `n_mib` MiB of one byte, and a document on the last line."""
    last = b"\n" + line("last")
    if path.suffix == ".jsonl":
        with path.open("wb") as file:
            file.truncate(n_mib << 20)  # a hole
            file.seek(0, 2)
            file.write(last)
        return path
    compressor: Any = zlib.compressobj(9, zlib.DEFLATED, 31)
    if path.suffix == ".zst":
        compressor = zstandard.ZstdCompressor(level=19).compressobj()
    with path.open("wb") as file:
        for _ in range(n_mib):
            file.write(compressor.compress(byte * (1 << 20)))
        file.write(compressor.compress(last) + compressor.flush())
    return path


def one(path: Path, raw: bytes, format: RecordFormat = TEXT) -> Document | BadRecord:
    path.write_bytes(raw)
    (found,) = read(path, format)
    return found


def compressed(suffix: str, raw: bytes) -> bytes:
    return gzip.compress(raw) if suffix.endswith("gz") else zstandard.compress(raw) if suffix.endswith("zst") else raw


def write(path: Path, documents: list[str]) -> Path:
    if path.suffix == ".parquet":
        table = pyarrow.table({"meta": list(range(len(documents))), "text": documents})
        parquet.write_table(table, path, row_group_size=7)
    else:
        path.write_bytes(compressed(path.suffix, b"".join(map(line, documents))))
    return path


def random_texts(n: int) -> list[str]:
    """Documents with newlines, quotes and scripts, some longer than a reading chunk, and incompressible."""
    rng = random.Random(5)
    sizes = [rng.choice([1, 7, 300, 5000]) for _ in range(n)]
    sizes[n // 2] = line_files.CHUNK_BYTES + 11
    return ["".join(rng.choices('ab\n"\\é漢👍 ', k=size)) for size in sizes]


@pytest.mark.parametrize("suffix", ALL_SUFFIXES)
def test_every_document_in_order_from_every_line(tmp_path: Path, suffix: str) -> None:
    documents = random_texts(41)
    path = write(tmp_path / f"a{suffix}", documents)
    assert texts(read(path)) == documents
    found = entries(path)
    assert [item.at for item in found] == [START, *(item.after for item in found[:-1])]
    for i in (0, 1, 13, 14, 20, 21, 40):
        assert found[i].at.line == i
        document = decode(found[i], TEXT, str(path))
        assert document == Document(documents[i], n_bytes=len(documents[i].encode()))
        assert entries(path, found[i].at) == found[i:]
        assert texts(read(path, TEXT, found[i].after)) == documents[i + 1 :]


@pytest.mark.parametrize("suffix", ALL_SUFFIXES)
@pytest.mark.parametrize("n_parts", [1, 2, 7, 50])
def test_parts_share_the_lines(tmp_path: Path, suffix: str, n_parts: int) -> None:
    documents = [f"document {i}" for i in range(23)]
    path = write(tmp_path / f"a{suffix}", documents)
    parts = [texts(read(path, part=part, n_parts=n_parts)) for part in range(n_parts)]
    assert parts == [documents[part::n_parts] for part in range(n_parts)]


def test_the_size_of_an_entry(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        found = entries(write(tmp_path / f"a{suffix}", ["é", "b"]))
        assert [item.size for item in found] == [len(line("é")) - 1, len(line("b")) - 1]
    assert [item.size for item in entries(write(tmp_path / "a.parquet", ["é", "b", ""]))] == [2, 1, 0]
    parquet.write_table(pyarrow.table({"token_ids": [[1, 2, 3], [4]]}), tmp_path / "ids.parquet")
    assert [item.size for item in entries(tmp_path / "ids.parquet", format=IDS)] == [12, 4]


def test_several_frames_and_members_with_padding(tmp_path: Path) -> None:
    halves = [line("one") + line("tw")[:5], line("tw")[5:] + line("three")]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(map(gzip.compress, halves)) + b"\0" * 512)
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"meta"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable.join(map(zstandard.compress, halves)))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        found = entries(tmp_path / name)
        assert texts(read(tmp_path / name)) == ["one", "tw", "three"]
        assert texts(read(tmp_path / name, TEXT, found[1].after)) == ["three"]


def test_long_windows(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()  # a stream: window as asked for
    (tmp_path / "a.jsonl.zst").write_bytes(compressor.compress(line("far")) + compressor.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.jsonl.zst").read_bytes()).window_size == 1 << 28
    assert texts(read(tmp_path / "a.jsonl.zst")) == ["far"]


def test_blank_lines_bom_and_missing_last_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + line("one") + b"\n  \r\n" + line("two").replace(b"\n", b"\r\n") + line("three")[:-1]
    )
    assert texts(read(path)) == ["one", "two", "three"]
    found = entries(path)
    assert [item.at.line for item in found] == [0, 3, 4]
    assert [entries(path, item.at)[0] for item in found] == found
    assert texts(read(path, TEXT, found[0].after)) == ["two", "three"]
    for empty in (b"", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n \n"):
        path.write_bytes(empty)
        assert list(read(path)) == []


def test_memory_is_that_of_one_line(tmp_path: Path) -> None:
    mib, rng = 1 << 20, random.Random(0)
    for suffix in SUFFIXES:
        with_long_line = compressed(suffix, line("short") + b'{"text": "' + b"x" * (16 * mib) + b'"}\n' + line("short"))
        of_many_lines = compressed(suffix, b"".join(line(rng.randbytes(3000).hex()) for _ in range(3000)))
        for raw, limit in ((with_long_line, 50 * mib), (of_many_lines, 12 * mib)):
            (tmp_path / f"a{suffix}").write_bytes(raw)
            tracemalloc.start()
            n_bytes = sum(item.size for item in read_entries(str(tmp_path / f"a{suffix}"), TEXT) if item)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert n_bytes > 16 * mib
            assert peak < limit


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_corrupt_lines_are_named_and_passed_over(tmp_path: Path, suffix: str) -> None:
    bad = {
        b'{"text": "cut': "not JSON: Unterminated string",
        b'{"text": "cut \xff': "not JSON: Unterminated string",
        b"\xff\xfe": "not JSON",
        b'{"text": "\\x"}': "not JSON",
        b"[" * 200_000: "not JSON",
        b'["text"]': "not a JSON object but list",
        b'{"content": "x"}': "has no field 'text'",
        b'{"text": null}': "field 'text' is not a string but NoneType",
        b'{"text": ["a"]}': "field 'text' is not a string but list",
        b'{"text": ""}': "field 'text' is empty",
    }
    raw = line("first") + b"".join(item + b"\n" + line(f"after {i}") for i, item in enumerate(bad))
    path = tmp_path / f"a{suffix}"
    path.write_bytes(compressed(suffix, raw))
    found = list(read(path))
    assert texts(found) == ["first", *(f"after {i}" for i in range(len(bad)))]
    assert [at for at, _ in damage(found)] == list(range(1, 2 * len(bad), 2))
    for (_, reason), wanted in zip(damage(found), bad.values(), strict=True):
        assert wanted in reason
    assert str(next(item for item in found if isinstance(item, BadRecord))).startswith(f"{path}, line 2: not JSON")


@pytest.mark.parametrize(
    ("raw", "text", "n_replaced"),
    [
        (b'{"text": "a\xffb"}', "a\ufffdb", 1),
        (
            b'{"text": "\xe2\x82", "x": "\xff"}',
            "\ufffd",
            1,
        ),  # a cut character is one sequence; other fields do not count
        (b'{"text": "\xed\xa0\x80"}', "\ufffd" * 3, 3),  # a surrogate written as if it were a character
        (b'{"text": "\\ud800 \\udc00"}', "\ufffd \ufffd", 2),
        (b'{"text": "\\ud83d\xff"}', "\ufffd\ufffd", 2),
        (b'{"text": "\\ud83d\\udc4d \\ud83d"}', "👍 \ufffd", 1),
        (b'{"text": "\xef\xbf\xbd\xff"}', "\ufffd\ufffd", 1),  # one of them was in the text already
        (b'{"text": "fine", "meta": "\xff"}', "fine", 0),
        (b'{"text": "fine", "prob": NaN}', "fine", 0),  # Python writes it, JSON has no such thing
        (b'{"text": "\\u0000\\ufeff"}', "\0\ufeff", 0),
    ],
)
def test_what_is_not_unicode_is_replaced_and_counted(tmp_path: Path, raw: bytes, text: str, n_replaced: int) -> None:
    found = one(tmp_path / "a.jsonl", raw)
    assert found == Document(text, n_bytes=len(text.encode()), n_replaced=n_replaced)


@given(st.lists(st.one_of(st.text(max_size=5).map(str.encode), st.binary(min_size=1, max_size=3)), max_size=6))
def test_replacement_is_pythons(parts: list[bytes]) -> None:
    raw = b"".join(parts)
    quoted = raw.translate(None, bytes(range(32)) + b'"\\') or b"x"
    entry = Entry(START, START, 0, b'{"text": "' + quoted + b'"}')
    document = decode(entry, TEXT, "a.jsonl")
    assert isinstance(document, Document)
    assert document.text == quoted.decode(errors="replace")
    assert document.n_replaced == document.text.count("\ufffd") - quoted.count("\ufffd".encode())


def test_another_text_key(tmp_path: Path) -> None:
    assert one(tmp_path / "a.jsonl", b'{"content": "x", "text": 3}\n', RecordFormat("text", "content")) == Document(
        "x", n_bytes=1
    )


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("kept", [0, 3, 50, -1])
def test_a_cut_shard_is_noticed_once(tmp_path: Path, suffix: str, kept: int) -> None:
    documents = random_texts(30)
    path = write(tmp_path / f"a{suffix}", documents)
    path.write_bytes(path.read_bytes()[:kept])
    found = list(read(path))
    assert texts(found) == documents[: len(texts(found))]
    assert len(damage(found)) == 1
    assert "the rest of the file is lost" in damage(found)[0][1]
    over_parts = [item for part in range(4) for item in read(path, part=part, n_parts=4)]
    assert damage(over_parts) == damage(found)


def test_a_zst_cut_at_a_line_border_is_noticed(tmp_path: Path) -> None:
    compressor = zstandard.ZstdCompressor().compressobj()
    raw = compressor.compress(line("one")) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    (tmp_path / "a.jsonl.zst").write_bytes(raw)  # a whole line is there, the end of the frame is not
    found = list(read(tmp_path / "a.jsonl.zst"))
    assert texts(found) == ["one"]
    assert damage(found) == [(1, "the rest of the file is lost: it is cut off in the middle of a compressed frame")]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_flipped_bits_and_trailing_rubbish_are_noticed(tmp_path: Path, suffix: str) -> None:
    raw = b"".join(line(text) for text in random_texts(30))
    whole = gzip.compress(raw) if suffix.endswith("gz") else zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    middle = len(whole) // 2
    for damaged in (whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :], whole + b"rubbish"):
        (tmp_path / f"a{suffix}").write_bytes(damaged)
        found = list(read(tmp_path / f"a{suffix}"))
        assert "the rest of the file is lost" in damage(found)[-1][1]


def test_parquet_of_every_string_type(tmp_path: Path) -> None:
    values = ["a", None, "", "é"]
    for type_ in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), pyarrow.binary()):
        array = pyarrow.array(values, pyarrow.string()).cast(type_)
        parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
        found = list(read(tmp_path / "a.parquet"))
        assert texts(found) == ["a", "é"]
        assert damage(found) == [(1, "field 'text' is not a string but NoneType"), (2, "field 'text' is empty")]
    parquet.write_table(
        pyarrow.table({"text": pyarrow.array(["a", "é", "a"]).dictionary_encode()}), tmp_path / "a.parquet"
    )
    assert texts(read(tmp_path / "a.parquet")) == ["a", "é", "a"]
    parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "a.parquet")
    assert damage(read(tmp_path / "a.parquet")) == [(0, "field 'text' is not a string but int")]


def test_parquet_cells_that_are_not_utf8(tmp_path: Path) -> None:
    array = pyarrow.array([b"fine", b"a\xffb"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": array}), tmp_path / "a.parquet")
    assert list(read(tmp_path / "a.parquet")) == [
        Document("fine", n_bytes=4),
        Document("a\ufffdb", n_bytes=5, n_replaced=1),
    ]


def test_a_parquet_file_without_the_column(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"id": [1, 2], "content": ["a", "b"]}), tmp_path / "a.parquet")
    reason = "the rest of the file is lost: it has no column 'text' but only id, content"
    assert damage(read(tmp_path / "a.parquet")) == [(0, reason)]
    assert list(read(tmp_path / "a.parquet", part=1, n_parts=2)) == []


def test_a_damaged_row_group_is_lost_from_the_same_row_wherever_reading_began(tmp_path: Path) -> None:
    documents = random_texts(200)
    path = tmp_path / "a.parquet"
    options = {"compression": "zstd", "write_page_checksum": True, "data_page_size": 2000, "use_dictionary": False}
    parquet.write_table(pyarrow.table({"text": documents}), path, row_group_size=90, **options)
    first = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    raw = bytearray(path.read_bytes())
    raw[first.data_page_offset + first.total_compressed_size - 5] ^= 255
    path.write_bytes(raw)
    (lost, reason) = damage(read(path))[0]
    assert 90 <= lost < 180
    assert lost % table_files.BATCH_ROWS == 90 % table_files.BATCH_ROWS
    assert "the rest of the file is lost" in reason
    for start in (0, 50, 90, lost - 1, lost):
        found = list(read(path, TEXT, Position(start)))
        assert texts(found) == documents[start:lost]
        assert damage(found) == [(lost, reason)]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ready_made_sequences(tmp_path: Path, suffix: str) -> None:
    """Amber's records: 2049 ids and where they come from."""
    sequences = [list(range(2049)), [0, 2**32 - 1]]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"source": ["arxiv", "c4"], "token_ids": sequences}), path)
    else:
        path.write_text("".join(json.dumps({"token_ids": ids, "source": "arxiv"}) + "\n" for ids in sequences))
    found = [item for item in read(path, IDS) if isinstance(item, Document)]
    assert [item.token_ids.tolist() for item in found if item.token_ids is not None] == sequences
    assert {item.token_ids.dtype for item in found if item.token_ids is not None} == {np.dtype(np.uint32)}
    assert [(item.bordered, item.n_bytes, item.text) for item in found] == [(False, 0, "")] * 2


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ('"1 2"', "field 'token_ids' is not a list of token ids but str"),
        ("null", "field 'token_ids' is not a list of token ids but NoneType"),
        ("[]", "field 'token_ids' is empty"),
        ("[1, 2.0]", "field 'token_ids' holds float where a token id should be"),
        ("[1, true]", "field 'token_ids' holds bool where a token id should be"),
        ("[[1], [2]]", "field 'token_ids' holds list where a token id should be"),
        ("[1, null]", "field 'token_ids' holds NoneType where a token id should be"),
        ("[1, -1]", "field 'token_ids' holds a number that is no token id: -1"),
        ("[4294967296]", "field 'token_ids' holds a number that is no token id: 4294967296"),
        ("[18446744073709551615]", "field 'token_ids' holds a number that is no token id: 18446744073709551615"),
    ],
)
def test_sequences_that_are_none(tmp_path: Path, value: str, reason: str) -> None:
    found = one(tmp_path / "a.jsonl", b'{"token_ids": %s}' % value.encode(), IDS)
    assert found == BadRecord(str(tmp_path / "a.jsonl"), 0, reason)
    found = one(tmp_path / "a.jsonl", b'{"ids": []}', IDS)
    assert found == BadRecord(str(tmp_path / "a.jsonl"), 0, "has no field 'token_ids'")


LAYOUTS: dict[str, dict[str, Any]] = {
    "arxiv": {"meta": {"timestamp": "2016-07-19T02:04:55", "yymm": "1607", "arxiv_id": "1607.00001", "language": "en"}},
    "book": {"meta": {"short_book_title": "A by B", "publication_date": 1882, "url": "http://example.org/1"}},
    "c4": {"meta": {"timestamp": "2019-04-25T12:57:54Z", "url": "https://example.org", "language": "en"}},
    **{
        f"common_crawl/{dump}": {
            "pred_label": "__label__wiki",
            "pred_label_prob": 0.8025295138359070,
            "wiki_prob": 0.8025295138359070,
            "source": f"cc/{dump}/en_head_0000.json.gz/line4",
        }
        for dump in ("2019-30", "2020-05", "2021-04", "2022-05", "2023-06")
    },
    "github": {"meta": {"content_hash": "e8", "line_count": 25, "size": "1353", "language": [{"name": "C"}]}},
    "stackexchange": {"meta": {"language": "en", "source": "stackexchange", "question_score": "16"}},
    "wikipedia": {
        "meta": {"title": "A", "url": "https://example.org/%D0%93", "language": "bg", "timestamp": "20230320"}
    },
    "RedPajama-Data-1T-Sample": {"meta": '{"title": "A", "language": "bg"}', "red_pajama_subset": "wikipedia"},
}


@pytest.mark.parametrize("subset", LAYOUTS)
@pytest.mark.parametrize("text_first", [True, False])
def test_the_layout_of_each_redpajama_subset(tmp_path: Path, subset: str, text_first: bool) -> None:
    body = {"text": '\n\n\n\nКалендар 漢字 "q" \u2028 x'}
    record = {**body, **LAYOUTS[subset]} if text_first else {**LAYOUTS[subset], **body}
    for ascii_only in (True, False):
        found = one(tmp_path / "a.jsonl", json.dumps(record, ensure_ascii=ascii_only).encode())
        assert found == Document(body["text"], n_bytes=len(body["text"].encode()))


def test_real_redpajama_records() -> None:
    if not REDPAJAMA.is_dir():
        pytest.skip(f"{REDPAJAMA} is absent: genuine RedPajama records are not read")
    for path in sorted(REDPAJAMA.glob("*/*.jsonl")):
        found = list(read(path))
        expected = [json.loads(raw)["text"] for raw in path.read_bytes().split(b"\n") if raw]
        assert texts(found) == expected
        assert not damage(found)


# Small files that stand for much


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_line_beyond_the_limit_is_a_bad_record_that_nobody_holds(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_files, "MAX_RECORD_BYTES", 4 << 20)
    path = bomb(tmp_path / f"a{suffix}", 100, b"x")
    tracemalloc.start()
    first, last = list(read(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert damage([first]) == [(0, "it has 104,857,600 bytes, and a record may have 4,194,304; divide it")]
    assert texts([last]) == ["last"]
    assert peak < 20 << 20
    (entry,) = entries(path, Position(1, (100 << 20) + 1))
    assert entry.at == Position(1, (100 << 20) + 1)
    assert [item.at.line for item in read_entries(str(path), TEXT, part=1, n_parts=2)] == [1]  # type: ignore[union-attr]


@pytest.mark.parametrize("suffix", SUFFIXES[1:])
def test_compressed_blank_lines_take_no_memory(tmp_path: Path, suffix: str) -> None:
    path = bomb(tmp_path / f"a{suffix}", 4, b"\n")
    tracemalloc.start()
    (last,) = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts([last]) == ["last"]
    assert peak < 8 << 20


def test_zstandard_frames_of_every_kind(tmp_path: Path) -> None:
    content = line("one") * 20_000 + random.Random(0).randbytes(300_000).replace(b"\n", b"") + b"\n"
    skipped = bytes.fromhex("5c2a4d18") + (7).to_bytes(4, "little") + b"skipped"
    frames = [
        zstandard.ZstdCompressor(write_checksum=check, write_content_size=size, level=level).compress(content)
        for check, size, level in [(True, True, 3), (False, True, 1), (True, False, 19), (False, False, -5)]
    ]
    small = zstandard.compress(line("two"))
    empty = zstandard.compress(b"")
    path = tmp_path / "a.jsonl.zst"
    whole = b"".join([skipped, *frames, empty, small, b"\0" * 70_001, small, skipped, b"\0\0\0"])
    path.write_bytes(whole)
    found = b"".join(raw + b"\n" for raw in line_files.read_lines(str(path)) if isinstance(raw, bytes))
    assert found == content * 4 + line("two") * 2
    for cut in (3, 9, len(skipped) + 5, len(skipped) + 9, len(whole) - 8):
        path.write_bytes(whole[:cut])
        assert "cut off" in str(list(read(path))[-1]), cut
    path.write_bytes(small + b"no frame")
    assert [type(item).__name__ for item in read(path)] == ["Document", "BadRecord"]


def test_cells_and_row_groups_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (line_files, table_files, records):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1 << 20)
    path = tmp_path / "a.parquet"
    long = random.Random(0).randbytes(600_000).hex()
    parquet.write_table(pyarrow.table({"text": ["one", long, "two"]}), path)
    items = list(read(path))
    assert texts(items) == ["one", "two"]
    assert damage(items) == [(1, "it has 1,200,000 bytes, and a record may have 1,048,576; divide it")]
    parquet.write_table(pyarrow.table({"text": ["x" * (30 << 20)]}), path, compression="zstd")
    ((place, reason),) = damage(read(path))
    assert place == 0
    assert "bytes of a row group stand for 31,4" in reason
    ids = pyarrow.array([[0] * (1 << 20)])
    parquet.write_table(pyarrow.table({"token_ids": ids}), path, compression="zstd")
    ((place, reason),) = damage(read(path, IDS))
    assert "stand for 4,194,304, which no text does" in reason


def test_rows_that_share_one_long_value_are_read_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    indices, values = pyarrow.array([0] * 64, pyarrow.int32()), pyarrow.array(["x" * (2 << 20)])
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, values)})
    parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
    before = pyarrow.default_memory_pool().max_memory()
    pool = pyarrow.default_memory_pool()
    assert sum(len(item.text) for item in read(path) if isinstance(item, Document)) == 64 * (2 << 20)
    assert max(pool.max_memory() - before, 0) < 32 * (2 << 20)
