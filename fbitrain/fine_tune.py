"""What fine-tuning starts from: a pretrained model with its Linears made binary, or a checkpoint of that.

Salient weights are chosen, and PTQ solves its layers, once: right before the first step. A checkpoint holds the result,
and a run that resumes takes it from there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.calibration.block_walk import weight_NK
from fbitrain.calibration.calibrate import quantize_, select_masks
from fbitrain.checkpoint_files import fixed_tensors, load_weights, trainer_state
from fbitrain.checkpoint_folders import find_latest
from fbitrain.checkpoint_marker import LM_CONFIG, MARKER, damage_of_files, require_sound
from fbitrain.config import Config, ConfigError, load_config
from fbitrain.config_checks import semantic_problems
from fbitrain.loading.language_model import checked_head, load_language_model, read_hf_config, trial_tokens
from fbitrain.loading.pretrained_shape import SIZES, run_config, shape_of
from fbitrain.model.build import BinarizeReport, binarize_, chosen_linears, llama_config
from fbitrain.model.config import BinarizeConfig, settings_read
from fbitrain.model.direct_reads import check_direct_reads
from fbitrain.model.hf import plain_weights
from fbitrain.model.partial import PartialBinaryLinear, unpack_mask
from fbitrain.model.phases import binary_share, has_phases, unfinished_phase

ROLE = "model.pretrained"  # what messages call the model


def with_known_sizes(config: Config, world_size: int) -> Config:
    """`config` with the sizes of a model on the hub, which only its config.json knows, filled in and checked.

    Raises ConfigError if they contradict other settings.
    """
    pretrained = config.model.pretrained
    if not pretrained or all(getattr(config.model, name) for name in SIZES if name != "n_kv_heads"):
        return config
    values = {} if run_config(Path(pretrained)) or Path(pretrained).is_file() else read_hf_config(pretrained, ROLE)
    sizes: dict[str, Any] = dict(shape_of(values))
    config = replace(config, model=replace(config.model, **sizes))
    if problems := list(semantic_problems(config, world_size)):
        raise ConfigError(pretrained, problems)
    return config


def needs_calibration(config: Config) -> bool:
    """Whether work is done before the first step that must not be lost: choosing salient weights, or PTQ."""
    return bool(config.model.pretrained) and config.binarize.enabled and bool(config.binarize.traits.salient)


def fine_tuned_student(
    config: Config, resume_from: Path | None, token_ids: Tensor | None, device: torch.device
) -> tuple[PreTrainedModel, BinarizeReport]:
    """The fp32 model to train, binary layers in place: from `resume_from` (its trained weights are filled in later),
    or from model.pretrained.

    token_ids: `calibration.text.calibration_ids`, where a start from model.pretrained `needs_text`.

    Raises UserError if the model cannot be had, has other logits than hidden · headᵀ, or is binary in another way.
    """
    if resume_from is not None:
        return _from_checkpoint(resume_from, config, fixed_tensors(resume_from))
    origin = own_checkpoint(config.model.pretrained)
    if origin is None:
        lm = load_language_model(config.model.pretrained, torch.float32, role=ROLE)
    else:
        saved = load_config(origin / "config.yaml").binarize
        if _is_binary(origin, saved, config.binarize):
            return _from_checkpoint(origin, config, load_weights(origin))
        lm, weights = _bare_model(origin), load_weights(origin)
        if saved.enabled:
            weights = plain_weights(lm, saved, weights)
        lm.load_state_dict(weights, strict=False)  # a tied head is there once
    checked_head(lm, config.model.pretrained, ROLE)
    return _binarized(lm.to(device).eval(), config, token_ids)


def lm_config_of(checkpoint: Path, config: Config) -> PretrainedConfig:
    """The transformers configuration of the model in a checkpoint of ours, whose own configuration is `config`."""
    if not (checkpoint / LM_CONFIG).is_file():
        return llama_config(config.model)
    values = json.loads((checkpoint / LM_CONFIG).read_text(encoding="utf-8"))
    return AutoConfig.for_model(values.pop("model_type"), **values)


def own_checkpoint(pretrained: str) -> Path | None:
    """The checkpoint that `pretrained` names, itself or as its run's newest; None if it is no run of ours.

    Raises UserError for a run without checkpoint, and for a checkpoint whose files, but for its tensors, are damaged.
    """
    folder = Path(pretrained).expanduser()
    if run_config(folder) is None:
        return None
    checkpoint = folder if (folder / MARKER).is_file() else find_latest(folder)
    if checkpoint is None:
        raise UserError(f"{ROLE}={pretrained} is a run without a complete checkpoint; train it first")
    require_sound(checkpoint, damage_of_files(checkpoint))
    return checkpoint


def _binarized(lm: PreTrainedModel, config: Config, token_ids: Tensor | None) -> tuple[PreTrainedModel, BinarizeReport]:
    binarize, calibration = config.binarize, config.calibration
    if binarize.enabled:
        _check_direct_reads(lm, binarize)
    masks, solved = None, {}
    if needs_calibration(config):
        if calibration.ptq:
            solved = quantize_(lm, binarize, calibration, token_ids)
            masks = {name: part.mask for name, part in solved.items()}
        else:
            masks = select_masks(lm, binarize, token_ids, damping=calibration.damping)
    report = _binarize(lm, config, masks)
    for name, part in solved.items():
        if part.codes is not None and part.scale is not None:
            layer = lm.get_submodule(name)
            assert isinstance(layer, PartialBinaryLinear)
            layer.load_salient(part.codes, part.scale)
    return lm.train(), report


@torch.no_grad()
def _check_direct_reads(lm: PreTrainedModel, binarize: BinarizeConfig) -> None:
    """Some architectures take another path in training than in evaluation; both are tried, the last is evaluation."""
    token_ids = trial_tokens(lm.device)
    linears = chosen_linears(lm, binarize)
    for training in (True, False):
        lm.train(training)
        check_direct_reads(linears, lambda: lm(input_ids=token_ids, use_cache=False))


def _from_checkpoint(
    folder: Path, config: Config, tensors: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, BinarizeReport]:
    """The checkpoint's model with its masks and with `tensors`, which may be a part of its state."""
    lm = _bare_model(folder)
    masks = None
    if needs_calibration(config):
        masks = {  # before the layers are there: what a mask marks is known from the Linear in its place
            name: unpack_mask(tensors[f"{name}.salient_bits"], weight_NK(module).shape[1])
            for name, module in lm.named_modules()
            if f"{name}.salient_bits" in tensors
        }
    report = _binarize(lm, config, masks)
    if foreign := lm.load_state_dict(tensors, strict=False).unexpected_keys:
        raise UserError(f"{folder} holds {foreign[0]}, which its model has not; it is not of this version of fbitrain")
    return lm.train(), report


