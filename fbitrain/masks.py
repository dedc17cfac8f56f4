"""Masks of salient weights as a file: one bit per weight, with what they were selected for.

A selection pass can take hours, and another text or criterion gives other masks. So the file carries a fingerprint, and
one that does not fit is refused, never replaced by a new pass in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from fbitrain.errors import UserError
from fbitrain.files import replacing
from fbitrain.model.config import BinarizeConfig

FORMAT = "fbitrain masks 1"


def mask_fingerprint(binarize: BinarizeConfig, model: str, token_ids: Tensor | None, damping: float) -> dict[str, str]:
    """Everything that a mask depends on, in words: the criterion, the share, the model by name, the text by hash."""
    salient = binarize.salient
    fingerprint = {
        "model": model,
        "skip": ", ".join(binarize.skip),
        "criterion": salient.criterion,
        "fraction": repr(salient.fraction),
        "scope": salient.scope,
    }
    if salient.scope == "group":
        fingerprint["group_size"] = str(binarize.group_size)
    if salient.criterion != "magnitude" and token_ids is not None:
        text = hashlib.sha256(token_ids.cpu().contiguous().numpy().tobytes()).hexdigest()
        fingerprint["calibration"] = f"{len(token_ids)} sequences of {token_ids.shape[1]} tokens, sha256 {text}"
    if salient.criterion == "hessian":
        fingerprint["damping"] = repr(damping)
    return fingerprint


def save_masks(path: Path, masks: Mapping[str, Tensor], fingerprint: Mapping[str, str]) -> None:
    """Writes bool masks [N, K] by layer name to `path` (safetensors), on disk before it gets its name."""
    bits = {name: np.packbits(mask.cpu().numpy(), axis=1, bitorder="little") for name, mask in masks.items()}
    widths = {name: mask.shape[1] for name, mask in masks.items()}
    metadata = {"format": FORMAT, "in_features": json.dumps(widths), "fingerprint": json.dumps(dict(fingerprint))}
    with replacing(path) as temporary:
        save_file(bits, temporary, metadata)


def load_masks(path: Path, fingerprint: Mapping[str, str]) -> dict[str, Tensor]:
    """The bool masks [N, K] in `path`, by layer name.

    Raises UserError if the file cannot be read, or was not made for this `fingerprint`: every difference is named.
    """
    try:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read as a file of masks ({error}); remove it to select anew") from None
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} is not a file of masks that this version reads; remove it to select anew")
    saved = json.loads(metadata["fingerprint"])
    if saved != dict(fingerprint):
        differences = "; ".join(
            f"{key} was {saved.get(key, 'not there')}, now {fingerprint.get(key, 'not there')}"
            for key in dict.fromkeys([*saved, *fingerprint])
            if saved.get(key) != fingerprint.get(key)
        )
        raise UserError(f"{path} holds masks selected for something else ({differences}); remove it to select anew")
    widths = json.loads(metadata["in_features"])
    return {
        name: torch.from_numpy(np.unpackbits(packed, axis=1, count=widths[name], bitorder="little").astype(bool))
        for name, packed in bits.items()
    }
