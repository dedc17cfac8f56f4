"""The command: the same files whatever the number of processes, complete after any kill, one sentence per fault."""

from __future__ import annotations

import fcntl
import functools
import gzip
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from fbitrain.commands.verbs import call
from fbitrain.data.pretokenized import token_jobs, token_writer
from fbitrain.data.pretokenized.token_shards import TokenIndex
from fbitrain.data.tools.progress import ProgressBar
from tests.data.conftest import UNENCODABLE

MODULE = "fbitrain.data.commands.pretokenize"
WORDS = ["the", "cat", "sat", "on", "mats", "\u00e9t\u00e9", "\u6f22\u5b57", "\n", "  "]


def write_corpus(root: Path, sizes: dict[str, list[int]]) -> None:
    """`sizes`: documents per shard, by source; every 7th line is bad."""
    rng = random.Random(0)
    for source, shards in sizes.items():
        (root / source).mkdir(parents=True, exist_ok=True)
        for i, n_documents in enumerate(shards):
            lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=20))}) for _ in range(n_documents)]
            lines[::7] = ["{"] * len(lines[::7])
            (root / source / f"{i}.jsonl").write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def corpus(tmp_path: Path, byte_tokenizer: str) -> Path:
    """A folder with config.yaml and two sources, one of them with a shard that two processes share."""
    write_corpus(tmp_path, {"few": [900, 30], "many": [40, 50, 60]})
    write_config(tmp_path, byte_tokenizer, ["few", "many"])
    return tmp_path


def write_config(root: Path, tokenizer: str, sources: Sequence[str], **fields: Any) -> None:
    named = [{"name": name, "paths": [str(root / name)], **fields} for name in sources]
    data = {"sources": named, "cache_dir": str(root / "cache"), "cache_gb": 1.0}
    values = {"model": {"anything": 1}, "distill": {"teacher": tokenizer}, "data": data}
    (root / "config.yaml").write_text(json.dumps(values))


def run(root: Path, *arguments: str, out: str = "out", workers: int = 1) -> int:
    return call(
        [
            "data",
            "pretokenize",
            str(root / "config.yaml"),
            "--out",
            str(root / out),
            "--workers",
            str(workers),
            *arguments,
        ]
    )