def _binarize(lm: PreTrainedModel, config: Config, masks: Mapping[str, Tensor] | None) -> BinarizeReport:
    """binarize_ with routers drawn by train.seed, whatever was drawn before; torch's own state is left alone."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(config.train.seed)
        return binarize_(lm, config.binarize, masks=masks)


def _bare_model(folder: Path) -> PreTrainedModel:
    """A model of a checkpoint's architecture, with any weights."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        lm_config_of(folder, load_config(folder / "config.yaml")),
        dtype=torch.float32,
        attn_implementation="sdpa",
        trust_remote_code=False,
    )
    return model


def _is_binary(origin: Path, saved: BinarizeConfig, wanted: BinarizeConfig) -> bool:
    """Whether the checkpoint `origin` is continued as the binary model that it is; False for one in full precision.

    Raises UserError for one in between, for one that is binary in another way, and for phases that begin it anew.
    """
    step = trainer_state(origin).step
    share = binary_share(saved, step)
    if share == 0:
        return False
    if share < 1:
        raise UserError(
            f"{ROLE}={origin} is {unfinished_phase(saved, step)}; name a checkpoint from before or behind that phase"
        )
    _require_same_method(origin, saved, wanted)
    if has_phases(wanted):
        raise UserError(
            f"{ROLE}={origin} is binary already; set binarize.from_step=0 and binarize.anneal_steps=0, "
            "or start from a model in full precision"
        )
    return True


def _require_same_method(origin: Path, saved: BinarizeConfig, wanted: BinarizeConfig) -> None:
    there, here = settings_read(saved), settings_read(wanted)
    for key, value in there.items():
        if value != here.get(key):
            raise UserError(
                f"{origin} is binary already (binarize.method={saved.method}) and is continued as it is, but "
                f"binarize.{key} is {value!r} there and {here.get(key)!r} here; give what its config.yaml has, or "
                "start from its dense release"
            )
