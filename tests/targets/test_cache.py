"""A cache gives every token of the stream the target that was written for it, and damage is said in one sentence."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.streaming.stream import border_tokens
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.targets import pieces as work
from fbitrain.targets.cache_folder import FRAMES, PLACES, SETTINGS, CacheSettings
from fbitrain.targets.cache_reader import TargetCache
from fbitrain.targets.cache_writer import PieceWriter
from fbitrain.targets.teacher_identity import require_same_teacher, teacher_fingerprint
from tests.data.corpora import rank_loader
from tests.targets.conftest import PreviousTokenTeacher, V, answer
from tests.targets.test_draws import settings as made

CPU = torch.device("cpu")
SOURCES = ["web", "code"]
SETTINGS_USED = made(kind="top", n=1, vocab_size=V)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces per shard and frames per document."""
    monkeypatch.setattr(work, "PIECE_TOKENS", 200)
    for module in ("cache_writer", "cache_reader"):
        monkeypatch.setattr(f"fbitrain.targets.{module}.FRAME_TOKENS", 5)


def write(
    folder: Path,
    data: DataConfig,
    tokenizer: str,
    *,
    settings: CacheSettings = SETTINGS_USED,
    teacher: PreviousTokenTeacher | None = None,
    sources: list[str] = SOURCES,
) -> list[work.Piece]:
    """What the command does, on one rank; returns the pieces that were not finished."""
    index = TokenIndex(data.pretokenized)
    every = list(work.cut(index, sources))
    work.claim(folder, settings)
    work.remove_leftovers(folder, every)
    todo = work.unfinished(folder, every)
    border = border_tokens(load_tokenizer(tokenizer), data.add_bos, data.add_eos)
    writer = PieceWriter(folder, index, settings, border, teacher or PreviousTokenTeacher(), 64)
    for piece in todo:
        for _ in writer.write(piece):
            pass
    for name in {(piece.source, piece.report.name) for piece in every}:
        of_shard = [piece for piece in every if (piece.source, piece.report.name) == name]
        if not work.is_joined(folder, of_shard[0]):
            work.join(folder, of_shard)
    return todo


def opened(folder: Path, data: DataConfig) -> TargetCache:
    cache = TargetCache(folder)
    assert cache.cover(TokenIndex(data.pretokenized), SOURCES) == []
    return cache


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, tokenized: DataConfig, byte_tokenizer: str) -> Path:
    patch = pytest.MonkeyPatch()
    patch.setattr(work, "PIECE_TOKENS", 200)
    for module in ("cache_writer", "cache_reader"):
        patch.setattr(f"fbitrain.targets.{module}.FRAME_TOKENS", 5)
    folder = tmp_path_factory.mktemp("cache")
    write(folder, tokenized, byte_tokenizer)
    patch.undo()
    return folder


def wanted(batch: torch.Tensor, bos: int) -> list[int | None]:
    """The word of each target, None where the label itself is the target."""
    return [None if int(label) == bos else answer(int(token)) for row in batch for token, label in pairwise(row)]


def found(cache: TargetCache, loader: Any) -> list[int | None]:
    targets = cache.read(loader.spans()).to(CPU)
    ends = targets.ends_M.tolist()
    words: list[int | None] = []
    for start, end, label_weight in zip([0, *ends[:-1]], ends, targets.label_weights_M.tolist(), strict=True):
        assert end - start == 1 - label_weight
        words.append(None if label_weight else int(targets.ids_E[start]))
    assert targets.weights_E.tolist() == [1.0] * len(targets.ids_E)
    return words


@pytest.mark.parametrize("seq_len", [1, 7, 31, 300])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_token_of_any_stream_has_its_target(
    seq_len: int, world_size: int, tokenized: DataConfig, cache_folder: Path, byte_tokenizer: str
) -> None:
    cache, bos = opened(cache_folder, tokenized), load_tokenizer(byte_tokenizer).bos_id
    assert bos is not None
    labels = 0
    for rank in range(world_size):
        data = replace(tokenized, seq_len=seq_len, shuffle_block=7)
        with rank_loader(data, byte_tokenizer, rank, world_size, log_spans=True) as loader:
            for _ in range(60):
                batch = next(loader)
                assert found(cache, loader) == wanted(batch, bos)
                labels += int((batch[:, 1:] == bos).sum())
    assert labels, "no document began in these batches"


