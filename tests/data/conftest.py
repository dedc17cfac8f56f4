"""A tokenizer small enough for every data test, and a way to write shards."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
import zstandard
from tokenizers import decoders, models, pre_tokenizers

from fbitrain.data.config import DataConfig
from tests.data.corpora import corpus

UNENCODABLE = "z" * 30 + "!b"
WriteShard = Callable[[Path, Sequence[str]], Path]


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of one token per byte, <s> = 256 and </s> = 257."""
    folder = tmp_path_factory.mktemp("byte_tokenizer")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    return str(folder)


@pytest.fixture(scope="session")
def panicking_tokenizer(byte_tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same tokenizer with a regular expression that gives up on UNENCODABLE: a panic, which is no Exception."""
    folder = tmp_path_factory.mktemp("panicking_tokenizer")
    tokenizer = tokenizers.Tokenizer.from_file(f"{byte_tokenizer}/tokenizer.json")
    split = pre_tokenizers.Split(tokenizers.Regex("(?:z|z)+b|."), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, tokenizer.pre_tokenizer])
    tokenizer.save(str(folder / "tokenizer.json"))
    shutil.copy(f"{byte_tokenizer}/tokenizer_config.json", folder)
    return str(folder)


@pytest.fixture(scope="session")
def write_shard() -> WriteShard:
    """Writes documents as records to a .jsonl, .jsonl.gz or .jsonl.zst file."""

    def write(path: Path, documents: Sequence[str]) -> Path:
        lines = [
            json.dumps({"text": text, "meta": {"n": i}}, ensure_ascii=bool(i % 2)) for i, text in enumerate(documents)
        ]
        raw = "".join(f"{line}\n" for line in lines).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".gz":
            raw = gzip.compress(raw)
        elif path.suffix == ".zst":
            raw = zstandard.compress(raw)
        path.write_bytes(raw)
        return path

    return write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, write_shard: WriteShard) -> DataConfig:
    return corpus(tmp_path_factory.mktemp("corpus"), write_shard)