def refusal(root: Path, capsys: pytest.CaptureFixture[str], *arguments: str, **options: Any) -> str:
    """The one sentence with which the command ends."""
    capsys.readouterr()
    assert run(root, *arguments, **options) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith("fbitrain data pretokenize: ")
    return sentence


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(folder: Path) -> dict[str, int]:
    """The reports there are, and when they were written."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*.jsonl.json")}


def test_the_files_do_not_depend_on_the_number_of_processes(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for workers in (1, 3):
        assert run(corpus, out=f"out{workers}", workers=workers) == 0
    assert files(corpus / "out1") == files(corpus / "out3")
    captured = capsys.readouterr().out.splitlines()
    assert captured[0].split() == ["source", "shards", "documents", "text", "tokens", "bytes/token", "bad"]
    index = TokenIndex(corpus / "out3")
    for line, source in zip(captured[1:3], ("few", "many"), strict=True):
        n_documents, n_tokens, n_records = (
            sum(getattr(report, name) for report in index.sources[source])
            for name in ("n_documents", "n_tokens", "n_records")
        )
        cells = line.split()
        assert (cells[0], cells[2]) == (source, f"{n_documents:,}")
        assert cells[-3:] == [f"{n_tokens:,}", "1.00", f"{n_records - n_documents:,}"]
    assert [report.n_records for report in index.sources["few"]] == [900, 30]


def test_large_shards_are_divided_and_small_ones_are_not(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []
    tokenize = token_jobs.tokenize_part
    monkeypatch.setattr(f"{MODULE}.tokenize_part", lambda job: (begun.append(job), tokenize(job)))
    monkeypatch.setattr(f"{MODULE}.in_processes", lambda work, jobs, n_workers: map(work, jobs))
    assert run(corpus, workers=3) == 0
    parts = [job.n_parts for job in begun]
    assert parts[:3] == [3, 3, 3]
    assert {job.target.name for job in begun if job.n_parts == 1} == {"0.jsonl", "1.jsonl", "2.jsonl"}
    assert not list((corpus / "out").rglob("*.part*"))


COMMAND = "import sys; from fbitrain.commands.verbs import call; sys.exit(call(['data', 'pretokenize', *sys.argv[1:]]))"


def start(corpus: Path, before: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own, with two workers, after the statements `before`."""
    arguments = [str(corpus / "config.yaml"), "--out", str(corpus / "out"), "--workers", "2"]
    return subprocess.Popen([sys.executable, "-c", f"{before}{COMMAND}", *arguments], stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_goes_on(tmp_path: Path, byte_tokenizer: str) -> None:
    write_corpus(tmp_path, {"few": [6000], "many": [1500] * 4})
    write_config(tmp_path, byte_tokenizer, ["few", "many"])
    process = start(tmp_path)
    while not finished(tmp_path / "out"):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    before = finished(tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    assert run(tmp_path, workers=2) == 0
    after = finished(tmp_path / "out")
    # Parts are joined into their shard, and go; every other report is the one that was there.
    assert {path: time for path, time in before.items() if ".part" not in path}.items() <= after.items()
    assert run(tmp_path, out="clean") == 0
    assert files(tmp_path / "out") == files(tmp_path / "clean")


def test_finished_parts_of_a_shard_are_kept(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def stop_at_the_third(job: token_jobs.Job) -> None:
        begun.append(job.target)
        if len(begun) == 3:
            raise KeyboardInterrupt
        token_jobs.tokenize_part(job)

    monkeypatch.setattr(f"{MODULE}.in_processes", lambda work, jobs, n_workers: map(work, jobs))
    monkeypatch.setattr(f"{MODULE}.tokenize_part", stop_at_the_third)
    assert run(corpus, workers=3) == 130
    assert run(corpus, workers=3) == 0
    assert begun[3] == begun[2]
    assert len(set(begun)) == len(begun) - 1


def test_what_a_killed_run_left_is_removed(corpus: Path) -> None:
    assert run(corpus) == 0
    (corpus / "out" / "few" / ".0.jsonl.tokens.17.tmp").write_bytes(b"half")
    (corpus / "out" / "few" / "0.jsonl.part0of9.tokens").write_bytes(b"half")
    before = files(corpus / "out").keys()
    assert run(corpus) == 0
    assert len(before - files(corpus / "out").keys()) == 2


def test_damage_is_mended(corpus: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    assert run(corpus) == 0
    whole, when = files(corpus / "out"), finished(corpus / "out")
    path = corpus / "out" / "many" / "1.jsonl.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    assert run(corpus) == 0
    assert "1.jsonl.tokens has" in caplog.text
    assert files(corpus / "out") == whole
    assert [name for name, time in finished(corpus / "out").items() if time != when[name]] == [
        str(corpus / "out" / "many" / "1.jsonl.json")
    ]
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    assert run(corpus) == 0
    assert files(corpus / "out") != whole
    assert run(corpus, "--verify") == 0
    assert "the bytes of" in caplog.text
    assert files(corpus / "out") == whole


def test_an_index_that_cannot_be_read_is_made_anew(corpus: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(corpus) == 0
    whole, when = files(corpus / "out"), finished(corpus / "out")
    (corpus / "out" / "index.json").write_text("{")
    assert run(corpus) == 0
    assert caplog.text.count("index.json cannot be read; made anew") == 1
    assert (files(corpus / "out"), finished(corpus / "out")) == (whole, when)


def test_sources_may_come_later(corpus: Path, byte_tokenizer: str) -> None:
    write_config(corpus, byte_tokenizer, ["few"])
    assert run(corpus) == 0
    write_config(corpus, byte_tokenizer, ["many"])
    assert run(corpus) == 0
    index = TokenIndex(corpus / "out")
    assert [len(index.shards(source)) for source in ("few", "many")] == [2, 3]


def test_a_truncated_shard_is_told(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = corpus / "few" / "2.jsonl.gz"
    path.write_bytes(gzip.compress((corpus / "few" / "0.jsonl").read_bytes())[:-20])
    assert run(corpus) == 0
    assert f"{path}, line " in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 3])
def test_what_was_lost_of_a_shard_is_tried_again(corpus: Path, workers: int) -> None:
    path, content = corpus / "few" / "0.jsonl.gz", gzip.compress((corpus / "few" / "0.jsonl").read_bytes())
    (corpus / "few" / "0.jsonl").unlink()
    path.write_bytes(content[:-20])
    assert run(corpus, workers=workers) == 0
    before = finished(corpus / "out")
    path.write_bytes(content)
    assert run(corpus, workers=workers) == 0
    assert run(corpus, out="clean") == 0
    assert files(corpus / "out") == files(corpus / "clean")
    assert finished(corpus / "out") == before  # the other shards


def test_where_one_part_ended_early_the_others_are_not_kept(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole = corpus / "few" / "0.jsonl.gz", gzip.compress((corpus / "few" / "0.jsonl").read_bytes())
    (corpus / "few" / "0.jsonl").unlink()
    path.write_bytes(whole[:500] + bytes(len(whole) - 500))  # as a disk gives it back that has lost some blocks
    with monkeypatch.context() as patch:
        patch.setattr(f"{MODULE}.join_parts", stopped)
        patch.setattr(f"{MODULE}.in_processes", lambda work, jobs, n_workers: map(work, jobs))
        assert run(corpus, workers=3) == 130
    assert len(list((corpus / "out").rglob("0.jsonl.gz.part*.json"))) == 3
    path.write_bytes(whole)
    assert run(corpus, workers=3) == 0
    assert TokenIndex(corpus / "out").sources["few"][0].n_records == 900


def stopped(job: Any) -> None:
    raise KeyboardInterrupt


# Faults


def test_shards_that_changed_are_named(corpus: Path, capsys: pytest.CaptureFixture[str], byte_tokenizer: str) -> None:
    assert run(corpus) == 0
    path = corpus / "many" / "1.jsonl"
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    sentence = refusal(corpus, capsys)
    assert f"{path} has changed: it had {len(content)} bytes and has {len(content) + 1}," in sentence
    path.unlink()
    assert "1.jsonl of source 'many' was tokenized" in refusal(corpus, capsys)
    path.write_bytes(content)
    write_config(corpus, byte_tokenizer, ["few", "many"], text_key="content")
    assert "is read otherwise: as text from field 'text' before" in refusal(corpus, capsys)


def test_another_tokenizer_is_refused(corpus: Path, capsys: pytest.CaptureFixture[str], byte_tokenizer: str) -> None:
    assert run(corpus) == 0
    other = tokenizers.Tokenizer.from_file(f"{byte_tokenizer}/tokenizer.json")
    other.add_special_tokens(["<more>"])
    other.save(str(corpus / "other.json"))
    assert "was begun with another tokenizer" in refusal(corpus, capsys, f"data.tokenizer={corpus / 'other.json'}")
    assert "names no tokenizer" in refusal(corpus, capsys, "distill.teacher=")


def test_a_folder_of_something_else_is_left_alone(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (corpus / "out").mkdir()
    (corpus / "out" / "thesis.txt").write_text("mine")
    assert "holds something else" in refusal(corpus, capsys)
    assert files(corpus / "out") == {"thesis.txt": b"mine"}
    assert "cannot be written" in refusal(corpus, capsys, out="config.yaml")


def test_two_runs_do_not_share_a_folder(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(corpus) == 0
    handle = os.open(corpus / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert "is in use by another run" in refusal(corpus, capsys)
    os.close(handle)
    assert run(corpus) == 0


def test_ids_beyond_the_vocabulary_are_bad_records(
    corpus: Path, capsys: pytest.CaptureFixture[str], byte_tokenizer: str
) -> None:
    write_config(corpus, byte_tokenizer, ["few"])
    (corpus / "few" / "0.jsonl").write_text('{"text": [1, 257]}\n{"text": [258]}\n')
    ready_made = [f"data.sources.0.{key}" for key in ("kind=token_ids", "ids_key=text")]
    (corpus / "few" / "1.jsonl").unlink()
    assert run(corpus, *ready_made) == 0
    (report,) = TokenIndex(corpus / "out").sources["few"]
    assert (report.n_documents, report.n_tokens, report.n_records) == (1, 2, 2)
    sentence = refusal(corpus, capsys, *ready_made, "data.max_bad_records=0", out="none")
    assert "0.jsonl, line 2: token id 258 is not in the vocabulary; repair" in sentence


def test_a_text_on_which_the_tokenizer_gives_up_is_a_bad_record(
    corpus: Path, panicking_tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(corpus, panicking_tokenizer, ["few"])
    texts = "".join(json.dumps({"text": text}) + "\n" for text in ("one", UNENCODABLE, "two"))
    (corpus / "few" / "0.jsonl").write_text(texts)
    (corpus / "few" / "1.jsonl").unlink()
    assert run(corpus) == 0
    (report,) = TokenIndex(corpus / "out").sources["few"]
    assert (report.n_documents, report.n_tokens, report.n_records) == (2, 6, 3)
    sentence = refusal(corpus, capsys, "data.max_bad_records=0", out="none")
    assert f"0.jsonl, line 2: the tokenizer {panicking_tokenizer} gives up on a text of 32 characters" in sentence
    capsys.readouterr()
    assert call(["data", "inspect", str(corpus / "config.yaml")]) == 0


def test_a_corpus_of_bad_records_ends_early(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sentence = refusal(corpus, capsys, "data.sources.0.text_key=content", "data.max_bad_records=20")
    assert "more than data.max_bad_records=20 bad records in one shard, the last one in " in sentence
    assert "0.jsonl, line 21: has no field 'content'; repair" in sentence


def test_a_shard_that_grows_while_it_is_read_is_refused(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenize(job: token_jobs.Job) -> None:
        Path(job.shard.path).write_bytes(Path(job.shard.path).read_bytes() + b"\n")
        token_jobs.tokenize_part(job)

    monkeypatch.setattr(f"{MODULE}.tokenize_part", tokenize)
    assert "0.jsonl has changed while it was tokenized: it had " in refusal(corpus, capsys)
    assert not finished(corpus / "out")


def test_a_shard_that_goes_while_it_is_read_is_named(
    corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_few = token_jobs._require_few

    def remove(bad: Any, last: Any, limit: int) -> None:
        Path(last.path).unlink(missing_ok=True)
        require_few(bad, last, limit)

    monkeypatch.setattr(token_jobs, "_require_few", remove)
    path = corpus / "few" / "0.jsonl"
    assert f"{path} cannot be read (No such file or directory); restore it or mend its disk" in refusal(corpus, capsys)


def test_large_documents_are_written_earlier(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(corpus, out="clean") == 0
    monkeypatch.setattr(token_writer, "BATCH_TOKENS", 50)
    assert run(corpus) == 0
    assert files(corpus / "out") == files(corpus / "clean")


def test_a_full_disk_is_one_sentence_and_no_half_file(corpus: Path) -> None:
    # A limit on the size of a file fails a write just as a full disk does.
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)); "
    process = start(corpus, limit)
    error = process.communicate()[1]
    assert process.returncode == 1
    assert "cannot be written to (File too large); mend that and run the command again" in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not finished(corpus / "out").keys() & {str(corpus / "out" / "few" / "0.jsonl.json")}
    assert not (corpus / "out" / "index.json").exists()
    assert run(corpus, workers=2) == 0
    assert run(corpus, out="clean") == 0
    assert files(corpus / "out") == files(corpus / "clean")


# Remote shards, and the bar


@pytest.fixture
def server(corpus: Path) -> Iterator[str]:
    """The address of a web server over the corpus."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(corpus))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_remote_shards_give_the_same_tokens(corpus: Path, server: str, byte_tokenizer: str) -> None:
    assert run(corpus) == 0
    paths = [f"{server}/many/{{0..2}}.jsonl"]
    assert run(corpus, f"data.sources=[{{name: many, paths: {json.dumps(paths)}}}]", out="remote") == 0
    local, remote = (TokenIndex(corpus / out).sources["many"] for out in ("out", "remote"))
    assert [report.tokens for report in local] == [report.tokens for report in remote]
    assert [report.size for report in remote] == [-1, -1, -1]


def test_the_bar_learns_how_much_the_shards_are_compressed(tmp_path: Path) -> None:
    with ProgressBar(tmp_path / "bar", [100.0, 300.0], done=50.0, ratio=2.0, description="test") as bar:
        assert bar.position() == 50
        bar.slot(0).add(60)
        assert bar.position() == 80
        bar.slot(0).add(940)
        assert bar.position() == 145  # not more than most of its size before it is finished
        bar.slot(0).finish()
        bar.slot(1).add(1500)
        assert bar.position() == 50 + 100 + 150  # ten bytes of records per byte of shard
        bar.slot(1).finish()
        assert bar.position() == 450
    assert not (tmp_path / "bar").exists()


def test_a_bar_does_not_see_what_the_one_before_it_counted(tmp_path: Path) -> None:
    for _ in range(2):
        with ProgressBar(tmp_path / "bar", [100.0], done=0.0, description="test") as bar:
            assert bar.position() == 0
            bar.slot(0).finish()
            assert bar.position() == 100
