"""Checkpoints that no run wrote, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fbitrain.checkpoint import write_named
from fbitrain.checkpoint_folders import step_of
from fbitrain.checkpoint_marker import FIXED, LM_CONFIG, write_marker


def complete(folder: Path) -> None:
    """Makes `folder` a complete checkpoint of the step in its name; files that a test does not need are empty."""
    for name in ("shard_rank00000.safetensors", "data_rank00000.json"):
        (folder / name).touch()
    for name in ("data_shards.json", "trainer.json", "config.yaml"):
        (folder / name).touch()
    write_marker(folder, step_of(folder))


def write_checkpoint(folder: Path) -> Path:
    """A whole checkpoint of one rank and two tensors, of the step in the name of `folder`, in a run folder."""
    step = step_of(folder)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    write_named(folder / "shard_rank00000.safetensors", [("weight|w|0", torch.randn(5000, generator=generator))])
    write_named(folder / FIXED, [("mask", torch.arange(37, dtype=torch.uint8))])
    (folder / "data_rank00000.json").write_text(json.dumps({"lanes": [{"position": 12345, "seed": 7}]}))
    (folder / "data_shards.json").write_text(json.dumps({"one": [["a.jsonl", 1000]]}))
    (folder / "trainer.json").write_text(
        json.dumps({"step": step, "tokens": 2688, "world_size": 1, "shapes": {"w": [50, 100]}})
    )
    (folder / LM_CONFIG).write_text(json.dumps({"model_type": "llama", "rms_norm_eps": 1e-05}))
    (folder / "config.yaml").write_text("run: {name: run}\n")
    (folder.parent.parent / "config.yaml").write_text("run: {name: run}\n")
    write_marker(folder, step)
    return folder
