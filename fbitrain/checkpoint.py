"""Saving as a transaction.

A checkpoint holds the fp32 weights and the optimizer's state as flat slices of named parameters, so that any number of
ranks under any ZeRO stage can read what any other wrote. A folder counts only once COMPLETE.json, its last, is in it.

    step_00000200/
      shard_rank00000.safetensors   slices this rank owned: "kind|parameter|start" -> fp32 [n]; kinds are weight, and
                                    exp_avg and exp_avg_sq of AdamW or momentum of Muon
      fixed.safetensors             what training does not change: buffers and frozen parameters, if there are any
      lm_config.json                transformers' configuration of a fine-tuned model
      data_rank00000.json           where this rank's stream stands
      trainer.json                  step, tokens, running means of loss and gradient, and each parameter's shape
      data_shards.json              the shards that the streams read
      config.yaml                   the resolved configuration
      COMPLETE.json                 every file's size and digest (checkpoint_marker)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_file, fsync_folder, fsync_tree, give_usual_mode, write_json, write_text
from fbitrain.checkpoint_files import TrainerState
from fbitrain.checkpoint_folders import complete_checkpoints, set_aside, step_folder, unfinished
from fbitrain.checkpoint_marker import FIXED, LM_CONFIG, checksum, write_marker
from fbitrain.config import Config, to_yaml

if TYPE_CHECKING:
    from fbitrain.data.sources.fingerprint import ShardList
    from fbitrain.engine import Engine

NETWORK_DISK_SECONDS = 20.0  # for one rank to see what another has written


def save(engine: Engine, config: Config, state: TrainerState, data_state: Mapping[str, Any], shards: ShardList) -> Path:
    """Writes the checkpoint of `state.step` and removes old ones beyond checkpoint.keep. Every rank calls it.

    Raises UserError on all ranks, with older checkpoints untouched, when any rank cannot write.
    """
    final = step_folder(config.run_dir, state.step)
    folder = unfinished(final)
    rank = dist.get_rank()
    _all_or_nothing(lambda: _clear(folder) if rank == 0 else None, folder)
    _all_or_nothing(lambda: _write_shard(folder, rank, engine, data_state), folder)
    fixed = engine.fixed_tensors()
    _all_or_nothing(lambda: _finish(folder, final, engine, config, state, shards, fixed) if rank == 0 else None, folder)
    return final


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        set_aside(folder)


def _write_shard(folder: Path, rank: int, engine: Engine, data_state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"shard_rank{rank:05d}"
    _write_tensors(folder / f"{name}.safetensors", dict(_tensors(engine)))
    write_json(folder / f"data_rank{rank:05d}.json", data_state)
    fsync_tree(folder, only=name)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    sums = {key: checksum(tensor) for key, tensor in tensors.items()}
    save_file(dict(tensors), path, metadata={"checksums": json.dumps(sums)})
    give_usual_mode(path)


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    for fragment in engine.shards.fragments():
        for kind, values in {"weight": fragment.weight, **fragment.state}.items():
            # A copy: safetensors refuses views that share one buffer.
            yield f"{kind}|{fragment.name}|{fragment.start}", values.to("cpu", copy=True)


def _finish(
    folder: Path,
    final: Path,
    engine: Engine,
    config: Config,
    state: TrainerState,
    shards: ShardList,
    fixed: Mapping[str, Tensor],
) -> None:
    _require_every_rank(folder)
    if fixed:
        _write_tensors(folder / FIXED, fixed)
        fsync_file(folder / FIXED)
    if config.model.pretrained:
        write_text(folder / LM_CONFIG, engine.student.lm.config.to_json_string(use_diff=False))
    shapes = {name: list(shape) for name, shape in engine.shards.shapes().items()}
    about = {"world_size": dist.get_world_size(), "shapes": shapes, "state_starts": engine.shards.state_starts}
    write_json(folder / "trainer.json", {**asdict(state), **about})
    write_text(folder / "config.yaml", to_yaml(config))
    write_json(folder / "data_shards.json", shards)
    write_marker(folder, state.step)
    fsync_folder(folder)
    if os.path.lexists(final):
        set_aside(final)
    folder.rename(final)
    fsync_folder(final.parent)
    if config.checkpoint.keep:
        for old in complete_checkpoints(config.run_dir)[: -config.checkpoint.keep]:
            _remove(old)


def _require_every_rank(folder: Path) -> None:
    """Raises OSError where the ranks did not write into one folder, which would show only at the first resume."""
    for rank in range(dist.get_world_size()):
        for name in (f"shard_rank{rank:05d}.safetensors", f"data_rank{rank:05d}.json"):
            deadline = time.monotonic() + NETWORK_DISK_SECONDS
            while not (folder / name).is_file():
                if time.monotonic() > deadline:
                    raise OSError(errno.ENOENT, f"{name} is not there; run.dir must be one folder shared by all nodes")
                time.sleep(0.2)


def _remove(checkpoint: Path) -> None:
    """Best effort: an old checkpoint that cannot be removed is no reason to stop a run."""
    try:
        # The name goes first: a removal that is interrupted must not leave a folder that looks whole.
        shutil.rmtree(checkpoint.rename(unfinished(checkpoint)))
    except OSError as error:
        print(f"warning: the old checkpoint {checkpoint} could not be removed: {error}", flush=True)


def _all_or_nothing(write: Callable[[], None], folder: Path) -> None:
    """Runs `write` on every rank; if it fails on one, all raise, so that none waits for the others for ever."""
    failure = ""
    try:
        write()
    except OSError as error:
        failure = _explain(error, folder)
    except SafetensorError as error:  # safetensors wraps the operating system's error in its own text
        full = "No space left" in str(error)
        failure = _explain(OSError(errno.ENOSPC if full else errno.EIO, str(error)), folder)
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for message in failures:
        if message:
            if dist.get_rank() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise UserError(message)


def _explain(error: OSError, folder: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free / 2**20
        return (
            f"the disk of {folder.parent} is full ({free:.0f} MiB free): checkpoint {folder.stem} was not written, "
            "older ones are untouched; free space or lower checkpoint.keep, then start the same command again"
        )
    reason = error.strerror or str(error)
    return f"checkpoint {folder.stem} could not be written to {folder.parent}: {reason}; older ones are untouched"
