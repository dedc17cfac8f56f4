"""From a training run to folders that other people's tools load.

    releases/NAME/
      dense/     a stock LlamaForCausalLM, or the class that fine-tuning began with: every weight written out
      packed/    a bit or two per binary weight; loads with fbitrain, or with trust_remote_code in plain torch
      gguf/      a file for llama.cpp (fbitrain.releasing.gguf)
      README.md  the model card; each format's folder has its own, with the paths as they are there
      remote_code.py, remote_layers.py  the code of packed, for a repository that is the whole release

All formats hold the same function: scales are rounded once (`fbitrain.model.packing`).
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from gguf import GGMLQuantizationType
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PretrainedConfig

from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_folder, fsync_tree, give_usual_mode, require_writable, write_json
from fbitrain.checkpoint_files import load_weights, trainer_state
from fbitrain.checkpoint_folders import find_latest
from fbitrain.checkpoint_marker import MARKER, damage_of_files, require_sound
from fbitrain.config import Config, load_config
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.fine_tune import lm_config_of
from fbitrain.loading.model_folder import DTYPES
from fbitrain.loading.pretrained_shape import kept_tokenizer
from fbitrain.loading.tokenizer_folder import pad_id, write_tokenizer
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.hf import REMOTE_CODE, ReleasedModel, copy_remote_code, empty_model, plain_weights
from fbitrain.model.phases import binary_share, unfinished_phase
from fbitrain.releasing.gguf import block_type, check_gguf, write_gguf
from fbitrain.releasing.model_card import Labels, Storage, Training, heldout_metrics, model_card

FORMATS = ("dense", "packed", "gguf")
DEFAULT_FORMATS = ("dense", "packed")
CARD = "README.md"
UNLABELED = Labels()
OWN_FILES = (CARD, *(file.name for file in REMOTE_CODE))  # what a release has beside its formats


def release(
    run: Path,
    out: Path,
    formats: Sequence[str] = DEFAULT_FORMATS,
    dtype: str = "float16",
    labels: Labels = UNLABELED,
) -> Path:
    """Writes a run (its newest complete checkpoint) or one checkpoint to `out`; returns the checkpoint.

    formats: which of FORMATS. dtype: what the scales of binary layers, and all other weights, are rounded to.
    An older release at `out` is replaced, all its formats, once the new one is whole.
    Raises UserError for an unknown format or dtype, a format that the model does not have, a folder without checkpoint,
    a damaged checkpoint, weights that do not fit `dtype`, a disk that is full, and an `out` that is something else than
    a release.
    """
    for given, known, what in ((formats, FORMATS, "format"), ([dtype], DTYPES, "dtype")):
        if unknown := [name for name in given if name not in known] or not given:
            raise UserError(f"release {what} {unknown} is unknown; choose from {', '.join(known)}")
    require_replaceable(out)
    checkpoint = find_checkpoint(run)
    require_sound(checkpoint, damage_of_files(checkpoint))
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    config = load_config(checkpoint / "config.yaml", world_size=trainer["world_size"])
    lm_config = lm_config_of(checkpoint, config)
    _require_possible(run, formats, config.binarize, trainer["step"])
    if "gguf" in formats:
        check_gguf(run, lm_config, dtype)
    heldout = heldout_metrics(checkpoint.parent.parent, trainer["step"])
    training = Training(trainer["step"], trainer["tokens"], heldout)
    model = _released_model(lm_config, config.binarize, load_weights(checkpoint), dtype, trainer["step"])
    tokenizer = load_tokenizer(kept_tokenizer(checkpoint.parent.parent) or config.data.tokenizer)
    with replacing_release(out) as folder:
        write_release(folder, config, model, tokenizer, training, formats, dtype, labels)
    return checkpoint


def phase_of(checkpoint: Path) -> str:
    """What the model of a checkpoint is, as long as it is not binary yet (`unfinished_phase`); else empty."""
    return unfinished_phase(load_config(checkpoint / "config.yaml").binarize, trainer_state(checkpoint).step)


def _released_model(
    lm_config: PretrainedConfig, binarize: BinarizeConfig, weights: Mapping[str, Tensor], dtype: str, step: int
) -> ReleasedModel:
    """What `step` steps made of the model: in a phase before it is binary, one without binary layers."""
    if unfinished_phase(binarize, step):
        weights = plain_weights(empty_model(lm_config), binarize, weights, binary_share(binarize, step))
        binarize = replace(binarize, enabled=False)
    return ReleasedModel.of(lm_config, binarize, weights, DTYPES[dtype])


def _require_possible(run: Path, formats: Sequence[str], binarize: BinarizeConfig, step: int) -> None:
    if phase := unfinished_phase(binarize, step):
        _require_plain(run, formats, binarize, step, phase)
        return
    if not binarize.enabled and "packed" in formats:
        raise UserError(f"{run} has no binary weights (binarize.enabled=false) to pack; release it as dense only")
    if not binarize.enabled or set(formats) == {"packed"}:
        return
    if binarize.traits.routed:
        raise UserError(
            f"{run} mixes its scales anew for every token (binarize.method={binarize.method}), so there are no "
            "fixed weights to write out; release it as packed only"
        )
    if not binarize.has_fixed_weights:
        raise UserError(
            f"{run} norms every product (binarize.output_norm=true), so there are no fixed weights to write out; "
            "release it as packed only"
        )


def _require_plain(run: Path, formats: Sequence[str], binarize: BinarizeConfig, step: int, phase: str) -> None:
    one_bit = [
        name
        for name in formats
        if name == "packed" or (name == "gguf" and block_type(binarize) is not GGMLQuantizationType.F16)
    ]
    if one_bit:
        raise UserError(
            f"{run} is {phase}, so there are no bits to write as {' or '.join(one_bit)}; "
            "release it as dense only, or release a later checkpoint"
        )
    if not binarize.has_fixed_weights and binary_share(binarize, step) > 0:
        raise UserError(
            f"{run} is {phase}, and binarize.method={binarize.method} has no fixed weights to mix; "
            "release another checkpoint"
        )


def find_checkpoint(run: Path) -> Path:
    """`run` itself if it is a complete checkpoint, otherwise the newest one of the run in `run`."""
    if (run / MARKER).is_file():
        return run
    latest = find_latest(run)
    if latest is None:
        raise UserError(f"{run} holds no complete checkpoint; give a run folder such as runs/NAME, or a checkpoint")
    return latest


def write_release(
    folder: Path,
    config: Config,
    model: ReleasedModel,
    tokenizer: Tokenizer,
    training: Training,
    formats: Sequence[str],
    dtype: str,
    labels: Labels = UNLABELED,
) -> None:
    """Fills the existing `folder` with one folder per format and the model card; each format has a card of its own.

    The code of `packed` lies beside both cards, because transformers looks for it at the top of a repository: a format
    may be one, or the release as a whole.
    """
    places = {name: name for name in formats}
    for name in formats:
        target = folder / name
        target.mkdir()
        tensors = model.packed_tensors() if name == "packed" else model.dense_tensors()
        _refuse_non_finite(tensors, dtype)
        if name == "gguf":
            places[name] = f"{name}/{write_gguf(target, config, model, tensors, tokenizer).name}"
        elif name == "packed":
            copy_remote_code(target)
            copy_remote_code(folder)
            _write_model(target, config, model.packed_config, tensors, tokenizer, dtype)
        else:
            dense_config = deepcopy(model.config)
            dense_config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING[type(dense_config)].__name__]
            _write_model(target, config, dense_config, tensors, tokenizer, dtype)
    storage = Storage.of(model) if "packed" in formats else None
    # A format's own card is for that format alone, whose files lie beside it.
    own = {folder / name: {name: places[name].removeprefix(name).removeprefix("/")} for name in formats}
    for place, files in {folder: places, **own}.items():
        card = model_card(config, training, storage, files, dtype, model.config.model_type, labels)
        (place / CARD).write_text(card, encoding="utf-8")


def _write_model(
    folder: Path,
    config: Config,
    model_config: PretrainedConfig,
    tensors: dict[str, Tensor],
    tokenizer: Tokenizer,
    dtype: str,
) -> None:
    model_config.dtype = DTYPES[dtype]
    model_config.bos_token_id, model_config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    model_config.save_pretrained(folder)
    _add_older_rope(folder / "config.json")
    positions = getattr(model_config, "max_position_embeddings", None)
    write_tokenizer(tokenizer, folder, add_bos=config.data.add_bos, max_length=positions)
    # BOS and EOS only as far as training put them around its documents: a prompt is to look like one.
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_id if config.data.add_bos else None,
        eos_token_id=tokenizer.eos_id if config.data.add_eos else None,
        pad_token_id=pad_id(tokenizer),
    )
    generation.save_pretrained(folder)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})  # in shards of 5 GB
    for file in folder.glob("*.safetensors"):
        give_usual_mode(file)


def _add_older_rope(file: Path) -> None:
    """Names the rotary embedding's parameters where readers older than transformers 5 look for them too."""
    values = json.loads(file.read_text(encoding="utf-8"))
    rope = values.get("rope_parameters") or {}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
        write_json(file, values)


