"""Training a tokenizer: LLaMA-2's settings, a fair sample, the same file again, one sentence for what cannot be."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import sentencepiece_model_pb2

from fbitrain.commands.verbs import call
from fbitrain.data.commands.train_tokenizer import Sampling, sample_texts
from fbitrain.data.sources.cache import ShardCache
from fbitrain.data.sources.shards import find_files
from fbitrain.data.tokenizer import load_tokenizer

LLAMA = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer" / "llama.model"
SYLLABLES = ["ka", "to", "mi", "sen", "lo", "ver", "an", "tur", "pi", "el", "os", "ren", "da", "gu", "ill"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, write_shard: Any) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 4))) for _ in range(500)]
    for name, n_documents in (("a.jsonl", 20), ("b.jsonl.zst", 200), ("c.jsonl.gz", 400)):
        documents = [
            f"{name} {i}\n\n  " + " ".join(rng.choices(words, k=80)) + "\0é 1234\n" for i in range(n_documents)
        ]
        write_shard(folder / name, documents)
    return folder


def trained(corpus: Path, out: Path, *options: str) -> bytes:
    assert call(["data", "train-tokenizer", "--vocab-size", "700", "--out", str(out), *options, str(corpus)]) == 0
    return out.read_bytes()


def test_a_tokenizer_like_llamas(tmp_path: Path, corpus: Path) -> None:
    trained(corpus, tmp_path / "new" / "t.model")
    tokenizer = load_tokenizer(tmp_path / "new" / "t.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (700, 1, 2)
    for text in ("kato misen  lover\n\t1234 é", "漢字 👍🏽 \0 unseen", "<s>", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert not {0, 1, 2} & set(tokenizer.encode(text))
    digits = tokenizer.encode("1234")
    assert len(digits) == len(tokenizer.encode("1")) + 3
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.model"]
    assert tokenizer._seams is not None


def test_the_settings_are_those_of_llamas_own_model(tmp_path: Path, corpus: Path) -> None:
    if not LLAMA.is_file():
        pytest.skip(f"{LLAMA} is absent: the settings are not compared with LLaMA's own")
    ours = sentencepiece_model_pb2.ModelProto.FromString(trained(corpus, tmp_path / "t.model"))
    theirs = sentencepiece_model_pb2.ModelProto.FromString(LLAMA.read_bytes())
    of_the_run = {"input", "model_prefix", "vocab_size", "num_threads", "input_sentence_size", "input_format"}
    for spec in ("normalizer_spec", "trainer_spec"):
        a, b = getattr(ours, spec), getattr(theirs, spec)
        names = {field.name for field in a.DESCRIPTOR.fields} - of_the_run
        assert {name: getattr(a, name) for name in names} == {name: getattr(b, name) for name in names}
    assert [ours.pieces[i] for i in range(259)] == [theirs.pieces[i] for i in range(259)]


def test_the_same_file_again(tmp_path: Path, corpus: Path) -> None:
    first = trained(corpus, tmp_path / "t.model", "--max-mb", "1")
    assert trained(corpus, tmp_path / "t.model", "--max-mb", "1") == first


def test_the_sample_is_even(tmp_path: Path, corpus: Path) -> None:
    shards = find_files([str(corpus)], "test", (".jsonl", ".gz", ".zst"))
    cache = ShardCache(str(tmp_path), 1)
    documents = {shard.name: list(sample_texts([shard], Sampling("text", 10**9, 0), cache)) for shard in shards}
    assert {name: len(texts) for name, texts in documents.items()} == {
        "a.jsonl": 20,
        "b.jsonl.zst": 200,
        "c.jsonl.gz": 400,
    }
    limit = 60_000
    found = list(sample_texts(shards, Sampling("text", limit, 0), cache))
    assert 0.5 * limit < sum(len(text.encode()) for text in found) <= limit
    places = {name: [texts.index(text) for text in found if text in texts] for name, texts in documents.items()}
    for name, taken in places.items():
        assert taken == sorted(set(taken))
        assert sum(len(documents[name][i].encode()) for i in taken) > 0.15 * limit
        assert taken[-1] > 0.6 * len(documents[name])  # not the beginning alone
    assert list(sample_texts(shards, Sampling("text", limit, 0), cache)) == found
    assert list(sample_texts(shards, Sampling("text", limit, 1), cache)) != found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vocab-size", "30000"], r"too small for --vocab-size 30000: it gives at most \d+ tokens"),
        (["--vocab-size", "260"], "--vocab-size 260 has no room for the characters"),
        (["--text-key", "body"], "hold no text under 'body'"),
        (["--out", "t.json"], r"--out t.json must end in \.model"),
        (["--out", "/proc/t.model"], r"/proc/t\.model cannot be written"),
        (["gone"], "the training text: .*gone"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    out = tmp_path / "t.model"
    assert call(["data", "train-tokenizer", str(corpus), "--vocab-size", "700", "--out", str(out), *options]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (last,) = [line for line in error.splitlines() if line.startswith("fbitrain data train-tokenizer: ")]
    assert re.search(message, last)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n_shards", [1, 2])
def test_documents_too_large_for_the_sample_are_said(
    tmp_path: Path, write_shard: Any, capfd: pytest.CaptureFixture[str], n_shards: int
) -> None:
    for i in range(n_shards):
        write_shard(tmp_path / "c" / f"{i}.jsonl", ["kato misen " * 115_000] * 4)
    assert (
        call(["data", "train-tokenizer", "--max-mb", "1", "--out", str(tmp_path / "t.model"), str(tmp_path / "c")]) == 1
    )
    error = capfd.readouterr().err
    assert "fits into its shard's share of 1.0 MB: the smallest has 1.3 MB; give a larger --max-mb" in error


def test_damaged_records_are_passed_over(tmp_path: Path, corpus: Path) -> None:
    lines = [json.dumps({"text": f"kato misen {i}"}) for i in range(400)]
    lines[3:3] = ["{", '{"text": 3}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert (
        call(
            [
                "data",
                "train-tokenizer",
                "--vocab-size",
                "280",
                "--out",
                str(tmp_path / "t.model"),
                str(tmp_path / "a.jsonl"),
            ]
        )
        == 0
    )


def test_as_a_command(tmp_path: Path, corpus: Path) -> None:
    command = [sys.executable, "-m", "fbitrain", "data", "train-tokenizer", "--vocab-size", "600", "--out", "t.model"]
    done = subprocess.run([*command, str(corpus)], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "t.model: 600 tokens, bos 1, eos 2\n"
