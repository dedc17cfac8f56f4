"""A batch that grows, as the configuration has it: read, checked, written, counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbitrain.config import BatchChange, ConfigError, differences, load_config, to_yaml
from fbitrain.planning.estimate import tokens_in_total

CONFIG = """
distill: {teacher: some/teacher}
optim: {warmup_steps: 0}
train:
  total_steps: 100
  micro_batch_size: 2
  global_batch_tokens: 512
  batch_changes:
    - {from_step: 11, global_batch_tokens: 1024}
    - {from_step: 51, global_batch_tokens: 3072}
data:
  seq_len: 128
  sources: [{name: a, paths: [a.jsonl]}]
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "growing.yaml"
    file.write_text(CONFIG)
    return file


def problems_of(path: Path, *overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return caught.value.problems


def test_a_growing_batch_is_read_and_written(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    assert config.train.batch_changes == [BatchChange(11, 1024), BatchChange(51, 3072)]
    saved = tmp_path / "saved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved) == config
    assert set(differences(config, load_config(path, ["train.batch_changes=[]"]))) == {"train.batch_changes"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_follow_the_step(path: Path, world_size: int) -> None:
    config = load_config(path, world_size=world_size)
    for step, tokens in ((1, 512), (10, 512), (11, 1024), (50, 1024), (51, 3072), (100, 3072)):
        assert config.grad_accum_steps(world_size, step) * world_size * 2 * 128 == tokens
    assert config.grad_accum_steps(world_size) == config.grad_accum_steps(world_size, 1)
    assert tokens_in_total(config) == 10 * 512 + 40 * 1024 + 50 * 3072


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.batch_changes.0.from_step=1", ["batch_changes[0].from_step=1 must be more than 1"]),
        ("train.batch_changes.1.from_step=11", ["batch_changes[1].from_step=11 must be more than 11"]),
        ("train.batch_changes.1.from_step=5", ["batch_changes[1].from_step=5 must be more than 11"]),
        ("train.batch_changes.1.from_step=101", ["from_step=101 comes after the last step, train.total_steps=100"]),
        ("train.batch_changes.0.global_batch_tokens=0", ["batch_changes[0].global_batch_tokens=0 must be at least 1"]),
        ("train.batch_changes.0.global_batch_tokens=-512", ["[0].global_batch_tokens=-512 must be at least 1"]),
        ("train.batch_changes.1.global_batch_tokens=700", ["[1].global_batch_tokens=700 is not a multiple", "=128"]),
        ("train.batch_changes.0.from_stepp=3", ["from_stepp"]),
    ],
)
def test_what_makes_no_sense_is_one_sentence(path: Path, override: str, words: list[str]) -> None:
    (problem,) = problems_of(path, override)
    for word in words:
        assert word in problem


def test_all_problems_come_together(path: Path) -> None:
    wrong = ("train.batch_changes.0.global_batch_tokens=700", "train.batch_changes.1.from_step=2")
    assert len(problems_of(path, *wrong, "train.global_batch_tokens=100")) == 3


def test_any_number_of_ranks_shares_a_batch(path: Path) -> None:
    for world_size in range(1, 9):
        config = load_config(path, world_size=world_size)
        micro_batches = config.grad_accum_steps(world_size)
        assert (micro_batches - 1) * world_size < 512 / 2 / 128 <= micro_batches * world_size