def test_a_resumed_stream_has_the_same_targets(tokenized: DataConfig, cache_folder: Path, byte_tokenizer: str) -> None:
    """Each batch in turn is the last before the stop, so that the stream stops within documents too."""
    cache = opened(cache_folder, tokenized)
    with rank_loader(tokenized, byte_tokenizer, log_spans=True) as loader:
        for _ in range(30):
            next(loader)
            with rank_loader(tokenized, byte_tokenizer, log_spans=True, states=[loader.state()]) as resumed:
                batch = next(resumed)
                assert found(cache, resumed) == wanted(batch, 256)


def test_the_cache_is_the_same_however_often_its_writer_is_killed(
    tokenized: DataConfig, byte_tokenizer: str, cache_folder: Path, tmp_path: Path
) -> None:
    kills, folder = 0, tmp_path / "cache"
    while True:
        try:
            write(folder, tokenized, byte_tokenizer, teacher=PreviousTokenTeacher(most=9))
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills > 3
    names = sorted(str(path.relative_to(cache_folder)) for path in cache_folder.rglob("*") if path.is_file())
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == names
    for name in names:
        assert (folder / name).read_bytes() == (cache_folder / name).read_bytes(), name
    assert write(folder, tokenized, byte_tokenizer) == []


def test_a_part_of_the_corpus_is_covered(tokenized: DataConfig, byte_tokenizer: str, tmp_path: Path) -> None:
    write(tmp_path / "cache", tokenized, byte_tokenizer, sources=["web"])
    cache = TargetCache(tmp_path / "cache")
    missing = cache.cover(TokenIndex(tokenized.pretokenized), SOURCES)
    assert missing == ["code/0.jsonl", "code/1.jsonl.gz", "code/2.jsonl.zst"]
    with rank_loader(replace(tokenized, seq_len=9), byte_tokenizer, log_spans=True) as loader:
        covered = set()
        for _ in range(40):
            next(loader)
            for spans in loader.spans():
                assert cache.covers(spans) == all(span.source == "web" for span in spans)
                covered.add(cache.covers(spans))
        assert len(cache.read([])) == 0
    assert covered == {True, False}


def test_draws_are_the_same_for_any_batch_of_the_teacher(
    tokenized: DataConfig, byte_tokenizer: str, tmp_path: Path
) -> None:
    settings = made(n=20, vocab_size=V)
    for name in ("a", "b"):
        write(tmp_path / name, tokenized, byte_tokenizer, settings=settings)
    a, b = (opened(tmp_path / name, tokenized) for name in ("a", "b"))
    with rank_loader(tokenized, byte_tokenizer, log_spans=True) as loader:
        next(loader)
        first, second = (cache.read(loader.spans()).to(CPU) for cache in (a, b))
    assert torch.equal(first.ids_E, second.ids_E)
    assert torch.equal(first.weights_E, second.weights_E)
    sums = torch.zeros(len(first)).index_add_(0, first.places(), first.weights_E) + first.label_weights_M
    torch.testing.assert_close(sums, torch.ones(len(first)))


