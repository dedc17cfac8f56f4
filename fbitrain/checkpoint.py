"""Save and resume as a transaction.

A checkpoint holds the fp32 weights and the optimizer's state as flat slices of named parameters, so that any number of
ranks under any ZeRO stage can read what any other wrote. A folder counts only once COMPLETE.json, its last, is in it.

    step_00000200/
      shard_rank00000.safetensors   slices this rank owned: "kind|parameter|start" -> fp32 [n]; kinds are weight, and
                                    exp_avg and exp_avg_sq of AdamW or momentum of Muon
      fixed.safetensors             what training does not change: buffers and frozen parameters, if there are any
      lm_config.json                transformers' configuration of a fine-tuned model
      data_rank00000.json           where this rank's stream stands
      trainer.json                  step, tokens, and each parameter's shape
      data_shards.json              the shards that the streams read
      config.yaml                   the resolved configuration
      COMPLETE.json                 every file's size; a shard's checksums are in its own metadata
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_file, fsync_folder, fsync_tree, write_json, write_text
from fbitrain.checkpoint_files import FIXED, LM_CONFIG, ShardReader, checksum, damage
from fbitrain.config import Config, differences, load_config, to_yaml
from fbitrain.model.phases import binary_share

if TYPE_CHECKING:
    from fbitrain.data.sources.fingerprint import ShardList
    from fbitrain.engine import Engine

FORMAT = 2
NETWORK_DISK_SECONDS = 20.0  # for one rank to see what another has written
_NAME = re.compile(r"step_(\d{8})")

# Keys that may differ between a checkpoint and the run that resumes it. The rest decides what the numbers mean.
_FREE_SECTIONS = ("run.", "engine.", "checkpoint.", "metrics.", "eval.", "debug.", "optim.", "distill.")
# The stream itself compares sources by their shards' names and sizes and tokenizers by what they do, wherever they lie.
_FREE_KEYS = (
    "train.",
    "data.n_workers",
    "data.max_bad_records",
    "data.heldout",
    "data.sources",
    "data.phases",
    "data.pretokenized",
    "data.duplicates",
    "data.cache_",
    "data.tokenizer",
    "model.preset",
)

# May differ, too, while a run is in full precision under the old values and the new.
PHASE_KEYS = ("binarize.from_step", "binarize.anneal_steps")


@dataclass(frozen=True)
class TrainerState:
    """What the loop itself has to remember."""

    step: int = 0
    tokens: int = 0  # seen by the student, over all ranks


def step_folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """The run's complete checkpoints, oldest first."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return sorted(f for f in folders if _NAME.fullmatch(f.name) and (f / "COMPLETE.json").is_file())


def find_latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(reversed(complete_checkpoints(run_dir)), None)


# -- saving -----------------------------------------------------------------------------------------------------------


def save(engine: Engine, config: Config, state: TrainerState, data_state: Mapping[str, Any], shards: ShardList) -> Path:
    """Writes the checkpoint of `state.step` and removes old ones beyond checkpoint.keep. Every rank calls it.

    Raises UserError on all ranks, with older checkpoints untouched, when any rank cannot write.
    """
    final = step_folder(config.run_dir, state.step)
    folder = final.with_name(final.name + ".tmp")
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    _all_or_nothing(lambda: _write_shard(folder, rank, engine, data_state), folder)
    fixed = engine.fixed_tensors()
    _all_or_nothing(lambda: _finish(folder, final, engine, config, state, shards, fixed) if rank == 0 else None, folder)
    return final


