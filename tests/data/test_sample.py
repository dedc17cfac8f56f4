"""The sample corpus: real documents, none twice, none in training that is held out, made again the same."""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from fbitrain.base.errors import UserError
from fbitrain.commands.verbs import call
from fbitrain.data.commands import sample
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.tools.sample_sources import Document, _readable_code

MEGABYTES = 0.6
TEXT = RecordFormat("text", "text")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "corpus"
    assert call(["data", "sample", "--out", str(out), "--megabytes", str(MEGABYTES)]) == 0
    return out


def read(path: Path) -> list[str]:
    shards = sorted(path.rglob("*.jsonl.zst")) if path.is_dir() else [path]
    entries = [entry for shard in shards for entry in read_entries(str(shard), TEXT)]
    found = [entry if isinstance(entry, BadRecord) else decode(entry, TEXT, str(path)) for entry in entries]
    assert not any(isinstance(item, BadRecord) for item in found)
    return [item.text for item in found if not isinstance(item, BadRecord)]


def test_layout_sizes_and_manifest(made: Path) -> None:
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    shards = ["docs/docs_00", "docs/docs_01", *(f"github/github_{i:02d}" for i in range(4)), "heldout"]
    assert names == sorted([*(f"{name}.jsonl.zst" for name in shards), "manifest.json"])
    files = json.loads((made / "manifest.json").read_text())["files"]
    assert sum(file["text_bytes"] for file in files.values()) == pytest.approx(MEGABYTES * 1e6, rel=0.2)
    assert (
        sum(len(text.encode()) for text in read(made / "heldout.jsonl.zst")) == files["heldout.jsonl.zst"]["text_bytes"]
    )
    assert 0.05 < files["heldout.jsonl.zst"]["text_bytes"] / (MEGABYTES * 1e6) < 0.25
    assert list(made.parent.iterdir()) == [made]


def test_held_out_documents_are_in_no_shard_and_none_is_there_twice(made: Path) -> None:
    training = read(made / "github") + read(made / "docs")
    heldout = read(made / "heldout.jsonl.zst")
    assert len(heldout) >= 2
    assert not set(training) & set(heldout)
    assert len(set(training + heldout)) == len(training + heldout)


def test_records_are_redpajama_like_and_real(made: Path) -> None:
    import zstandard

    raw = zstandard.ZstdDecompressor().decompress((made / "github" / "github_00.jsonl.zst").read_bytes())
    record = json.loads(raw.splitlines()[0])
    assert set(record) == {"text", "meta"}
    assert {"source", "repo_name", "path", "license", "size"} <= set(record["meta"])
    assert record["meta"]["size"] == str(len(record["text"].encode()))
    assert record["meta"]["source"] == "github"
    original = Path(sysconfig.get_path("purelib")) / record["meta"]["path"]
    assert original.read_text(encoding="utf-8") == record["text"]  # so small a corpus is of pinned packages only


def test_made_again_the_same_and_by_another_seed_not(made: Path, tmp_path: Path) -> None:
    assert sample.write_sample(tmp_path / "same", MEGABYTES, 0)
    assert (tmp_path / "same" / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()
    assert sample.write_sample(tmp_path / "other", MEGABYTES, 1)
    assert set(read(tmp_path / "other" / "heldout.jsonl.zst")) != set(read(made / "heldout.jsonl.zst"))


def test_reused_only_while_valid(made: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "copy"
    shutil.copytree(made, out)
    arguments = ["--out", str(out), "--megabytes", str(MEGABYTES)]
    before = (out / "manifest.json").stat().st_mtime_ns
    assert call(["data", "sample", *arguments]) == 0
    assert "kept the valid sample corpus" in capsys.readouterr().out
    assert (out / "manifest.json").stat().st_mtime_ns == before
    shard = out / "docs" / "docs_01.jsonl.zst"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert call(["data", "sample", *arguments]) == 0
    assert "wrote" in capsys.readouterr().out
    assert shard.read_bytes() == (made / "docs" / "docs_01.jsonl.zst").read_bytes()
    shard.unlink()
    assert not sample.is_valid(out, json.loads((made / "manifest.json").read_text())["settings"])


@pytest.mark.parametrize("manifest", [None, "{}", "not json"])
def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path, manifest: str | None, capsys: Any) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    assert call(["data", "sample", "--out", str(tmp_path), "--megabytes", "0.1"]) == 1
    assert "is no sample corpus" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_what_lies_in_or_beside_a_sample_corpus_is_left_alone(made: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "corpus"
    shutil.copytree(made, out)
    notes = [out / "docs" / "notes.txt", tmp_path / "corpus.tmp" / "notes.txt"]
    for path in notes:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    arguments = ["--out", str(out), "--megabytes", "0.1"]
    assert call(["data", "sample", *arguments]) == 1
    assert f"{out} holds docs/notes.txt, which is no sample corpus" in capsys.readouterr().err
    notes[0].rename(tmp_path / "notes.txt")
    assert call(["data", "sample", *arguments]) == 0
    assert (tmp_path / "notes.txt").read_text() == notes[1].read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "corpus.tmp", "notes.txt"}


def test_two_do_not_write_one_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files = sample._write_files
    refused = []

    def write(folder: Path, settings: dict[str, Any]) -> None:
        monkeypatch.setattr(sample, "_write_files", write_files)
        with pytest.raises(UserError, match="is in use by another run of this command") as caught:
            sample.write_sample(tmp_path / "out", 0.1, 0)
        refused.append(caught)
        write_files(folder, settings)

    monkeypatch.setattr(sample, "_write_files", write)
    assert sample.write_sample(tmp_path / "out", 0.1, 0)
    assert refused
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_a_corpus_stays_one(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "disk" / "corpus")
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "corpus")
    assert sample.write_sample(tmp_path / "out", 0.1, 0)
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["corpus"]


def test_a_failed_write_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "fsync_tree", full)
    with pytest.raises(UserError, match="No space left on device"):
        sample.write_sample(tmp_path / "out", 0.1, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("megabytes", ["0", "-1", "1e-7", "nan", "inf"])
def test_too_little_or_too_much_to_collect(tmp_path: Path, capsys: Any, megabytes: str) -> None:
    assert call(["data", "sample", "--out", str(tmp_path / "out"), "--megabytes", megabytes]) == 1
    assert "must be a number, and at least 0.1" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        b"short",
        b"x = 1\n" + b"\xff" * 300,
        b"# This file was generated by a tool\n" + b"y = f(x)\n" * 40,
        b"t = '" + b"x" * 500 + b"'\n",
        b"t = [\n" + b"0, 12, 345, 6789,\n" * 40 + b"]\n",
        b"a = '\0'\n" * 40,
        b"y = f(x)\n" * 12_000,
    ],
)
def test_what_is_no_hand_written_code(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.py").write_bytes(content)
    assert _readable_code(tmp_path / "a.py") is None


def test_hand_written_code(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f(x):\n    return x + 1\n" * 20)
    assert _readable_code(tmp_path / "a.py") == "def f(x):\n    return x + 1\n" * 20


def test_heldout_is_about_as_long_as_asked() -> None:
    documents = [
        Document(str(i), {"size": str(size), "content_hash": str(i)}) for i, size in enumerate([900, 50_000] * 50)
    ]
    chosen = sample.choose_heldout(documents, 9_500, seed=0)
    assert sum(document.n_bytes for document in chosen) == 9_900  # the last one reaches the goal; none is long
    assert chosen != sample.choose_heldout(documents, 9_500, seed=1)
    assert sample.choose_heldout(documents, 0, seed=0) == []
