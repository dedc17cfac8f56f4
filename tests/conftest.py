"""Shared by all tests: a tiny teacher with a tokenizer, tiny shards, and real DeepSpeed launches."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import setuptools  # noqa: F401 - replaces distutils; imported after it, as torch.compile would, it refuses to

# ./test.sh draws the same 50 examples every time, ./test.sh --all 500 new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, max_examples=50)
hypothesis.settings.register_profile("nightly", max_examples=500, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

ROOT = Path(__file__).resolve().parents[1]
WORDS = [
    *("the", "model", "learns", "one", "bit", "per", "weight", "from", "a", "teacher", "that", "knows", "more"),
    *("and", "says", "how", "sure", "it", "is", "of", "each", "token"),
]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@dataclass(frozen=True)
class Workspace:
    """A folder with everything a run needs: config.yaml, teacher/, shards/, heldout.jsonl."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def teacher(self) -> Path:
        return self.path / "teacher"


@dataclass
class Launched:
    """A launch that has ended, or, from `start`, one that is still going."""

    run_dir: Path
    process: subprocess.Popen[str]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def losses(self) -> dict[int, float]:
        return {line["step"]: line["train/loss"] for line in self.metrics if "train/loss" in line}

    def batches(self, rank: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / f"batches_rank{rank:05d}.jsonl").read_text().splitlines()]

    def wait(self, timeout: float = 180.0) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            pytest.fail(f"the launch did not end within {timeout} s:\n{self.output[-3000:]}")

    def signal(self, number: int) -> None:
        """To the launcher and all ranks at once: `deepspeed` alone would leave them behind as orphans."""
        os.killpg(self.process.pid, number)

    def kill_all(self) -> None:
        """Ends every process of the launch that is left."""
        with suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)
        self.process.wait()

    def wait_for_all(self, timeout: float = 120.0) -> None:
        """Until no process of the launch is left; the launcher itself may be gone long before its ranks."""
        self.process.wait(timeout)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            try:
                os.killpg(self.process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
        pytest.fail(f"ranks are still there after {timeout} s:\n{self.output[-3000:]}")

    def wait_for(self, condition: Callable[[], bool], timeout: float = 120.0) -> None:
        """Polls until `condition` holds; fails the test if the launch ends first."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.signal(signal.SIGKILL) if self.process.poll() is None else None
                pytest.fail(f"the launch ended or took too long before the condition held:\n{self.output[-3000:]}")
            time.sleep(0.05)


class Launcher:
    """Starts `deepspeed launch/pretrain.py` as a user would; the working directory is outside the source tree."""

    def __init__(self, workspace: Workspace, scratch: Path) -> None:
        self._workspace = workspace
        self._scratch = scratch
        self.runs = scratch / "runs"  # where run folders are, unless a launch asks for another place
        self._running: list[Launched] = []

    def start(
        self,
        name: str,
        *overrides: str,
        ranks: int = 2,
        script: Path | None = None,
        env: dict[str, str] | None = None,
        deepspeed: bool = False,
        launcher_options: tuple[str, ...] = (),
        runs: Path | None = None,
        port: int | None = None,
        config: Path | None = None,
    ) -> Launched:
        """Starts a launch. Most tests spawn the ranks directly, which saves two imports of torch; with `deepspeed` the
        real launcher does it, on `ranks` local ranks or as `launcher_options` say."""
        runs = runs or self.runs
        log = self._scratch / f"{name}-{len(self._running)}.log"
        port = port or free_port()
        if deepspeed or launcher_options:
            local = launcher_options or ("--num_accelerators", str(ranks))
            launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--master_port", str(port), *local]
        else:
            launcher = [sys.executable, str(ROOT / "tests" / "launch" / "spawn_ranks.py"), str(ranks), str(port)]
        pretrain = script or ROOT / "launch" / "pretrain.py"
        options = (f"run.dir={runs}", f"run.name={name}", *overrides)
        command = [*launcher, str(pretrain), str(config or self._workspace.config), *options]
        # The launcher looks for its own helpers on PATH.
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with log.open("w") as out:
            process = subprocess.Popen(
                command,
                cwd=self._workspace.path,
                env={**os.environ, "PATH": path, "PYTHONWARNINGS": "ignore::FutureWarning", **(env or {})},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        launched = Launched(runs / name, process, log)
        self._running.append(launched)
        return launched

    def __call__(self, name: str, *overrides: str, expect: int | None = 0, **options: Any) -> Launched:
        launched = self.start(name, *overrides, **options)
        code = launched.wait()
        if expect is not None:
            assert code == expect, f"exit code {code} instead of {expect}:\n{launched.output[-4000:]}"
        return launched

    @staticmethod
    def free_port() -> int:
        return free_port()

    def stop_all(self) -> None:
        for launched in self._running:
            launched.kill_all()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Sizes are awkward on purpose: widths that are no multiple of 32, parameters that no rank count divides."""
    path = tmp_path_factory.mktemp("workspace")
    vocab_size = write_teacher(path / "teacher")
    generator = random.Random(0)
    for source in ("alpha", "beta"):
        (path / "shards" / source).mkdir(parents=True)
        for shard in range(3):
            write_shard(path / "shards" / source / f"{shard}.jsonl", generator, 40)
    write_shard(path / "heldout.jsonl", generator, 12)
    (path / "config.yaml").write_text(
        f"""
model: {{vocab_size: {vocab_size}, n_layers: 2, n_heads: 2, d_model: 60, d_ff: 92, max_seq_len: 64}}
distill: {{teacher: {path}/teacher, chunk_tokens: 20}}
data:
  sources:
    - {{name: alpha, paths: [{path}/shards/alpha], weight: 2}}
    - {{name: beta, paths: [{path}/shards/beta], weight: 1}}
  heldout: [{path}/heldout.jsonl]
  seq_len: 24
  n_lanes: 4
  n_workers: 0
optim: {{lr: 5e-3, min_lr: 5e-4, warmup_steps: 2}}
train: {{total_steps: 6, micro_batch_size: 1, global_batch_tokens: 192}}
engine: {{precision: fp32, threads_per_rank: 1, comm_timeout_s: 60}}
checkpoint: {{every: 3, keep: 0}}
metrics: {{every: 1}}
eval: {{every: 3, max_tokens: 480, prompts: ["the model"], sample_tokens: 4}}
debug: {{log_batches: true}}
"""
    )
    return Workspace(path)


def write_teacher(folder: Path) -> int:
    """A random Llama with a byte-level BPE tokenizer trained on a few words; returns the vocabulary's size."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(WORDS * 20, vocab_size=301, special_tokens=["<s>", "</s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return len(tokenizer)


def write_shard(path: Path, generator: random.Random, n_documents: int) -> None:
    with path.open("w") as out:
        for i in range(n_documents):
            text = " ".join(generator.choices(WORDS, k=generator.randint(3, 60)))
            out.write(json.dumps({"text": f"{path.stem}-{i} {text}", "meta": {"i": i}}) + "\n")


@pytest.fixture(scope="module")
def launch(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(workspace, tmp_path_factory.mktemp("launches"))
    yield launcher
    launcher.stop_all()
