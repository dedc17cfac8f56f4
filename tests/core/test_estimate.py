"""The arithmetic of memory against what torch and the real model hold."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fbitrain.config import Config, DistillConfig, EngineConfig, TrainConfig
from fbitrain.data.config import DataConfig
from fbitrain.engine import deepspeed_config
from fbitrain.model.build import build_student
from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.planning.estimate import (
    WRITER_BYTES,
    RankMemory,
    TeacherSize,
    activation_bytes,
    rank_memory,
    read_teacher_size,
    tokens_in_total,
)

CONFIG = Config(
    model=ModelConfig(vocab_size=1000, d_model=64),
    distill=DistillConfig(teacher="t", chunk_tokens=100),
    data=DataConfig(seq_len=32),
    train=TrainConfig(total_steps=7, micro_batch_size=4, global_batch_tokens=1024),
    engine=EngineConfig(zero_stage=1),
)
P = 1_000_000
TEACHER = TeacherSize(n_parameters=3000, d_model=50)


def with_engine(**changes: object) -> Config:
    return dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, **changes))


def memory(
    config: Config, world_size: int = 4, precision: str = "bf16", teacher: TeacherSize | None = TEACHER
) -> RankMemory:
    return rank_memory(config, P, world_size=world_size, precision=precision, teacher=teacher)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    # bf16 copy; bf16 gradients; per owned weight 4 (fp32) + 8 (moments) + 4 (fp32 gradient) bytes
    [(1, 2 * P, 2 * P, 16 * P // 4), (2, 2 * P, 2 * P // 4, 16 * P // 4), (3, 2 * P // 4, 2 * P // 4, 16 * P // 4)],
)
def test_each_zero_stage_partitions_one_thing_more(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    found = memory(with_engine(zero_stage=stage))
    assert (found.weights, found.gradients, found.optimizer) == (weights, gradients, optimizer)


def test_stage_0_keeps_everything_and_no_second_copy() -> None:
    found = memory(with_engine(zero_stage=0), precision="fp32")
    assert (found.weights, found.gradients, found.optimizer, found.buckets) == (4 * P, 4 * P, 8 * P, 0)


def test_offloading_moves_the_optimizer_off_the_device_and_nothing_else() -> None:
    plain, offloaded = memory(CONFIG), memory(with_engine(offload_optimizer=True))
    assert offloaded.total == plain.total == plain.on_device
    assert plain.on_device - offloaded.on_device == plain.optimizer


def test_the_teacher_is_replicated_or_shared() -> None:
    tokens = 4 * 32
    assert memory(CONFIG).teacher == 2 * 3000 + 2 * tokens * 50
    sharded = dataclasses.replace(CONFIG, distill=dataclasses.replace(CONFIG.distill, host="zero3"))
    assert memory(sharded).teacher == 2 * 3000 // 4 + 2 * tokens * 50
    labels_only = dataclasses.replace(CONFIG, distill=DistillConfig(kd_weight=0.0, ce_weight=1.0))
    assert memory(labels_only).teacher == memory(CONFIG, teacher=None).teacher == 0


def test_the_loss_grows_with_the_chunk_and_not_with_the_batch() -> None:
    def loss(**changes: int) -> int:
        train = dataclasses.replace(CONFIG.train, micro_batch_size=changes.get("micro_batch_size", 4))
        distill = dataclasses.replace(CONFIG.distill, chunk_tokens=changes.get("chunk_tokens", 100))
        return memory(dataclasses.replace(CONFIG, train=train, distill=distill)).loss

    logits = 4 * 1000 * 3  # bytes per token: student, teacher, work space
    assert loss(chunk_tokens=101) - loss() == logits
    assert loss(chunk_tokens=10**6) - loss() == 28 * logits  # a batch has 128 tokens
    assert loss(micro_batch_size=5) - loss() == 32 * 2 * 64  # the gradient of more hidden states


def test_total_is_the_sum_of_the_parts() -> None:
    found = memory(CONFIG)
    others = ("optimizer_on_host", "save_is_kept", "start", "save")
    assert found.total == sum(value for name, value in vars(found).items() if name not in others)


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buckets_are_those_that_the_engine_sets(stage: int, world_size: int) -> None:
    config = with_engine(zero_stage=stage, precision="fp32")
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"]
    found = memory(config, world_size, "fp32")
    assert found.buckets == (4 * zero["reduce_bucket_size"] if stage else 0)
    assert (
        memory(config, world_size, "bf16").buckets == (0, found.buckets, found.buckets // 2, found.buckets // 2)[stage]
    )


def test_the_host_holds_a_start_and_a_save() -> None:
    # A start: the whole model in fp32, twice, whatever the ranks. A save: what a rank owns, weight and two moments, or,
    # where training stands still for it, one tensor.
    for stage, world_size, owned in ((0, 4, P), (1, 1, P), (1, 4, P // 4), (3, 8, P // 8)):
        found = memory(with_engine(zero_stage=stage), world_size)
        assert (found.start, found.save) == (8 * P, 12 * owned + WRITER_BYTES)
    muon = rank_memory(CONFIG, P, n_muon=P // 2, world_size=4, precision="bf16", teacher=TEACHER)
    assert muon.save == 12 * P // 4 - 4 * P // 8 + WRITER_BYTES
    config = dataclasses.replace(CONFIG, checkpoint=dataclasses.replace(CONFIG.checkpoint, asynchronous=False))
    assert memory(config).save == min(12 * P, 4 * CONFIG.model.vocab_size * CONFIG.model.d_model)


def test_frozen_parameters_have_weights_and_nothing_else() -> None:
    frozen = rank_memory(CONFIG, P, n_frozen=P // 4, world_size=4, precision="bf16", teacher=TEACHER)
    trained = rank_memory(CONFIG, P - P // 4, world_size=4, precision="bf16", teacher=TEACHER)
    assert (frozen.gradients, frozen.optimizer, frozen.save) == (trained.gradients, trained.optimizer, trained.save)
    assert frozen.weights == rank_memory(CONFIG, P, world_size=4, precision="bf16", teacher=TEACHER).weights


def test_the_hosts_peak_is_the_largest_of_start_step_and_save() -> None:
    found = dataclasses.replace(memory(with_engine(zero_stage=3), world_size=8), save=12 * P // 8)
    assert found.on_host(on_gpu=True) == found.runtime + found.start
    offloaded = memory(with_engine(offload_optimizer=True), world_size=1)
    assert offloaded.on_host(on_gpu=True) == offloaded.runtime + offloaded.optimizer + offloaded.save
    alone = dataclasses.replace(memory(CONFIG, world_size=1), activations=P, loss=P)
    assert alone.on_host(on_gpu=False) == alone.total + alone.save
    # On the CPU a step's activations are gone when a save begins that training waits for.
    alone = dataclasses.replace(alone, save_is_kept=False)
    assert alone.on_host(on_gpu=False) == alone.total - 2 * P + alone.save
    large = dataclasses.replace(alone, activations=alone.save)
    assert large.on_host(on_gpu=False) == large.total


def test_total_tokens() -> None:
    assert tokens_in_total(CONFIG) == 7 * 1024


@pytest.mark.parametrize("n_kv_heads", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_what_autograd_saves(n_kv_heads: int, dtype: torch.dtype) -> None:
    model = ModelConfig(vocab_size=64, n_layers=3, n_heads=6, n_kv_heads=n_kv_heads, d_model=96, d_ff=250)
    lm, _ = build_student(model, BinarizeConfig(), 0)
    lm.to(dtype)
    lm.model.rotary_emb.float()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in lm.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: a tensor saved twice is held once

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = lm.model(input_ids=torch.zeros(2, 33, dtype=torch.long), use_cache=False).last_hidden_state
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output.dtype == dtype
    estimate = activation_bytes(model, 66, dtype.itemsize, checkpointing=False)
    assert saved == pytest.approx(estimate, rel=0.05)


def test_checkpointing_keeps_one_block_and_every_blocks_input() -> None:
    shallow, deep = (ModelConfig(n_layers=n) for n in (1, 31))
    extra = activation_bytes(deep, 10, 2, checkpointing=True) - activation_bytes(shallow, 10, 2, checkpointing=True)
    assert extra == 30 * 10 * 2 * shallow.d_model
    assert activation_bytes(deep, 10, 2, checkpointing=True) < activation_bytes(deep, 10, 2, checkpointing=False) / 5


def test_the_size_of_a_teacher_is_read_from_file_headers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 5}))
    save_file(
        {"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "model-1.safetensors", metadata={"format": "pt"}
    )
    save_file({"c": torch.zeros(2, 2, dtype=torch.bfloat16)}, tmp_path / "model-2.safetensors")
    assert read_teacher_size(tmp_path) == TeacherSize(n_parameters=26, d_model=5)


def test_a_folder_without_weights_has_no_size(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.safetensors"):
        read_teacher_size(tmp_path)