@pytest.mark.parametrize(("rest", "label"), [("renormalize", 0.0), ("label", None)])
def test_what_the_likeliest_words_leave_goes_where_it_is_asked_to(
    rest: str, label: float | None, tokenized: DataConfig, byte_tokenizer: str, tmp_path: Path
) -> None:
    write(tmp_path / "cache", tokenized, byte_tokenizer, settings=made(kind="top", n=2, vocab_size=V))
    cache = TargetCache(tmp_path / "cache", rest)
    cache.cover(TokenIndex(tokenized.pretokenized), SOURCES)
    with rank_loader(tokenized, byte_tokenizer, log_spans=True) as loader:
        next(loader)
        targets = cache.read(loader.spans()).to(CPU)
    sums = torch.zeros(len(targets)).index_add_(0, targets.places(), targets.weights_E)
    torch.testing.assert_close(sums + targets.label_weights_M, torch.ones(len(targets)))
    inside = targets.label_weights_M[targets.label_weights_M < 1]
    assert (inside == 0).all() if label == 0 else ((inside > 0.01) & (inside < 0.1)).all()


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(cache_folder: Path, tmp_path: Path) -> Path:
    for path in cache_folder.rglob("*"):
        if path.is_file():
            target = tmp_path / "cache" / path.relative_to(cache_folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return tmp_path / "cache"


def read_all(folder: Path, data: DataConfig, tokenizer: str) -> None:
    cache = opened(folder, data)
    with rank_loader(data, tokenizer, log_spans=True) as loader:
        for _ in range(60):
            next(loader)
            cache.read(loader.spans())


@pytest.mark.parametrize("ending", [FRAMES, PLACES])
def test_a_truncated_file_is_refused_before_anything_is_read(
    ending: str, copy: Path, tokenized: DataConfig, byte_tokenizer: str
) -> None:
    file = copy / "web" / f"0.jsonl{ending}"
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(UserError, match=r"0\.jsonl\.\w+ has \d+ bytes where \d+ were written; restore it"):
        read_all(copy, tokenized, byte_tokenizer)


def test_flipped_bits_are_found_when_they_are_read(copy: Path, tokenized: DataConfig, byte_tokenizer: str) -> None:
    file = copy / "web" / f"0.jsonl{FRAMES}"
    content = bytearray(file.read_bytes())
    for at in range(20, len(content), 40):
        content[at] ^= 16
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"0\.jsonl\.frames is damaged at the document of line \d+: .*; remove"):
        read_all(copy, tokenized, byte_tokenizer)


def test_a_shard_without_its_report_is_not_covered(copy: Path, tokenized: DataConfig) -> None:
    (copy / "web" / "0.jsonl.json").unlink()
    (copy / "code" / "1.jsonl.gz.json").write_text("{")
    missing = TargetCache(copy).cover(TokenIndex(tokenized.pretokenized), SOURCES)
    assert missing == ["web/0.jsonl", "code/1.jsonl.gz"]


def test_a_cache_of_other_tokens_is_refused(copy: Path, tokenized: DataConfig) -> None:
    report = copy / "web" / "0.jsonl.json"
    index = TokenIndex(tokenized.pretokenized)
    sha256 = index.sources["web"][0].tokens.sha256
    report.write_text(report.read_text().replace(sha256, "0" * 64))
    with pytest.raises(UserError, match="was written for other tokens than those in"):
        TargetCache(copy).cover(index, SOURCES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no cache"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"version": 1}', "is of version 1, not 2; write the cache anew$"),
    ],
)
def test_a_folder_that_is_no_cache(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / SETTINGS).write_text(content)
    with pytest.raises(UserError, match=message):
        TargetCache(tmp_path)


def test_a_cache_is_not_continued_with_other_settings(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"begun otherwise \(n 1 there, 9 here\)"):
        work.claim(copy, replace(SETTINGS_USED, n=9))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(UserError, match="holds something else"):
        work.claim(tmp_path / "other", SETTINGS_USED)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(self: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fbitrain.data.pretokenized.token_writer.HashedFile.write", write)


def test_a_full_disk_leaves_nothing_half_written(
    full_disk: None, tokenized: DataConfig, byte_tokenizer: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"cannot be written to \(No space left on device\); mend that"):
        write(tmp_path / "cache", tokenized, byte_tokenizer)
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [SETTINGS]


def test_another_teacher_is_refused_by_both_names(tmp_path: Path) -> None:
    for name, weights in (("one", b"1" * 100_000), ("other", b"1" * 99_999 + b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(weights)
    one = str(tmp_path / "one")
    settings = made(teacher=one, teacher_fingerprint=teacher_fingerprint(tmp_path / "one"))
    for same in (one, ""):
        require_same_teacher(settings, same)
    (tmp_path / "one").rename(tmp_path / "moved")
    require_same_teacher(settings, str(tmp_path / "moved"))
    require_same_teacher(settings, one)  # known by its name, where it is not
    for other in ("other", "nowhere"):
        with pytest.raises(UserError, match=f"targets of {one}, which is another model than distill.teacher=.*{other}"):
            require_same_teacher(settings, str(tmp_path / other))
