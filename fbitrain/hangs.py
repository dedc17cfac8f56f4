"""Where every rank is when nothing moves any more: said in the log, with stacks in the run folder; then the run ends.

A thread of each rank looks at the position that its StepClock holds. The ranks tell each other through the rendezvous
store, over connections of the threads' own: it works while the main threads wait inside Gloo, NCCL or a file system.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fbitrain.base.files import replacing
from fbitrain.hang_report import Report, culprits, report_text
from fbitrain.lost_ranks import Peers
from fbitrain.process import on_gpu
from fbitrain.step_clock import StepClock

LOOK_S = 2.0  # between two looks at the position; every rank tells it as often
PATIENCE_S = 10.0  # for the other ranks to say where they are
STORE_S = 5.0  # for the store to answer
DISK_S = 5.0  # for the run folder to take the stacks; it may be what hangs


@contextmanager
def hangs_named(clock: StepClock, peers: Peers, run_dir: Path) -> Iterator[None]:
    """Ends this process if a rank stays at one place for longer than its clock's `limit_s`, and says which it is."""
    watch = Watch(clock, peers, run_dir)
    if on_gpu():
        (run_dir / "hangs").mkdir(exist_ok=True)  # NCCL makes none
    threading.Thread(target=watch.run, daemon=True).start()
    try:
        yield
    finally:
        watch.over.set()


class Board:
    """What the ranks tell each other, in the rendezvous store of this launch. A store that is gone answers nothing."""

    def __init__(self, launch: str, store: Any = None) -> None:
        self._store = store or dist.distributed_c10d._get_default_store()
        if hasattr(self._store, "clone"):  # a connection of its own; an older torch has the one for all threads
            self._store = self._store.clone()
            self._store.set_timeout(timedelta(seconds=STORE_S))
        self._launch = launch

    def tell(self, key: str, value: Any) -> None:
        with suppress(RuntimeError):
            self._store.set(f"hang/{self._launch}/{key}", json.dumps(value))

    def heard(self, key: str) -> Any:
        """What was told; None where nothing was."""
        key = f"hang/{self._launch}/{key}"
        with suppress(RuntimeError):
            if self._store.check([key]):
                return json.loads(self._store.get(key))
        return None


@dataclass
class Watch:
    """Looks after this rank; `end` ends the process."""

    clock: StepClock
    peers: Peers
    run_dir: Path
    end: Callable[[int], object] = os._exit

    def __post_init__(self) -> None:
        self.over = threading.Event()
        self._board = Board(self.peers.launch)
        self._rank = self.peers.rank
        self._seen = self.clock.position
        self._waited_s = 0.0
        self._looked = time.monotonic()

    def run(self) -> None:
        try:
            while not self.over.is_set():
                # Where the interpreter's lock is held for good, this thread stands still and C code dumps the stacks.
                faulthandler.dump_traceback_later(self.clock.limit_s + 2 * PATIENCE_S, file=2)
                if self.hangs():
                    self.report()
                    return
                self.over.wait(LOOK_S)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def hangs(self) -> bool:
        """Looks once; whether this rank has been at one place for too long, or another says that a rank has."""
        now = time.monotonic()
        # The time for which the whole job was suspended says nothing of any rank. Collectives count it all the same.
        self._waited_s += min(now - self._looked, 2 * LOOK_S)
        self._looked = now
        if self.clock.position is not self._seen:
            self._seen, self._waited_s = self.clock.position, 0.0
        self._board.tell(f"beat/{self._rank}", Report(self._rank, self._seen).to_json())
        if self._waited_s > self.clock.limit_s:
            self._board.tell("called", self._rank)
            return True
        return self._board.heard("called") is not None

    def report(self) -> None:
        """Saves the stacks, says where all ranks are if that falls to this one, and ends the process."""
        own = Report(self._rank, self.clock.position, innermost_frame())
        self._board.tell(f"report/{self._rank}", own.to_json())
        saving = threading.Thread(target=self._save, args=(own,), daemon=True)
        saving.start()
        reports = self._gather(own)
        saving.join(DISK_S)
        if self.over.is_set():
            return
        teller = min(reports)
        if teller == self._rank:
            self._say(reports)
            self._board.tell("said", True)
        else:
            _wait(lambda: self._board.heard("said") is not None, STORE_S + DISK_S)
        self.end(1)

    def _say(self, reports: dict[int, Report]) -> None:
        processes = self.peers.processes
        beats = {rank: told for rank in range(len(processes)) if (told := self._board.heard(f"beat/{rank}"))}
        last_seen = {rank: Report.of_json(told) for rank, told in beats.items()}
        text = report_text(reports, last_seen, processes, self.run_dir / "hangs", self.clock.limit_s)
        print(text, file=sys.stderr, flush=True)
        # The errors of collectives that break as the ranks end need no words any more.
        hanging = [processes[rank] for rank in culprits(reports, len(processes))]
        claiming = threading.Thread(target=self.peers.claim, args=(hanging,), daemon=True)
        claiming.start()
        claiming.join(DISK_S)

    def _gather(self, own: Report) -> dict[int, Report]:
        """The reports by rank, of all that answer."""
        found = {self._rank: own}

        def complete() -> bool:
            for rank in range(len(self.peers.processes)):
                if rank not in found and (told := self._board.heard(f"report/{rank}")):
                    found[rank] = Report.of_json(told)
            return len(found) == len(self.peers.processes)

        _wait(complete, PATIENCE_S)
        return found

    def _save(self, own: Report) -> None:
        folder, name = self.run_dir / "hangs", f"step_{own.position.step}"
        try:
            folder.mkdir(exist_ok=True)
            with replacing(folder / f"{name}_rank_{self._rank}.txt") as path, path.open("w") as file:
                print(f"{self.peers.processes[self._rank]}: {own}\n", file=file, flush=True)
                faulthandler.dump_traceback(file)
            if recorded := collectives():
                with replacing(folder / f"{name}_collectives_rank_{self._rank}") as path:
                    path.write_bytes(recorded)
        except OSError as error:
            print(f"warning: {folder} takes no stacks: {error.strerror or error}", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(2)


def _wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def collectives() -> bytes:
    """torch's flight recorder: the last collectives of this rank, pickled; empty in a torch that has none for them."""
    name = "_dump_nccl_trace" if on_gpu() else "_dump_fr_trace"
    dump = getattr(torch._C._distributed_c10d, name, None)
    recorded: bytes = dump() if dump else b""
    return recorded


def innermost_frame() -> str:
    """Where the main thread is in our own code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = traceback.extract_stack(frame) if frame else []
    ours = [f for f in frames if f"{os.sep}fbitrain{os.sep}" in f.filename]
    return next((f"{Path(f.filename).name}:{f.lineno} in {f.name}" for f in reversed(ours or frames)), "")


def record_collectives(run_dir: Path) -> None:
    """Before NCCL starts: its flight recorder on, and where it writes if its own watch ends the process first."""
    for name, value in {
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str((run_dir / "hangs" / "nccl_rank_").absolute()),
    }.items():
        os.environ.setdefault(name, value)
