"""From a training run to folders that other people's tools load.

    releases/NAME/
      dense/     a stock LlamaForCausalLM, or the class that fine-tuning began with: every weight written out
      packed/    one bit per binary weight; loads with fbitrain, or with trust_remote_code in plain torch
      README.md  the model card, also in each format's folder

Both formats hold the same function: the scales are rounded once (`fbitrain.model.hf.Levels`).
"""

from __future__ import annotations

import copy
import errno
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig

from fbitrain.checkpoint import find_latest
from fbitrain.checkpoint_files import load_weights
from fbitrain.config import Config, load_config
from fbitrain.errors import UserError
from fbitrain.files import fsync_folder, fsync_tree
from fbitrain.fine_tune import lm_config_of, static_weights
from fbitrain.model.hf import REMOTE_CODE, dense_tensors, packed_config, packed_tensors
from fbitrain.model_card import Storage, Training, heldout_metrics, model_card
from fbitrain.pretrained import DTYPES
from fbitrain.release_tokenizer import tokenizer_source, write_tokenizer

FORMATS = ("dense", "packed")
CARD = "README.md"


def release(source: Path, out: Path, formats: Sequence[str] = FORMATS, dtype: str = "float16") -> Path:
    """Writes a run (its newest complete checkpoint) or one checkpoint to `out`; returns the checkpoint.

    formats: which of FORMATS. dtype: what the two levels of each binary layer, and all other weights, are rounded to.
    An older release at `out` is replaced, all its formats, once the new one is whole.
    Raises UserError for an unknown format or dtype, a source without checkpoint, weights that do not fit `dtype`, a
    disk that is full, and an `out` that is something else than a release.
    """
    for given, known, what in ((formats, FORMATS, "format"), ([dtype], DTYPES, "dtype")):
        if unknown := [name for name in given if name not in known] or not given:
            raise UserError(f"release {what} {unknown} is unknown; choose from {', '.join(known)}")
    checkpoint = find_checkpoint(source)
    trainer = json.loads((checkpoint / "trainer.json").read_text())
    config = load_config(checkpoint / "config.yaml", world_size=trainer["world_size"])
    lm_config = lm_config_of(checkpoint, config)
    plain = _is_plain_binary_llama(config, lm_config)
    if "packed" in formats:
        _require_packable(source, config, plain)
    heldout = heldout_metrics(checkpoint.parent.parent, trainer["step"])
    training = Training(trainer["step"], trainer["tokens"], heldout)
    weights = load_weights(checkpoint)
    if config.binarize.enabled and not plain:
        weights = static_weights(checkpoint, config, weights)
    with replacing_release(out) as folder:
        write_release(folder, config, weights, training, formats, dtype, lm_config)
    return checkpoint


def _is_plain_binary_llama(config: Config, lm_config: PretrainedConfig) -> bool:
    """Whether the weights are what fbitrain.model.hf writes from their signs, α and β alone."""
    biased = getattr(lm_config, "attention_bias", False) or getattr(lm_config, "mlp_bias", False)
    return config.binarize.method == "binary" and lm_config.model_type == "llama" and not biased


def _require_packable(source: Path, config: Config, plain: bool) -> None:
    if not config.binarize.enabled:
        raise UserError(f"{source} has no binary weights (binarize.enabled=false) to pack; release it as dense only")
    if not plain:
        raise UserError(
            f"{source} cannot be packed: packed folders hold Llamas of binarize.method=binary, not "
            f"{config.binarize.method} layers or other architectures; release it as dense only"
        )


def find_checkpoint(source: Path) -> Path:
    """`source` itself if it is a complete checkpoint, otherwise the newest one of the run in `source`."""
    if (source / "COMPLETE.json").is_file():
        return source
    latest = find_latest(source)
    if latest is None:
        raise UserError(f"{source} holds no complete checkpoint; give a run folder such as runs/NAME, or a checkpoint")
    return latest


def write_release(
    folder: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    training: Training,
    formats: Sequence[str],
    dtype: str,
    lm_config: PretrainedConfig,
) -> None:
    """Fills the existing `folder` with one folder per format and the model card, from a run's fp32 state dict."""
    if config.model.tie_embeddings:  # the head is the embedding; files hold it once
        weights = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    storage = None
    for name in formats:
        target = folder / name
        target.mkdir()
        model_config = copy.deepcopy(lm_config)
        if name == "packed":
            tensors = packed_tensors(weights, DTYPES[dtype])
            storage = Storage.of(weights, tensors)
            model_config = packed_config(model_config, config.binarize, storage.bits_per_binary_weight)
            shutil.copy(REMOTE_CODE, target)
        else:
            tensors = dense_tensors(weights, DTYPES[dtype])
            model_config.architectures = model_config.architectures or ["LlamaForCausalLM"]
        _refuse_non_finite(tensors, dtype)
        model_config.dtype = DTYPES[dtype]
        _write_model(target, config, model_config, tensors)
    card = model_card(config, training, storage, formats, dtype)
    for place in (folder, *(folder / name for name in formats)):
        (place / CARD).write_text(card, encoding="utf-8")


def _write_model(folder: Path, config: Config, model_config: PretrainedConfig, tensors: dict[str, Tensor]) -> None:
    tokenizer = write_tokenizer(tokenizer_source(config), folder)
    model_config.bos_token_id, model_config.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
    if not config.model.pretrained:
        model_config.rope_theta = config.model.rope_theta  # where readers older than transformers 5 look for it
    model_config.save_pretrained(folder)
    # BOS and EOS only as far as training put them around its documents: a prompt is to look like one.
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_id if config.data.add_bos else None,
        eos_token_id=tokenizer.eos_id if config.data.add_eos else None,
    )
    generation.save_pretrained(folder)
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})  # in shards of 5 GB
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def _refuse_non_finite(tensors: Mapping[str, Tensor], dtype: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"{name} holds values that are not finite in {dtype}; choose dtype float32, and if that fails too, "
                "the training run has diverged: release an earlier checkpoint"
            )


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
    if out.exists() and not is_release(out):
        raise UserError(f"{out} exists and is not a release, so it is not replaced; choose another folder")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        yield unfinished
        for file in out.iterdir() if out.exists() else ():
            if file.is_file() and file.name != CARD:
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
    formats = [child for child in folders if child.name in FORMATS and (child / "config.json").is_file()]
    return len(formats) == len(folders) and (bool(formats) or not any(path.iterdir()))


def _explain(error: Exception, out: Path) -> str:
    # safetensors wraps the operating system's error in its own text.
    full = "No space left" in str(error) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else str(error)
    return f"the release could not be written to {out}: {reason}; what was there before is untouched"