def _write_shard(folder: Path, rank: int, engine: Engine, data_state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"shard_rank{rank:05d}"
    _write_tensors(folder / f"{name}.safetensors", dict(_tensors(engine)))
    write_json(folder / f"data_rank{rank:05d}.json", data_state)
    fsync_tree(folder, only=name)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    sums = {key: checksum(tensor) for key, tensor in tensors.items()}
    save_file(dict(tensors), path, metadata={"checksums": json.dumps(sums)})


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
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    write_json(folder / "COMPLETE.json", {"format": FORMAT, "step": state.step, "files": sizes})
    fsync_folder(folder)
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
        # The marker goes first: a removal that is interrupted must not leave a folder that looks whole.
        (checkpoint / "COMPLETE.json").unlink()
        shutil.rmtree(checkpoint)
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


# -- resuming ---------------------------------------------------------------------------------------------------------


def choose(config: Config) -> Path | None:
    """The checkpoint folder that `train.resume` asks for, checked to be whole; None to start anew.

    Raises UserError for a named checkpoint that is missing, incomplete or damaged. With `auto`, a damaged one is
    reported and the one before it is taken.
    """
    wish = config.train.resume
    if wish == "never":
        if find_latest(config.run_dir):
            raise UserError(
                f"{config.run_dir} already holds checkpoints and train.resume=never would overwrite them; "
                "choose another run.name, remove the folder, or resume with train.resume=auto"
            )
        return None
    if wish != "auto":
        folder = Path(wish)
        if not (folder / "COMPLETE.json").is_file():
            raise UserError(f"train.resume={wish} is not a complete checkpoint: it has no COMPLETE.json")
        if fault := damage(folder):
            raise UserError(f"train.resume={wish} is damaged: {fault}; choose another checkpoint")
        return folder
    found = complete_checkpoints(config.run_dir)
    for folder in reversed(found):
        fault = damage(folder)
        if not fault:
            return folder
        print(f"warning: {folder} is damaged ({fault}); trying the checkpoint before it", flush=True)
    if found:
        raise UserError(f"every checkpoint of {config.run_dir} is damaged; choose another run.name, or remove them")
    return None


def abandon_newer(run_dir: Path, step: int) -> None:
    """Renames the run's checkpoints after `step`: they are of a history that a run from `step` on leaves behind."""
    for folder in complete_checkpoints(run_dir):
        if step_of(folder) > step:
            aside = folder.with_name(f"{folder.name}.abandoned")
            while aside.exists():
                aside = aside.with_name(f"{aside.name}+")
            folder.rename(aside)
            print(f"renamed {folder} to {aside.name}: this run goes on from step {step}", flush=True)


def load(engine: Engine, folder: Path, on_change: str) -> str:
    """Reads this rank's slices of weights and optimizer state; `engine.shards.changed` then makes them count.

    Parameters whose optimizer state is not in the checkpoint, because another optimizer wrote it, are refused, or with
    on_change=restart begin with none; returns a sentence on those, the same on every rank.

    Raises UserError if the checkpoint does not hold a parameter of this model.
    """
    reader = ShardReader(folder)
    fresh = [
        name for name, kinds in engine.shards.state_kinds().items() if not all(reader.holds(k, name) for k in kinds)
    ]
    of_whom = f"{len(fresh)} parameters, {fresh[0]} among them" if fresh else ""
    if fresh and on_change == "refuse":
        raise UserError(
            f"{folder} was written by another optimizer and holds no state of this one for {of_whom}; "
            "restore optim.optimizer, or set optim.on_change=restart to begin their state anew"
        )
    saved = json.loads((folder / "trainer.json").read_text())
    engine.shards.state_starts = saved.get("state_starts", {})
    engine.shards.begin_state_anew(fresh, saved["step"])
    for fragment in engine.shards.fragments(everything_local=True):
        reader.read_into(fragment.weight, "weight", fragment.name, fragment.start)
        for kind, values in fragment.state.items() if fragment.name not in fresh else ():
            reader.read_into(values, kind, fragment.name, fragment.start)
    return f"the optimizer's state of {of_whom}, begins anew: another optimizer wrote the checkpoint" if fresh else ""


def trainer_state(folder: Path) -> TrainerState:
    """The loop's state at a complete checkpoint."""
    saved = json.loads((folder / "trainer.json").read_text())
    return TrainerState(saved["step"], saved["tokens"])


def data_states(folder: Path) -> tuple[list[dict[str, Any]], ShardList]:
    """Where the streams of all the ranks that saved stood, and the shards they read."""
    states = [json.loads(path.read_text()) for path in sorted(folder.glob("data_rank*.json"))]
    return states, json.loads((folder / "data_shards.json").read_text())


def require_same_config(folder: Path, new: Config) -> str:
    """Compares the checkpoint's configuration with `new`; returns a sentence on allowed differences worth saying.

    Raises UserError naming the keys that differ and decide what weights and stream mean.
    """
    trainer = json.loads((folder / "trainer.json").read_text())
    step, old = trainer["step"], load_config(folder / "config.yaml", world_size=trainer["world_size"])
    changed = differences(old, new)
    forbidden = {k: v for k, v in changed.items() if not k.startswith((*_FREE_SECTIONS, *_FREE_KEYS))}
    if binary_share(old.binarize, step) == 0 == binary_share(new.binarize, step):
        forbidden = {k: v for k, v in forbidden.items() if k not in PHASE_KEYS}
    if forbidden:
        listed = ", ".join(f"{key} ({was!r} there, {now!r} here)" for key, (was, now) in forbidden.items())
        if not forbidden.keys().isdisjoint(PHASE_KEYS):
            listed += ", and they may change only before binarization begins"
        raise UserError(
            f"{folder} belongs to another configuration: {listed}; restore these values or choose another run.name"
        )
    told = ("optim.", "distill.", "train.", *PHASE_KEYS)
    worth_saying = [k for k in changed if k.startswith(told) and k != "train.resume"]
    listed = ", ".join(f"{key} {changed[key][0]!r} -> {changed[key][1]!r}" for key in worth_saying)
    return f"resuming with changed settings: {listed}" if listed else ""


def discard_unfinished(run_dir: Path) -> Iterable[Path]:
    """Removes what interrupted saves and removals left behind; returns what it removed. Rank 0 only."""
    for folder in (run_dir / "checkpoints").glob("step_*"):
        if not (folder / "COMPLETE.json").is_file() or folder.name.endswith(".tmp"):
            shutil.rmtree(folder)
            yield folder
