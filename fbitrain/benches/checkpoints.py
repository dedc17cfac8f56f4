"""What a checkpoint costs a training run, written by another process and written while training stands still.

    python -m fbitrain.benches.checkpoints CONFIG.yaml [section.key=value …] [--rounds 5] [--help]

One rank takes optimizer steps on random tokens, with a loss on labels alone. In turns it takes some steps by
themselves, saves asynchronously and goes on with steps until that checkpoint is complete, and saves synchronously. What
those steps take more than the others, and the time for which training stood still, is the cost of a save.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import torch

from fbitrain.checkpoint import Saver
from fbitrain.checkpoint_files import TrainerState
from fbitrain.checkpoint_folders import step_folder
from fbitrain.config import Config, load_config
from fbitrain.engine import Engine, init_distributed
from fbitrain.model.build import build_student
from fbitrain.student import Student

PLAIN_STEPS = 5  # of a round, without a checkpoint in flight
WAYS = ("synchronous", "asynchronous")


def main() -> None:
    arguments = parse_args()
    with TemporaryDirectory(prefix="fbitrain-checkpoints-", dir=arguments.folder) as folder:
        config = small_batches(load_config(arguments.config, arguments.overrides), Path(folder))
        run = Run(config)
        run.measure(arguments.rounds)
        run.report()


def small_batches(config: Config, folder: Path) -> Config:
    """`config` with one micro-batch in a step, and its run in `folder`."""
    train = replace(config.train, global_batch_tokens=config.train.micro_batch_size * config.data.seq_len)
    checkpoint = replace(config.checkpoint, keep=1)
    run = replace(config.run, dir=str(folder), name="bench")
    return replace(config, train=train, checkpoint=checkpoint, run=run)


def saver_of(engine: Engine, config: Config, *, asynchronous: bool) -> Saver:
    return Saver(engine, replace(config, checkpoint=replace(config.checkpoint, asynchronous=asynchronous)))


def make_engine(config: Config) -> tuple[Engine, Callable[[], float]]:
    """An engine, and what takes an optimizer step with it and returns the seconds that took."""
    init_distributed(config)
    lm, _ = build_student(config.model, config.binarize, config.train.seed)
    engine = Engine(config, Student(lm, replace(config.distill, kd_weight=0.0, ce_weight=1.0, hidden_weight=0.0)))
    generator, steps = torch.Generator().manual_seed(0), itertools.count(1)
    shape = (config.train.micro_batch_size, config.data.seq_len + 1)

    def step() -> float:
        batch = torch.randint(config.model.vocab_size, shape, generator=generator).to(engine.device)
        started = time.perf_counter()
        loss, _ = engine(batch)
        engine.backward(loss)
        engine.end_step(min(next(steps), config.train.total_steps), "", lambda norm: "")
        float(loss.detach())  # the device's work is part of the step
        return time.perf_counter() - started

    step()
    step()
    return engine, step


def save(saver: Saver, number: int) -> float:
    started = time.perf_counter()
    saver.save(TrainerState(number), {}, {})
    return time.perf_counter() - started


class Run:
    """The measurement, in one process of one rank."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine, self.step = make_engine(config)
        self.synchronous = saver_of(self.engine, config, asynchronous=False)
        self.asynchronous = saver_of(self.engine, config, asynchronous=True)
        self.plain: list[list[float]] = []  # of each round, seconds of steps without a checkpoint in flight
        self.busy: list[list[float]] = []  # and of steps with one
        self.stood: dict[str, list[float]] = {way: [] for way in WAYS}  # seconds for which training stood still
        self.first = 0.0  # the same of the first asynchronous save, which makes the room for the copy
        self.writer_s, self.writer_bytes = 0.0, 0  # of a processor for a checkpoint, and of memory at the peak
        self.memory: dict[str, int] = {}  # bytes more than in a step, of the rank

    def measure(self, rounds: int) -> None:
        numbers = itertools.count(1)
        self.memory["synchronous"] = more_memory(lambda: save(self.synchronous, next(numbers)))
        began = time.perf_counter()
        self.memory["asynchronous"] = more_memory(lambda: save(self.asynchronous, next(numbers)))
        self.first = time.perf_counter() - began
        self.asynchronous.wait()
        for _ in range(rounds):
            plain = [self.step() for _ in range(PLAIN_STEPS)]
            self.stood["asynchronous"].append(save(self.asynchronous, number := next(numbers)))
            busy = []
            while not step_folder(self.config.run_dir, number).is_dir() and not self.asynchronous.cannot_write():
                busy.append(self.step())
            self.asynchronous.wait()
            self.plain.append(plain + [self.step() for _ in range(PLAIN_STEPS)])
            self.busy.append(busy)
            self.stood["synchronous"].append(save(self.synchronous, next(numbers)))
        (writer,) = psutil.Process().children()
        self.writer_s = sum(writer.cpu_times()[:2]) / (rounds + 1)
        self.writer_bytes = memory_of(writer.pid, "VmHWM")
        self.asynchronous.close()

    def report(self) -> None:
        n_parameters = sum(p.numel() for p in self.engine.student.parameters())
        plain, busy = (statistics.median(itertools.chain(*rounds)) for rounds in (self.plain, self.busy))
        print(f"{n_parameters / 1e6:.1f} M parameters; a step takes {plain:.3f} s; medians of {len(self.busy)} saves:")
        n_busy = statistics.median(map(len, self.busy))
        for way, slower in zip(WAYS, (0.0, n_busy * (busy - plain)), strict=True):
            print(f"{way}: training stands still for {self._told(way, slower)}")
            print(f"    {self.memory[way] / n_parameters:.2f} bytes per parameter more memory of the rank at the peak")
        print(f"    {n_busy:g} steps take {busy:.3f} s each until it is complete")
        print(f"    the writer takes {self.writer_s:.2f} s of a processor and {self.writer_bytes / 1e6:.0f} MB")
        print(f"    the first save, which makes room for the copy: {self.first:.2f} s")

    def _told(self, way: str, slow: float) -> str:
        """How long training stands still; with the `slow` seconds that its steps take more, what share is lost."""
        stood, minutes = statistics.median(self.stood[way]), self.config.checkpoint.every_minutes
        share = f"; {100 * (stood + slow) / (60 * minutes):.3f} % of {minutes:g} minutes are lost" if minutes else ""
        return f"{stood:.2f} s{share}"


def more_memory(work: Callable[[], object]) -> int:
    """How many bytes this process holds at the peak of `work()` beyond those that it held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (proc(5))
    before = memory_of("self", "VmRSS")
    work()
    return memory_of("self", "VmHWM") - before


def memory_of(pid: int | str, field: str) -> int:
    """A field of a process's status, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status[status.index(f"{field}:") :].split()[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", help="a training configuration; its teacher and its data are not read")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each way")
    parser.add_argument("--folder", type=Path, default=Path(), help="on whose disk the checkpoints are written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
