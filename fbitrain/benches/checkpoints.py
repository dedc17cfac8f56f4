"""What a checkpoint costs a training run, written by another process and written while training stands still.

    python -m fbitrain.benches.checkpoints CONFIG.yaml [section.key=value …] [--rounds 5] [--memory] [--help]

One rank takes optimizer steps on random tokens, with a loss on labels alone. In turns it takes some steps by
themselves, saves synchronously, saves asynchronously, and goes on with steps until that checkpoint is complete. What
those steps take more than the others, and the time for which training stood still, is the cost of a save. Memory is
the peak of a process of its own for each way.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
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
WAYS = ("no save", "synchronous", "asynchronous")


def main() -> None:
    arguments = parse_args()
    with TemporaryDirectory(prefix="fbitrain-checkpoints-", dir=arguments.folder) as folder:
        config = small_batches(load_config(arguments.config, arguments.overrides), Path(folder))
        if arguments.memory:
            report_memory(config)
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
        self.plain: list[float] = []  # seconds of steps without a checkpoint in flight
        self.busy: list[list[float]] = []  # of each round, seconds of steps with one
        self.stood: dict[str, list[float]] = {way: [] for way in WAYS[1:]}  # seconds for which training stood still
        self.writer_s = 0.0  # of a processor, that the writer takes for a checkpoint
        self.first = 0.0  # the same of the first asynchronous save, which makes the room for the copy

    def measure(self, rounds: int) -> None:
        numbers = itertools.count(1)
        self.first = save(self.asynchronous, next(numbers))
        self.asynchronous.wait()
        for _ in range(rounds):
            self.plain += [self.step() for _ in range(PLAIN_STEPS)]
            self.stood["synchronous"].append(save(self.synchronous, next(numbers)))
            self.plain += [self.step() for _ in range(PLAIN_STEPS)]
            self.stood["asynchronous"].append(save(self.asynchronous, number := next(numbers)))
            seconds = []
            while not step_folder(self.config.run_dir, number).is_dir() and not self.asynchronous.cannot_write():
                seconds.append(self.step())
            self.busy.append(seconds)
            self.asynchronous.wait()
        (writer,) = psutil.Process().children()
        self.writer_s = sum(writer.cpu_times()[:2]) / (rounds + 1)
        self.asynchronous.close()

    def report(self) -> None:
        n_parameters = sum(p.numel() for p in self.engine.student.parameters())
        plain = statistics.median(self.plain)
        print(f"{n_parameters / 1e6:.1f} M parameters; a step takes {plain:.2f} s (median of {len(self.plain)})")
        print(
            f"the first asynchronous save, which makes room for the copy: training stands still for {self.first:.2f} s"
        )
        print(f"the writer takes {self.writer_s:.2f} s of a processor for a checkpoint")
        lost = {"synchronous": self.stood["synchronous"]}
        slowed = [sum(seconds) - plain * len(seconds) for seconds in self.busy]
        lost["asynchronous"] = [stood + slow for stood, slow in zip(self.stood["asynchronous"], slowed, strict=True)]
        for way in WAYS[1:]:
            stood, whole = statistics.median(self.stood[way]), statistics.median(lost[way])
            text = f"{way}: training stands still for {stood:.2f} s"
            if way == "asynchronous":
                in_flight = statistics.median(map(sum, self.busy))
                slower = sum(map(sum, self.busy)) / (plain * sum(map(len, self.busy))) - 1
                text += f"; the {in_flight:.1f} s of steps until it is complete are {100 * slower:.1f} % slower"
            print(f"{text}; {whole:.2f} s lost in all (n={len(self.busy)})")
            if minutes := self.config.checkpoint.every_minutes:
                print(f"    every {minutes:g} minutes: {100 * whole / (60 * minutes):.3f} % of the time")


def report_memory(config: Config) -> None:
    peaks = {}
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            peaks[way], n_parameters = pool.apply(peak_bytes, (config, way))
    for way in WAYS[1:]:
        more = peaks[way] - peaks[WAYS[0]]
        print(f"{way}: {more / 2**20:.0f} MiB more at the peak, {more / n_parameters:.2f} bytes per parameter")


def peak_bytes(config: Config, way: str) -> tuple[int, int]:
    """Bytes at the peak of a rank and of its writer, and the number of parameters; in a process of its own."""
    engine, step = make_engine(config)
    saver = saver_of(engine, config, asynchronous=way == "asynchronous")
    if way != "no save":
        for number in (1, 2):
            save(saver, number)
            step()
            saver.wait()
    writer = sum(_high_water_mark(child.pid) for child in psutil.Process().children())
    saver.close()
    return _high_water_mark("self") + writer, sum(p.numel() for p in engine.student.parameters())


def _high_water_mark(pid: int | str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status[status.index("VmHWM:") :].split()[1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("config", help="a training configuration; its teacher and its data are not read")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each way")
    parser.add_argument("--folder", type=Path, default=Path(), help="on whose disk the checkpoints are written")
    parser.add_argument("--memory", action="store_true", help="measure the peak of memory too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
