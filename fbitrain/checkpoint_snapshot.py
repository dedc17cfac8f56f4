"""A rank's side of an asynchronous save: the copy of its tensors in shared memory, and the writer process."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe

import torch
from torch import Tensor

from fbitrain.base.processes import how_it_ended, start_child
from fbitrain.checkpoint_tensors import Stored
from fbitrain.checkpoint_writer import ALL_WRITTEN, COMPLETE, WRITTEN, Job
from fbitrain.process import on_gpu

COMMAND = "import sys; from fbitrain.checkpoint_writer import main; main(sys.argv[1:])"
FAREWELL_SECONDS = 25.0  # for a write that goes on when the run ends in an error
_ALIGNMENT = 64  # bytes


class Snapshot:
    """Shared memory that holds a copy of a rank's tensors; made at the first save and kept for the next ones.

    It has no name: it goes with the last process that has it open, however that ends.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("fbitrain-checkpoint")
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._pinned = False

    def place(self, files: Sequence[Sequence[Stored]]) -> list[list[tuple[Stored, int]]]:
        """The tensors of each file with the place where each of them begins; makes room for all of them.

        Raises OSError where there is not enough memory.
        """
        end = 0
        placed: list[list[tuple[Stored, int]]] = []
        for tensors in files:
            placed.append([])
            for stored in tensors:
                placed[-1].append((stored, end))
                end += -(-stored.n_bytes // _ALIGNMENT) * _ALIGNMENT
        if end > len(self._memory):
            self._make_room(end)
        return placed

    def _make_room(self, n_bytes: int) -> None:
        self._unpin()
        try:
            os.posix_fallocate(self.descriptor, 0, n_bytes)
            # Every page is mapped here and not while tensors are copied.
            mapped = mmap.mmap(self.descriptor, n_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise _no_room(n_bytes, str(error.strerror)) from None
        self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        if on_gpu():
            cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            if status := int(cuda.cudaHostRegister(self._memory.data_ptr(), n_bytes, 0)):
                raise _no_room(n_bytes, f"CUDA cannot pin it: error {status}")
            self._pinned = True

    def copy(self, tensor: Tensor, offset: int) -> None:
        """Copies a tensor to its place; from a GPU in the order of its work, so `arrived` is to be called behind."""
        source = tensor.detach()
        target = self._memory[offset : offset + source.nbytes].view(source.dtype).view(source.shape)
        target.copy_(source, non_blocking=self._pinned)

    def arrived(self) -> None:
        """Waits until all copies are there."""
        if self._pinned:
            torch.cuda.current_stream().synchronize()

    def close(self) -> None:
        self._unpin()
        self._memory = torch.empty(0, dtype=torch.uint8)
        os.close(self.descriptor)

    def _unpin(self) -> None:
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())  # type: ignore[no-untyped-call]
            self._pinned = False


def _no_room(n_bytes: int, why: str) -> OSError:
    needed = f"{n_bytes / 1e9:.1f} GB of memory for the copy of a rank's tensors"
    return OSError(errno.ENOMEM, f"there is no room for {needed} ({why}); set checkpoint.asynchronous=false")


class Writer:
    """The process that writes a rank's files while the rank trains on. It ends with the rank, however that ends."""

    def __init__(self, memory: int) -> None:
        self._connection, other = Pipe()
        with other:
            inherited = [other.fileno(), memory]
            arguments = [*map(str, inherited), str(os.getpid())]
            self.process = start_child(COMMAND, arguments, inherited, stdin=subprocess.DEVNULL)
        self._idle, self._commits = True, False
        self.written = self.complete = False  # of the job that was started last
        self.failure: OSError | None = None

    def start(self, job: Job) -> None:
        """Hands over a job; the one before is done."""
        self.written = self.complete = False
        self._idle, self._commits = False, job.commit is not None
        with suppress(BrokenPipeError, ConnectionResetError):  # `look` says that it is gone
            self._connection.send(job)

    @property
    def busy(self) -> bool:
        """Whether the job that was started last has neither been done nor failed."""
        return not self._idle

    def look(self, seconds: float = 0.0) -> None:
        """Takes its answers, waiting for the last one of a job for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while not self._idle and self._connection.poll(max(0.0, deadline - time.monotonic())):
            try:
                self._take(self._connection.recv())
            except (EOFError, ConnectionResetError):
                self._take(
                    OSError(errno.EPIPE, f"its writer, process {self.process.pid}, {how_it_ended(self.process)}")
                )

    def _take(self, answer: str | OSError) -> None:
        self.written |= answer in (WRITTEN, COMPLETE)
        self.complete |= answer == COMPLETE
        self.failure = answer if isinstance(answer, OSError) else None
        self._idle = self.failure is not None or answer == COMPLETE or not self._commits

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def tell_all_written(self) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.send(ALL_WRITTEN)

    def kill(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Ends it when it has done what it can do without us."""
        if self.busy:
            self.tell_all_written()
            self.look(FAREWELL_SECONDS)
        self.kill()
