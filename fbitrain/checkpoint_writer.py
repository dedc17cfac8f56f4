"""How a checkpoint's folder is written, by a rank or by its writer process, which is this module's `main`. No torch.

The writer reads tensors from memory that it shares with the rank, and has one job at a time. It answers WRITTEN when
the files of its rank are on disk. That of rank 0 then looks into the folder until the files of all ranks are there,
makes the folder a checkpoint, and answers COMPLETE.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_folder, write_text
from fbitrain.base.processes import leave_with
from fbitrain.checkpoint_folders import complete_checkpoints, set_aside, unfinished
from fbitrain.checkpoint_marker import write_marker
from fbitrain.checkpoint_tensors import Chunks, Stored, pieces_of_file, write_tensors

NETWORK_DISK_SECONDS = 20.0  # for one rank to see what another has written
POLL_SECONDS = 0.2
NICENESS = 10  # of the writer: the ranks compute first

WRITTEN, COMPLETE, ALL_WRITTEN = "written", "complete", "all have written"


@dataclass(frozen=True)
class Commit:
    """What makes the folder of all ranks' files a checkpoint."""

    final: Path
    step: int
    world_size: int
    keep: int  # newest checkpoints; 0: all


@dataclass(frozen=True)
class Job:
    """One rank's part of a checkpoint."""

    folder: Path
    texts: Mapping[str, str]  # file -> content
    tensors: Mapping[str, Sequence[tuple[Stored, int]]]  # file -> tensors, and where each begins in the shared memory
    commit: Commit | None  # on rank 0


def shard_name(rank: int) -> str:
    return f"shard_rank{rank:05d}.safetensors"


def data_name(rank: int) -> str:
    return f"data_rank{rank:05d}.json"


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text)


def commit_folder(folder: Path, commit: Commit, all_written: Callable[[float], bool]) -> None:
    """Makes `folder` a checkpoint when all ranks' files are in it, and removes old ones.

    all_written: waits for so many seconds at most; whether every rank has written by then. Raises OSError where files
    are missing all the same.
    """
    _await_every_rank(folder, commit.world_size, all_written)
    write_marker(folder, commit.step)
    fsync_folder(folder)
    if os.path.lexists(commit.final):
        set_aside(commit.final)
    folder.rename(commit.final)
    fsync_folder(commit.final.parent)
    if commit.keep:
        _keep_newest(commit.final.parent.parent, commit.keep)


def _await_every_rank(folder: Path, world_size: int, all_written: Callable[[float], bool]) -> None:
    """A file has its name only once it is whole and on disk (base.files.replacing).

    Raises OSError where the ranks did not write into one folder, which would show only at the first resume.
    """
    deadline: float | None = None
    for name in _files_of_ranks(world_size):
        while not (folder / name).is_file():
            if deadline is None:
                deadline = time.monotonic() + NETWORK_DISK_SECONDS if all_written(POLL_SECONDS) else None
            elif time.monotonic() > deadline:
                raise OSError(errno.ENOENT, f"{name} is not there; run.dir must be one folder shared by all nodes")
            else:
                time.sleep(POLL_SECONDS)


def _files_of_ranks(world_size: int) -> Iterator[str]:
    for rank in range(world_size):
        yield from (shard_name(rank), data_name(rank))


def _keep_newest(run_dir: Path, keep: int) -> None:
    """Best effort: an old checkpoint that cannot be removed is no reason to stop a run."""
    try:
        found = complete_checkpoints(run_dir)
    except UserError as error:
        print(f"warning: old checkpoints are not removed: {error}", flush=True)
        return
    for old in found[:-keep]:
        remove(old)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint, or says why it cannot be."""
    try:
        # The name goes first: a removal that is interrupted must not leave a folder that looks whole.
        shutil.rmtree(checkpoint.rename(unfinished(checkpoint)))
    except OSError as error:
        print(f"warning: the old checkpoint {checkpoint} could not be removed: {error}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """The writer's life. Arguments: the descriptors of its connection and of the shared memory, the rank's process."""
    connection, memory, parent = map(int, arguments)
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()
    os.nice(NICENESS)
    with Connection(connection) as rank:
        try:
            while True:
                if isinstance(job := rank.recv(), Job):  # ALL_WRITTEN may come when nobody waits for it
                    _do(job, rank, memory)
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return  # the rank is done, or gone


def _do(job: Job, rank: Connection, memory: int) -> None:
    try:
        write_files(job, memory)
        rank.send(WRITTEN)
        if job.commit:
            commit_folder(job.folder, job.commit, lambda seconds: rank.poll(seconds) and rank.recv() == ALL_WRITTEN)
            rank.send(COMPLETE)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except OSError as error:
        rank.send(OSError(error.errno or errno.EIO, error.strerror or str(error)))
    except Exception as error:  # a fault of ours must not leave the rank without an answer
        traceback.print_exc()
        rank.send(OSError(errno.EIO, f"{type(error).__name__}: {error}"))


def write_files(job: Job, memory: int) -> None:
    """Writes the files of a rank out of the shared memory with this descriptor."""
    write_texts(job.folder, job.texts)
    for name, placed in job.tensors.items():
        write_tensors(job.folder / name, [stored for stored, _ in placed], _contents(placed, memory))


def _contents(placed: Sequence[tuple[Stored, int]], memory: int) -> Iterator[Chunks]:
    for stored, offset in placed:
        yield pieces_of_file(memory, offset, stored.n_bytes)
