"""Calibration: masks of salient weights, and GPTQ-PB, from what a pretrained model computes on some text.

Both walk the model one decoder block at a time, so that only one block's statistics exist at once. The same model and
text give the same result. Letters: N out_features, K in_features, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.calibration.block_walk import BlockWalk, by_block, weight_NK
from fbitrain.config import CalibrationConfig
from fbitrain.model.build import chosen_linears
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.gptq_pb import PartialWeights, gptq_partial
from fbitrain.model.hessian import HessianSum, SingularHessianError
from fbitrain.model.methods import oriented
from fbitrain.model.salience import hessian_scores, magnitude_scores, select_mask
from fbitrain.ranks import progress_bar

FISHER_BYTES = 4 * 2**30  # squared gradients that exist at one time; more blocks than fit take another pass


def select_masks(
    lm: PreTrainedModel, binarize: BinarizeConfig, token_ids: Tensor | None, *, damping: float = 0.01
) -> dict[str, Tensor]:
    """The salient weights of every Linear that `binarize.skip` leaves, as bool [N, K] by qualified name.

    token_ids: calibration sequences, int64 [n, T]; None will do for salient.criterion=magnitude. The model, in eval
    mode, is left as it was. Raises UserError for a layer that calibration cannot reach or whose Hessian is useless.
    """
    linears = {name: linear.module for name, linear in chosen_linears(lm, binarize).items()}
    if binarize.salient.criterion == "magnitude":
        return {name: _mask(magnitude_scores(weight_NK(linear)), binarize) for name, linear in linears.items()}
    assert token_ids is not None, f"criterion={binarize.salient.criterion} needs calibration sequences"
    if binarize.salient.criterion == "fisher":
        return {name: _mask(fisher, binarize) for name, fisher in fisher_diagonals(lm, linears, token_ids)}
    masks: dict[str, Tensor] = {}
    blocks = by_block(lm, linears)
    with closing(BlockWalk(lm, token_ids, passes=1, description="selection")) as walk:
        for index, block in enumerate(blocks):
            hessians = _hessians(walk, index, block, advance=True)
            masks |= {
                name: _hessian_mask(name, block[name], hessians[name], binarize, damping, feedback=False)
                for name in block
            }
    return masks


def quantize_(
    lm: PreTrainedModel, binarize: BinarizeConfig, calibration: CalibrationConfig, token_ids: Tensor | None
) -> dict[str, PartialWeights]:
    """GPTQ-PB on every Linear that `binarize.skip` leaves: the partially binarized layers, by qualified name.

    A block's Hessians, and the masks that its Hessians say, come from the outputs of the blocks before it as
    they are after quantization. `lm`, fp32 and in eval mode, holds each result's `weight` afterwards, from which
    PartialBinaryLinear makes the same effective weights. token_ids and errors as in `select_masks`.
    """
    linears = {name: linear.module for name, linear in chosen_linears(lm, binarize).items()}
    by_hessian = bool(binarize.salient.hessian_score(feedback=calibration.feedback))
    masks = {} if by_hessian else select_masks(lm, binarize, token_ids)
    if not by_hessian and not calibration.feedback:
        return _stored(linears, _solve(linears, {}, masks, binarize, calibration))
    assert token_ids is not None, "GPTQ-PB needs calibration sequences"
    results: dict[str, PartialWeights] = {}
    blocks = by_block(lm, linears)
    with closing(BlockWalk(lm, token_ids, passes=2, description="GPTQ-PB")) as walk:
        for index, block in enumerate(blocks):
            parts = _solve(block, _hessians(walk, index, block, advance=False), masks, binarize, calibration)
            for name, linear in block.items():
                weight_NK(linear).copy_(parts[name].effective_weight())
            walk.run(index, advance=True)
            results |= _stored(block, parts)
    return results


def fisher_diagonals(
    lm: PreTrainedModel, linears: Mapping[str, nn.Module], token_ids: Tensor, *, max_bytes: int = FISHER_BYTES
) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, fp32 [N, K]) for each of `linears`: the squared gradient of a sequence's loss, mean over sequences.

    The loss is that of predicting the next token. As many blocks are taken at a time as have `max_bytes` of squared
    gradients (one at least; their gradients take as much again), and each such portion costs one pass over the
    sequences: forward, and backward down to its first block. The parameters' own `.grad` stay as they are.
    """
    portions: list[dict[str, nn.Module]] = []
    for block in by_block(lm, linears):
        if portions and _fp32_bytes(portions[-1]) + _fp32_bytes(block) <= max_bytes:
            portions[-1].update(block)
        else:
            portions.append(dict(block))
    with progress_bar(len(portions) * len(token_ids), "Fisher", "sequence") as bar:
        for portion in portions:
            yield from _squared_gradients(lm, portion, token_ids, bar).items()


