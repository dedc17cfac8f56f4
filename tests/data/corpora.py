"""A corpus of two sources in three formats, and loaders of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.loader import TokenLoader
from fbitrain.data.tokenizer import load_tokenizer

SUFFIXES = [".jsonl", ".jsonl.gz", ".jsonl.zst"]


def corpus(root: Path, write_shard: Any, n_documents: int = 60) -> DataConfig:
    """Two sources in three formats; every document is unique and says where it comes from."""
    for name, factor in (("web", 3), ("code", 11)):
        for i, suffix in enumerate(SUFFIXES):
            texts = [f"{name} {i} {j} " + "é" * (j * factor % 29) for j in range(n_documents // 3 + i)]
            write_shard(root / name / f"{i}{suffix}", texts)
    sources = [SourceConfig("web", [str(root / "web")], 2.0), SourceConfig("code", [str(root / "code")], 1.0)]
    return DataConfig(sources=sources, seq_len=31, n_lanes=5, n_workers=0, seed=4)


def rank_loader(data: DataConfig, tokenizer: str, rank: int = 0, world_size: int = 1, **more: Any) -> TokenLoader:
    return TokenLoader(data, load_tokenizer(tokenizer), rank, world_size, **{"micro_batch_size": 2, **more})


def take(loader: TokenLoader, n: int) -> tuple[list[list[list[int]]], Any]:
    """`n` batches as lists, and the last state as a file would give it back."""
    batches = [next(loader).tolist() for _ in range(n)]
    return batches, json.loads(json.dumps(loader.state()))