def _refuse_non_finite(tensors: Mapping[str, Tensor], dtype: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name} holds values that are not finite in {dtype}; choose dtype float32, and if that fails too, "
                "the training run has diverged: release an earlier checkpoint"
            )


def require_replaceable(out: Path) -> None:
    """Raises UserError if something is at `out` that is not a release, or if no folder can be made there."""
    if out.exists() and not is_release(out):
        raise UserError(f"{out} exists and is not a release, so it is not replaced; choose another folder")
    require_writable(out.with_name(f".{out.absolute().name}.unfinished") / CARD, "--out", makes_folders=True)


@contextmanager
def replacing_release(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside `out` that takes its name at the end; on an error it is removed, `out` untouched.

    Files that somebody put beside an older release's formats, such as evaluations, are taken over.
    Raises UserError if `out` is there and is not a release, or cannot be written.
    """
    out = out.absolute()
    unfinished, old = (out.with_name(f".{out.name}.{state}") for state in ("unfinished", "old"))
    if old.exists() and not out.exists():  # a crash between the two renames below
        old.rename(out)
    require_replaceable(out)
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in out.iterdir() if out.exists() else ():
            if file.is_file() and file.name not in OWN_FILES:
                shutil.copy2(file, unfinished)
        fsync_tree(unfinished)
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        unfinished.rename(out)
        fsync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(_explain(error, out)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def is_release(path: Path) -> bool:
    """Whether `path` is a folder that may be replaced: its only folders are formats, or there is nothing in it."""
    if not path.is_dir():
        return False
    folders = [child for child in path.iterdir() if child.is_dir()]
    marks = {"gguf": "*.gguf"}
    formats = [f for f in folders if f.name in FORMATS and any(f.glob(marks.get(f.name, "config.json")))]
    return len(formats) == len(folders) and (bool(formats) or not any(path.iterdir()))


def _explain(error: Exception, out: Path) -> str:
    # safetensors wraps the operating system's error in its own text.
    full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else str(error)
    return f"the release could not be written to {out}: {reason}; what was there before is untouched"
