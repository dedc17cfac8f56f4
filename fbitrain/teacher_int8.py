"""A teacher whose linear layers multiply in int8: half the bytes of bf16, and faster where the device has the units.

Weights have a scale per row, activations one per token, both the largest magnitude divided by 127. Embedding and head
stay as they are, because the loss multiplies with the head itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fbitrain.base.errors import UserError
from fbitrain.teacher import Teacher

_LARGEST = 127
_CUDA_ROWS, _CUDA_MULTIPLE = 32, 8  # of torch._int_mm: at least 17 rows, and widths that are multiples of 8


def why_no_int8(device: torch.device) -> str:
    """Why int8 products are no faster than floating ones on `device`; empty where they are."""
    if device.type == "cuda":
        return "" if torch.cuda.get_device_capability(device) >= (7, 5) else "this GPU has no int8 tensor cores"
    return (
        "" if torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported() else "this CPU has no int8 products"
    )


class Int8Linear(nn.Module):
    """x [..., K] -> [..., N] in x's dtype, as the Linear that it is made from within the error of two roundings."""

    weight_KN: Tensor
    scale_N: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight_NK = linear.weight.detach().float()
        scale_N = weight_NK.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST
        codes_NK = (weight_NK / scale_N.unsqueeze(1)).round_().to(torch.int8)
        self.register_buffer("weight_KN", codes_NK.t())  # a view: both libraries want the rows of Wᵀ in columns
        self.register_buffer("scale_N", scale_N)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1]).float()
        scale_M1 = x_MK.abs().amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny) / _LARGEST
        codes_MK = (x_MK / scale_M1).round_().to(torch.int8)
        product_MN = _int_mm(codes_MK, self.weight_KN) * (scale_M1 * self.scale_N)
        if self.bias is not None:
            product_MN = product_MN + self.bias
        return product_MN.to(x.dtype).view(*x.shape[:-1], -1)


def _int_mm(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """fp32 [M, N], the sums exact in int32."""
    missing = _CUDA_ROWS - len(a_MK) if a_MK.is_cuda else 0
    if missing > 0:
        a_MK = nn.functional.pad(a_MK, (0, 0, 0, missing))
    product = torch._int_mm(a_MK, b_KN).float()
    return product[: len(product) - missing] if missing > 0 else product


def host_in_int8(body: nn.Module, device: torch.device) -> int:
    """Replaces every Linear of `body` in place; returns how many. Raises UserError where that would be no gain."""
    if why := why_no_int8(device):
        raise UserError(f"distill.int8: {why}; leave it out")
    linears = [(name, module) for name, module in body.named_modules() if isinstance(module, nn.Linear)]
    odd = [name for name, linear in linears if device.type == "cuda" and _odd(linear)]
    if odd:
        raise UserError(f"distill.int8: {odd[0]} has a width that is no multiple of {_CUDA_MULTIPLE}; leave it out")
    for name, linear in linears:
        parent, _, leaf = name.rpartition(".")
        setattr(body.get_submodule(parent), leaf, Int8Linear(linear))
    return len(linears)


def _odd(linear: nn.Linear) -> bool:
    return bool(linear.in_features % _CUDA_MULTIPLE or linear.out_features % _CUDA_MULTIPLE)


class Difference(NamedTuple):
    """Between a teacher's distribution and that of its int8 form, means over tokens."""

    kl: float  # nats, KL(teacher ‖ int8 form)
    entropy: float  # nats, of the teacher
    same_top: float  # share of tokens whose likeliest word is the same
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.4f} nats per token from its distribution, whose entropy is {self.entropy:.3f}; the "
            f"likeliest word is the same for {self.same_top:.1%} of {self.tokens:,} held-out tokens"
        )


@torch.no_grad()
def difference(teacher: Teacher, exact_hidden: Tensor, token_ids: Tensor) -> Difference:
    """What int8 changes on token_ids [B, T], for which the teacher gave `exact_hidden` [B, T, Dt] before."""
    pairs = zip(exact_hidden, teacher.hidden(token_ids), strict=True)
    kl = entropy = same = 0.0
    for exact_TD, rounded_TD in pairs:
        log_p, log_q = (
            torch.log_softmax((h @ teacher.head_weight.t()).float(), dim=-1) for h in (exact_TD, rounded_TD)
        )
        p = log_p.exp()
        kl += float((p * (log_p - log_q)).sum())
        entropy -= float((p * log_p).sum())
        same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    n = token_ids.numel()
    return Difference(kl / n, entropy / n, same / n, n)
