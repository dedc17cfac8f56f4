"""Saving as a transaction.

A checkpoint holds the fp32 weights and the optimizer's state as flat slices of named parameters, so that any number of
ranks under any ZeRO stage can read what any other wrote. A folder counts only once COMPLETE.json, its last, is in it.
checkpoint_writer.py writes the files, in this process or in another one while training goes on.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fbitrain.base.errors import UserError, passing
from fbitrain.checkpoint_files import TrainerState
from fbitrain.checkpoint_folders import set_aside, step_folder, unfinished
from fbitrain.checkpoint_marker import FIXED, LM_CONFIG
from fbitrain.checkpoint_snapshot import Snapshot, Writer
from fbitrain.checkpoint_tensors import Chunks, Stored, pieces, write_tensors
from fbitrain.checkpoint_writer import (
    POLL_SECONDS,
    Commit,
    Job,
    commit_folder,
    data_name,
    shard_name,
    write_texts,
)
from fbitrain.config import Config, to_yaml
from fbitrain.ranks import agreed, say

if TYPE_CHECKING:
    from fbitrain.data.sources.fingerprint import ShardList
    from fbitrain.engine import Engine

DTYPES = {
    **{torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.bool: "BOOL"},
    **{torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"},
}


@dataclass(frozen=True)
class InFlight:
    """A checkpoint that the writers of all ranks are working at."""

    final: Path
    waited: float  # seconds for which training stood still


class Saver:
    """Saves an engine's run. With checkpoint.asynchronous a save returns as soon as the tensors are copied.

    At most one checkpoint is in flight then: what all ranks agree on in `save` and `wait`.
    """

    def __init__(self, engine: Engine, config: Config) -> None:
        self._engine, self._config = engine, config
        self._rank = dist.get_rank()
        self._snapshot: Snapshot | None = None
        self._writer: Writer | None = None
        self._in_flight: InFlight | None = None
        self._said = False  # that the one in flight is complete

    def save(self, state: TrainerState, data_state: Mapping[str, Any], shards: ShardList) -> None:
        """Writes the checkpoint of `state.step` and removes old ones beyond checkpoint.keep. Collective.

        Raises UserError on all ranks, with older checkpoints untouched, when any rank cannot write, or could not write
        the one before.
        """
        final = step_folder(self._config.run_dir, state.step)
        began = time.perf_counter()
        self.wait(f"the save of {final.name} waits for it")
        folder = unfinished(final)
        texts = {data_name(self._rank): _json(data_state)}
        commit = None
        if self._rank == 0:
            texts |= self._texts(state, shards)
            commit = Commit(final, state.step, dist.get_world_size(), self._config.checkpoint.keep)
        if self._config.checkpoint.asynchronous:
            self._start_writing(folder, texts, commit)
            self._in_flight, self._said = InFlight(final, time.perf_counter() - began), False
        else:
            self._write(folder, texts, commit)
            say(f"saved {final}; training stood still for {time.perf_counter() - began:.1f} s")

    def cannot_write(self) -> bool:
        """Whether this rank has failed to write what is in flight. Not collective, and waits for nothing."""
        return self._in_flight is not None and self._look(0.0).failure is not None

    def wait(self, why: str = "") -> None:
        """Returns when nothing is in flight: the newest checkpoint is complete. Collective; `why` is said.

        Raises UserError on all ranks if any has failed to write.
        """
        if self._in_flight is None:
            return
        if self._rank == 0 and not self._look(0.0).complete and why:
            say(f"{self._in_flight.final} is still being written; {why}")
        # The ranks ask each other again and again, as a write may take longer than a collective may.
        told = False
        while True:
            writer = self._look(POLL_SECONDS)
            failed, writing, complete = self._added_up(writer.failure is not None, not writer.written, writer.complete)
            if complete:
                self._in_flight = None
                return
            if failed:
                self._give_up(self._in_flight.final)
            if not writing and not told:
                told = True
                if self._rank == 0:
                    writer.tell_all_written()

    def close(self) -> None:
        """Ends the writer, which does what it can of a checkpoint in flight before. Not collective."""
        if self._writer:
            self._writer.close()
        if self._snapshot:
            self._snapshot.close()
        self._writer = self._snapshot = None

    # -- while training goes on ----------------------------------------------------------------------------------------

    def _start_writing(self, folder: Path, texts: Mapping[str, str], commit: Commit | None) -> None:
        files = self._files()
        layout = [[_stored(*named) for named in tensors] for tensors in files.values()]
        placed: list[list[tuple[Stored, int]]] = []

        def prepare() -> None:
            if commit:
                _clear(folder)
            self._snapshot = self._snapshot or Snapshot()
            placed[:] = self._snapshot.place(layout)
            if self._writer is None or not self._writer.alive:
                self._writer = Writer(self._snapshot.descriptor)

        _agreed_write(prepare, folder)
        assert self._snapshot is not None
        assert self._writer is not None
        for tensors, places in zip(files.values(), placed, strict=True):
            for (_, tensor), (_, offset) in zip(tensors, places, strict=True):
                self._snapshot.copy(tensor, offset)
        self._snapshot.arrived()
        self._writer.start(Job(folder, texts, dict(zip(files, placed, strict=True)), commit))

    def _look(self, seconds: float) -> Writer:
        """The writer, its answers taken; says of a checkpoint that it is complete."""
        assert self._in_flight is not None
        assert self._writer is not None
        self._writer.look(seconds)
        if self._writer.complete and not self._said:
            self._said = True
            say(f"saved {self._in_flight.final}; training stood still for {self._in_flight.waited:.1f} s")
        return self._writer

    def _added_up(self, *flags: bool) -> list[int]:
        """How many ranks raise each flag. Collective."""
        sums = torch.tensor(flags, dtype=torch.int32, device=self._engine.device)
        dist.all_reduce(sums)
        found: list[int] = sums.tolist()
        return found

    def _give_up(self, final: Path) -> None:
        """Ends the writers and raises what the first rank to fail has to say. Collective."""
        assert self._writer is not None
        self._writer.kill()
        failure = self._writer.failure
        self._writer = self._in_flight = None
        _agreed_write(lambda: _raise(failure), unfinished(final))

    # -- while training stands still -----------------------------------------------------------------------------------

    def _write(self, folder: Path, texts: Mapping[str, str], commit: Commit | None) -> None:
        _agreed_write(lambda: _clear(folder) if commit else None, folder)

        def write_own() -> None:
            write_texts(folder, texts)
            for name, tensors in self._files().items():
                write_named(folder / name, tensors)

        _agreed_write(write_own, folder)
        _agreed_write(lambda: commit_folder(folder, commit, lambda _: True) if commit else None, folder)

    # -- what a checkpoint holds ---------------------------------------------------------------------------------------

    def _files(self) -> dict[str, list[tuple[str, Tensor]]]:
        """The files of tensors that this rank writes, and their tensors under their keys: views, nothing is copied."""
        slices = [
            (f"{kind}|{fragment.name}|{fragment.start}", values)
            for fragment in self._engine.shards.fragments()
            for kind, values in {"weight": fragment.weight, **fragment.state}.items()
        ]
        fixed = self._engine.fixed_tensors()  # of rank 0
        return {shard_name(self._rank): slices, **({FIXED: fixed} if fixed else {})}

    def _texts(self, state: TrainerState, shards: ShardList) -> dict[str, str]:
        engine, config = self._engine, self._config
        shapes = {name: list(shape) for name, shape in engine.shards.shapes().items()}
        about = {"world_size": dist.get_world_size(), "shapes": shapes, "state_starts": engine.shards.state_starts}
        texts = {
            "trainer.json": _json({**asdict(state), **about}),
            "data_shards.json": _json(shards),
            "config.yaml": to_yaml(config),
        }
        if config.model.pretrained:
            texts[LM_CONFIG] = engine.student.lm.config.to_json_string(use_diff=False)
        return texts


def write_named(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> None:
    """Writes tensors under their names, one at a time; those of larger numbers come first."""
    write_tensors(path, [_stored(*named) for named in tensors], (_bytes_of(tensor) for _, tensor in tensors))


def _stored(key: str, tensor: Tensor) -> Stored:
    return Stored(key, DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)


def _bytes_of(tensor: Tensor) -> Chunks:
    return pieces(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _json(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        set_aside(folder)


def _raise(failure: OSError | None) -> None:
    if failure:
        raise failure


def _agreed_write(write: Callable[[], None], folder: Path) -> None:
    """Runs `write` on every rank; if it fails on one, `folder` goes, and all raise why it failed."""

    def explained() -> None:
        try:
            write()
        except OSError as error:
            raise passing(_explain(error, folder)) from None  # room may be made on a full disk meanwhile

    try:
        agreed(explained)
    except UserError:
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise


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
