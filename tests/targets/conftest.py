"""A pretokenized corpus, and a teacher whose likeliest word tells what it was asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fbitrain.data.commands.pretokenize import pretokenize
from fbitrain.data.config import DataConfig
from tests.data.conftest import byte_tokenizer, write_shard  # noqa: F401 - fixtures
from tests.data.corpora import corpus

V = 258  # of byte_tokenizer


def answer(token: int) -> int:
    """What PreviousTokenTeacher finds likeliest behind `token`."""
    return (7 * token + 3) % V


class PreviousTokenTeacher:
    """A teacher with the identity for a head. `calls` counts its forwards; one more than `most` kills the run."""

    def __init__(self, most: int = 10**9) -> None:
        self.head_weight = torch.eye(V)
        self.calls, self._most = 0, most

    def hidden(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > self._most:
            raise KeyboardInterrupt
        return 9 * torch.nn.functional.one_hot((7 * input_ids + 3) % V, V).float()


@pytest.fixture(scope="session")
def tokenized(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: str, write_shard: object) -> DataConfig:  # noqa: F811
    root: Path = tmp_path_factory.mktemp("corpus")
    data = corpus(root, write_shard)
    pretokenize(data, byte_tokenizer, root / "tokens", 1)
    return replace(data, pretokenized=str(root / "tokens"))
