"""Weights that are computed with outside their own layer are found; whatever else is done with them is let be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fbitrain.base.errors import UserError
from fbitrain.model.build import chosen_linears
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.direct_reads import check_direct_reads


class Block(nn.Module):
    """Calls `up`, computes with what `how` names, and never uses `spare`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.up, self.spare = how, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(x.to(self.up.weight.dtype))
        if self.how == "matmul":
            y = y @ self.up.weight
        elif self.how == "transposed":
            y = y @ self.up.weight.T
        elif self.how == "in a list":
            y = y + torch.stack([y[0], self.up.weight]).sum()
        assert self.up.weight.shape == (4, 4)
        return y


def check(block: Block) -> None:
    linears = chosen_linears(block, BinarizeConfig(skip=[]))
    check_direct_reads(linears, lambda: block(torch.ones(1, 4, 4)))


@pytest.mark.parametrize("how", ["matmul", "transposed", "in a list"])
def test_a_weight_that_is_called_and_read_too_is_found(how: str) -> None:
    with pytest.raises(UserError, match=r"the weight of up is read by the module around it.*add 'up' to binarize.skip"):
        check(Block(how))


def test_calls_looks_and_layers_that_rest_are_let_be() -> None:
    block = Block("not at all")
    check(block)
    assert not block.up._forward_hooks
    assert not block.up._forward_pre_hooks
