"""Runs a language model one decoder block at a time: the inputs of a block are kept, so that the block runs by itself.

Supports any causal LM of transformers whose blocks hand on hidden states and nothing else. Letters: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.model.methods import FullLinear, oriented
from fbitrain.ranks import progress_bar

SUPPORTED = "every causal language model of transformers whose decoder blocks are built of nn.Linear or Conv1D"


class _Reached(Exception):
    """Ends a forward pass at the first block."""


def weight_NK(linear: nn.Module) -> Tensor:
    """The weight of a Linear or Conv1D as out_features by in_features: a view, to read and to write."""
    return oriented(linear, linear.get_parameter("weight").detach())


def decoder_blocks(lm: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the blocks: the ModuleList that holds most Linears. Raises UserError if none holds any."""

    def n_linears(module: nn.Module) -> int:
        return sum(FullLinear.of(child) is not None for child in module.modules())

    lists = {name: module for name, module in lm.named_modules() if isinstance(module, nn.ModuleList)}
    name = max(lists, key=lambda name: n_linears(lists[name]), default="")
    if not lists or not n_linears(lists[name]):
        raise UserError(
            f"{type(lm).__name__} has no list of decoder blocks with Linears in it; supported is {SUPPORTED}"
        )
    return name, lists[name]


def by_block(lm: nn.Module, linears: Mapping[str, nn.Module]) -> list[dict[str, nn.Module]]:
    """`linears` sorted by the decoder block they are in. Raises UserError for one that is in none."""
    prefix, blocks = decoder_blocks(lm)
    sorted_linears: list[dict[str, nn.Module]] = [{} for _ in blocks]
    for name, linear in linears.items():
        index = name.removeprefix(f"{prefix}.").partition(".")[0]
        if not name.startswith(f"{prefix}.") or not index.isdecimal():
            raise UserError(
                f"{name} is outside the decoder blocks ({prefix}), which calibration goes through one at a time; "
                "add it to binarize.skip"
            )
        sorted_linears[int(index)][name] = linear
    return sorted_linears


class BlockWalk:
    """Runs the decoder blocks of `lm` in order over some sequences, block by block.

    The hidden states that enter the next block are kept on the CPU in the model's dtype, one [1, T, D] per sequence
    (n · T · D numbers in all: 4.3 GB of fp32 for 128 sequences of 2048 tokens at width 4096), nothing else. What a
    block gets besides, masks and position embeddings, is taken from one pass of the whole model over the first
    sequence; it is the same for all, as they are equally long and unpadded.

    Raises UserError for sequences longer than the model's positions, for a model whose blocks are not found, and for
    one that does more to the hidden states between two blocks than to hand them on.
    """

    def __init__(self, lm: PreTrainedModel, token_ids: Tensor, *, passes: int, description: str) -> None:
        positions = getattr(lm.config, "max_position_embeddings", token_ids.shape[1])
        if token_ids.shape[1] > positions:
            raise UserError(
                f"calibration sequences of {token_ids.shape[1]} tokens are longer than the model's {positions} "
                "positions; choose a smaller calibration.seq_len"
            )
        self._name, self._blocks = decoder_blocks(lm)
        self._extras = _extra_arguments(lm, self._name, self._blocks, token_ids[:1])
        self._hidden = [_first_input(lm, self._blocks[0], ids) for ids in torch.split(token_ids, 1)]
        self._bar = progress_bar(len(self._blocks) * len(self._hidden) * passes, description, "block")

    @torch.no_grad()
    def run(self, index: int, *, advance: bool) -> None:
        """Block `index` over all sequences; `advance` makes its outputs the inputs of the next one."""
        for i in range(len(self._hidden)):
            output = self._block_output(index, self._hidden[i])
            if advance:
                self._hidden[i] = output.cpu()
            self._bar.update()

    @torch.no_grad()
    def run_first(self, index: int) -> None:
        """Block `index` over the first sequence alone."""
        self._block_output(index, self._hidden[0])

    def close(self) -> None:
        self._bar.close()

    def _block_output(self, index: int, hidden: Tensor) -> Tensor:
        args, kwargs = self._extras[index]
        block = self._blocks[index]
        return _hidden_of(block(hidden.to(next(block.parameters()).device), *args, **kwargs))


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _split_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """A block's arguments as its hidden states and the rest."""
    if args:
        return args[0], (args[1:], kwargs)
    return kwargs["hidden_states"], ((), {key: value for key, value in kwargs.items() if key != "hidden_states"})


def _hidden_of(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@torch.no_grad()
def _extra_arguments(lm: PreTrainedModel, name: str, blocks: nn.ModuleList, ids: Tensor) -> list[Arguments]:
    """What each block gets besides hidden states, from a whole forward pass, which also shows how they are chained."""
    extras: list[Arguments] = []
    previous: list[Tensor] = []  # the last block's output

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, rest = _split_arguments(args, kwargs)
        if previous and hidden is not previous[0] and not torch.equal(hidden, previous[0]):
            raise UserError(
                f"{type(lm).__name__} changes the hidden states between {name}.{len(extras) - 1} and "
                f"{name}.{len(extras)}, so its blocks cannot be calibrated one at a time; supported is {SUPPORTED}"
            )
        extras.append(rest)

    def after(_: nn.Module, __: Any, output: Any) -> None:
        previous[:] = [_hidden_of(output)]

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after))
        lm.base_model(input_ids=ids.to(lm.device), use_cache=False)
    return extras


@torch.no_grad()
def _first_input(lm: PreTrainedModel, first: nn.Module, ids: Tensor) -> Tensor:
    """The hidden states [1, T, D] that enter the first block, on the CPU."""
    found: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split_arguments(args, kwargs)[0].cpu())
        raise _Reached

    with first.register_forward_pre_hook(before, with_kwargs=True), suppress(_Reached):
        lm.base_model(input_ids=ids.to(lm.device), use_cache=False)
    assert found, "the first decoder block was not run"
    return found[0]
