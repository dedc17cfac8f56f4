"""The packed form of a BinaryLinear as it is, without a release's rounding of its scales."""

from __future__ import annotations

from torch import nn

from fbitrain.kernels import ops
from fbitrain.model.linear import BinaryLinear
from fbitrain.model.packed_layers import PackedBinaryLinear


def packed_form(linear: BinaryLinear) -> PackedBinaryLinear:
    """A layer with copies of the tensors of `linear`, in its mode."""
    packed = PackedBinaryLinear(
        linear.in_features,
        linear.out_features,
        scale=linear.scale,
        beta=linear.beta is not None,
        group_size=linear.group_size,
        bias=linear.bias is not None,
    )
    tensors = {name: tensor.float() for name, tensor in linear.state_dict().items() if name != "weight"}
    packed.load_state_dict({**tensors, "weight_bits": ops.pack_signs(linear.weight.detach())})
    return packed.train(linear.training)


def pack_(model: nn.Module) -> None:
    """Swaps every BinaryLinear of `model` for its packed form in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BinaryLinear):
            model.set_submodule(name, packed_form(module))
