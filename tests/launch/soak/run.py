"""The run that is disturbed: its supervisor, what it logged, and the steps and documents that count in the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from tests.launch.soak.network import SHELL, Network

ROOT = Path(__file__).resolve().parents[3]
EVERY = 20  # steps from one checkpoint to the next
SLOW_DISK = Path(__file__).with_name("slow_disk")
OPTIONS = [*("--restarts", "8", "--backoff", "1"), *("--silence", "12", "--connect", "12", "--grace", "60")]


class SoakRun:
    """`fbitrain run` on the nodes of a network, or on two ranks of this machine where there is none."""

    def __init__(self, folder: Path, name: str, settings: list[str], network: Network | None = None) -> None:
        self.run_dir, self.log = folder / "runs" / name, folder / f"{name}.log"
        self.slow_disk = folder / "disk-is-slow"
        self._settings = [f"run.dir={folder / 'runs'}", f"run.name={name}", *settings]
        self._where = ["--ranks", "2"]
        if network:
            hosts = folder / "hostfile"
            hosts.write_text("".join(f"{node.address} slots=1\n" for node in network.nodes))
            self._where = ["--hostfile", str(hosts), "--ssh", f"{sys.executable} {SHELL} connect"]
        self._interface = {"GLOO_SOCKET_IFNAME": "eth0"} if network else {}
        self._folder = folder
        self._n_failed = 0
        self.lines_before: list[dict[str, int]] = []  # of the document logs, where each attempt but the first began
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Starts the command, or starts it again."""
        words = [*OPTIONS, *self._where, "--", "pretrain", str(self._folder / "config.yaml"), *self._settings]
        path = os.pathsep.join([str(SLOW_DISK), str(ROOT), os.environ.get("PYTHONPATH", "")])
        with self.log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fbitrain", "run", *words],
                cwd=self._folder,
                env={
                    **os.environ,
                    **self._interface,
                    **{"PYTHONPATH": path, "FBITRAIN_SOAK_SLOW_DISK": str(self.slow_disk), "DS_ACCELERATOR": "cpu"},
                    **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                },
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def failures(self) -> list[str]:
        """Why attempts failed, in their order."""
        return re.findall(r"^fbitrain run: attempt \d+ failed at .*? ranks: (.*)$", self.output, re.MULTILINE)

    def ranks(self) -> dict[int, int]:
        """Process -> rank, of those that run."""
        found = {}
        wanted = f"run.name={self.run_dir.name}".encode()
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and wanted in (folder / "cmdline").read_bytes().split(b"\0"):
                    environ = dict(w.partition(b"=")[::2] for w in (folder / "environ").read_bytes().split(b"\0"))
                    if b"RANK" in environ:
                        found[int(folder.name)] = int(environ[b"RANK"])
            except OSError:
                continue
        return found

    def step(self) -> int:
        """The last step that the attempt which runs has logged; 0 where there is none."""
        while len(self.failures()) > self._n_failed:
            self._n_failed += 1
            self.note_attempt()
        name = "documents_rank00000.jsonl"
        begun = self.lines_before[-1].get(name, 0) if self.lines_before else 0
        path = self.run_dir / name
        lines = path.read_bytes().split(b"\n")[:-1][begun:] if path.exists() else []
        return next((int(json.loads(line)["step"]) for line in reversed(lines) if line.endswith(b"}")), 0)

    def note_attempt(self) -> None:
        """An attempt is over, and none of its ranks is left: what is logged from here on is the next one's."""
        self.lines_before.append({path.name: path.read_bytes().count(b"\n") for path in self._document_logs()})

    def _document_logs(self) -> list[Path]:
        return sorted(self.run_dir.glob("documents_rank*.jsonl"))

    def _logged(self, name: str, start: int, stop: int | None = None) -> list[dict[str, Any]]:
        path = self.run_dir / name
        lines = path.read_bytes().split(b"\n")[:-1][start:stop] if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith(b"}")]  # a full disk may have cut one short

    def attempts(self) -> list[dict[int, list[str]]]:
        """Of each attempt, the documents that begin in each of its steps, over all its ranks."""
        found: list[dict[int, list[str]]] = []
        borders = [{}, *self.lines_before, None]
        for before, after in pairwise(borders):
            steps: dict[int, list[str]] = {}
            for path in self._document_logs():
                stop = None if after is None else after.get(path.name, 0)
                for line in self._logged(path.name, before.get(path.name, 0), stop):
                    steps.setdefault(line["step"], []).extend(line["documents"])
            found.append(steps)
        return found

    def documents(self) -> dict[int, Counter[str]]:
        """What each step was trained on in the end: as in the last attempt that made it."""
        found: dict[int, Counter[str]] = {}
        for steps in self.attempts():
            found |= {step: Counter(names) for step, names in steps.items()}
        return found

    def losses(self) -> dict[int, float]:
        lines = map(json.loads, (self.run_dir / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s\n{self.output[-3000:]}"
            time.sleep(0.1)

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