def _squared_gradients(
    lm: PreTrainedModel, linears: Mapping[str, nn.Module], token_ids: Tensor, bar: Any
) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(weight_NK(linear), dtype=torch.float32) for name, linear in linears.items()}
    weights = [linear.get_parameter("weight") for linear in linears.values()]
    with _only_grad_of(weights, lm):
        for ids in torch.split(token_ids, 1):
            ids = ids.to(lm.device)
            logits = lm(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = F.cross_entropy(logits.float(), ids[0, 1:])
            gradients = torch.autograd.grad(loss, weights, allow_unused=True)
            for (name, total), linear, gradient in zip(sums.items(), linears.values(), gradients, strict=True):
                if gradient is None:
                    raise _unused(name)
                total.add_(oriented(linear, gradient).float().square())
            bar.update()
    return {name: total / len(token_ids) for name, total in sums.items()}


@contextmanager
def _only_grad_of(weights: Sequence[nn.Parameter], lm: nn.Module) -> Iterator[None]:
    """Autograd records what depends on `weights` and nothing before it."""
    required = {parameter: parameter.requires_grad for parameter in lm.parameters()}
    try:
        lm.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for parameter, was_required in required.items():
            parameter.requires_grad_(was_required)


def _hessians(walk: BlockWalk, index: int, linears: Mapping[str, nn.Module], *, advance: bool) -> dict[str, Tensor]:
    """The Hessian [K, K] of each Linear of one block, in fp32; Linears that are given the same input share one."""
    leaders = _leaders(walk, index, linears)
    sums = {}
    with ExitStack() as hooks:
        for leader in dict.fromkeys(leaders.values()):
            weight = weight_NK(linears[leader])
            sums[leader] = HessianSum(weight.shape[1], device=weight.device)
            hooks.enter_context(linears[leader].register_forward_pre_hook(partial(_take_in, sums[leader])))
        walk.run(index, advance=advance)
    means = {leader: total.mean() for leader, total in sums.items()}
    return {name: means[leaders[name]] for name in linears}


def _take_in(total: HessianSum, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    total.add(args[0])


def _leaders(walk: BlockWalk, index: int, linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each Linear of the block the first one that was called with the very same tensor."""
    inputs: dict[str, Tensor] = {}  # kept until all are compared, so that no other tensor takes the place of a dead one

    def before(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(name, args[0])

    with ExitStack() as hooks:
        for name, linear in linears.items():
            hooks.enter_context(linear.register_forward_pre_hook(partial(before, name)))
        walk.run_first(index)
    for name in linears:
        if name not in inputs:
            raise _unused(name)
    return {name: next(other for other, x in inputs.items() if x is inputs[name]) for name in linears}


def _hessian_mask(
    name: str, linear: nn.Module, hessian: Tensor, binarize: BinarizeConfig, damping: float, *, feedback: bool
) -> Tensor:
    score = binarize.salient.hessian_score(feedback=feedback)
    with _naming(name):
        return _mask(hessian_scores(weight_NK(linear), hessian, damping, score), binarize)


def _mask(scores: Tensor, binarize: BinarizeConfig) -> Tensor:
    return select_mask(scores, binarize.salient.fraction, binarize.salient.scope, binarize.group_size)


def _solve(
    linears: Mapping[str, nn.Module],
    hessians: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    binarize: BinarizeConfig,
    calibration: CalibrationConfig,
) -> dict[str, PartialWeights]:
    """GPTQ-PB of each layer by itself; a layer without a mask selects its own by its Hessian."""
    parts = {}
    feedback, damping = calibration.feedback, calibration.damping
    for name, linear in linears.items():
        mask = masks.get(name)
        if mask is None:
            mask = _hessian_mask(name, linear, hessians[name], binarize, damping, feedback=feedback)
        with _naming(name):
            parts[name] = gptq_partial(
                weight_NK(linear),
                hessians[name] if feedback else None,
                mask,
                group_size=binarize.group_size if binarize.scale == "group" else 0,
                salient_dtype=binarize.salient.dtype,
                damping=damping,
                block_size=calibration.block_size,
            )
    return parts


def _stored(linears: Mapping[str, nn.Module], parts: Mapping[str, PartialWeights]) -> dict[str, PartialWeights]:
    """Puts each latent weight into its layer; the results then share the layers' memory."""
    for name, linear in linears.items():
        weight_NK(linear).copy_(parts[name].weight)
    return {name: replace(parts[name], weight=weight_NK(linear)) for name, linear in linears.items()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except SingularHessianError as error:
        raise UserError(f"{name} cannot be calibrated: {error}; check the calibration text and the model") from None


def _unused(name: str) -> UserError:
    return UserError(f"{name} takes no part in computing the calibration text; add it to binarize.skip")


def _fp32_bytes(linears: Mapping[str, nn.Module]) -> int:
    return sum(4 * weight_NK(linear).numel() for linear in linears.values())
