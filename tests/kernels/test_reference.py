"""The numbers' contract, against integer arithmetic and bit positions worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import reference
from fbitrain.kernels.layout import n_words, scale_shape
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

WIDTHS = (1, 31, 32, 33, 63, 64, 65, 511)


def random_signs(*shape: int, seed: int = 0) -> Tensor:
    """±1 in int64, so that products are exact."""
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sign_is_never_zero(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny
    w = torch.tensor([0.0, -0.0, tiny, -tiny, 3.0, -3.0, float("inf"), -float("inf")], dtype=dtype)
    before = w.clone()
    signs = reference.sign(w)
    assert signs.dtype == dtype
    assert signs.tolist() == [1, 1, 1, -1, 1, -1, 1, -1]
    assert torch.equal(w, before)


@pytest.mark.parametrize("k", range(70))
def test_bit_position(k: int) -> None:
    """Only element k is positive: only bit k % 32 of word k // 32 is set, also bit 31, int32's sign."""
    w = torch.full((70,), -1.0)
    w[k] = 1.0
    words = [word & 0xFFFFFFFF for word in reference.pack_signs(w).tolist()]
    assert words == [1 << (k % 32) if word == k // 32 else 0 for word in range(3)]


def test_pack_writes_zero_as_plus_one() -> None:
    assert reference.pack_signs(torch.tensor([0.0, -0.0, -1.0])).tolist() == [0b011]


@pytest.mark.parametrize("k", WIDTHS)
def test_padding_bits_are_zero(k: int) -> None:
    words = reference.pack_signs(torch.ones(k))
    assert sum(bin(word & 0xFFFFFFFF).count("1") for word in words.tolist()) == k


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", WIDTHS)
def test_pack_unpack_round_trip(k: int, dtype: torch.dtype) -> None:
    signs = random_signs(3, 2, k, seed=k).to(dtype)
    words = reference.pack_signs(signs * 0.25)
    assert words.dtype == torch.int32
    assert words.shape == (3, 2, n_words(k))
    unpacked = reference.unpack_signs(words, k, dtype)
    assert unpacked.is_contiguous()
    assert torch.equal(unpacked, signs)


@pytest.mark.parametrize("shape", [(0, 33), (2, 0, 33), (3, 0)])
def test_pack_empty(shape: tuple[int, ...]) -> None:
    words = reference.pack_signs(torch.empty(shape))
    assert words.shape == (*shape[:-1], n_words(shape[-1]))
    assert reference.unpack_signs(words, shape[-1], torch.float32).shape == shape


def test_strided_inputs() -> None:
    w = torch.randn(65, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(reference.pack_signs(w.T), reference.pack_signs(w.T.contiguous()))
    words = reference.pack_signs(w.T)[::2]
    assert torch.equal(reference.unpack_signs(words, 65, torch.float32), reference.sign(w.T[::2]))


def test_popcount() -> None:
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(-(2**31), 2**31, (1000,), generator=generator).to(torch.int32)
    edges = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), -(2**31) + 1, 0x55555555], dtype=torch.int32)
    words = torch.cat([edges, words])
    assert reference.popcount(words).dtype == torch.int32
    assert reference.popcount(words).tolist() == [bin(word & 0xFFFFFFFF).count("1") for word in words.tolist()]


@pytest.mark.parametrize("k", WIDTHS)
def test_xnor_gemm_is_the_integer_product(k: int) -> None:
    a, b = random_signs(5, k, seed=k), random_signs(9, k, seed=k + 1)
    product = reference.xnor_gemm(reference.pack_signs(a.float()), reference.pack_signs(b.float()), k)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a @ b.T)


def test_xnor_gemm_without_rows() -> None:
    a, b = torch.empty(0, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    assert reference.xnor_gemm(a, b, 40).shape == (0, 3)


@pytest.mark.parametrize("block_weights", [1, 150, 2**20])
@pytest.mark.parametrize(
    ("scale", "beta"), [("column", True), ("column", False), ("row", True), ("tensor", True), ("group", False)]
)
def test_binary_linear_is_the_product_with_the_effective_weight(
    scale: str, beta: bool, block_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", block_weights)
    n, k, group_size = 7, 66, 11
    torch.manual_seed(3)
    w, x = torch.randn(n, k).double(), torch.randn(2, 3, k).double()
    shape = scale_shape(scale, n, k, group_size)
    alpha, shift = torch.randn(shape).double(), torch.randn(shape).double() if beta else None
    effective = alpha.repeat_interleave(group_size, 1) if scale == "group" else alpha
    effective = effective * torch.where(w >= 0, 1.0, -1.0) + (0 if shift is None else shift)
    y = reference.binary_linear(x, BinaryWeight(reference.pack_signs(w), alpha, shift, scale, k, group_size))
    torch.testing.assert_close(y, x @ effective.T)


def test_binary_linear_takes_strided_and_empty_input() -> None:
    torch.manual_seed(4)
    words, alpha = reference.pack_signs(torch.randn(5, 33)), torch.rand(1, 33)
    x = torch.randn(33, 4, 2).permute(2, 1, 0)
    y = reference.binary_linear(x, BinaryWeight(words, alpha, None, "column", 33, 1))
    assert torch.equal(y, reference.binary_linear(x.contiguous(), BinaryWeight(words, alpha, None, "column", 33, 1)))
    assert reference.binary_linear(x[:, :0], BinaryWeight(words, alpha, None, "column", 33, 1)).shape == (2, 0, 5)


@pytest.mark.parametrize("scale", ["colum", ""])
def test_scale_shape_refuses_unknown_patterns(scale: str) -> None:
    with pytest.raises(ValueError, match="choose column, row, tensor or group"):
        scale_shape(scale, 4, 4, 2)


@pytest.mark.parametrize("group_size", [0, 3, 128])
def test_scale_shape_refuses_group_sizes_that_do_not_divide(group_size: int) -> None:
    with pytest.raises(ValueError, match="in_features=64 is not a multiple"):
        scale_shape("group", 4, 64, group_size)


def test_quantize_int8_by_hand() -> None:
    z = torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5, 0.0], [0.0] * 6, [2.0, -1.0, 0.0, 0.0, 0.0, 0.0]])
    q, scale = reference.quantize_int8(z)
    assert q.tolist() == [[127, -127, 0, 2, -2, 0], [0] * 6, [127, -64, 0, 0, 0, 0]]  # ties go to the even integer
    assert q.dtype == torch.int8
    assert torch.equal(scale, torch.tensor([[127.0], [0.0], [2.0]]) / 127)
    with pytest.raises(ValueError, match=r"row 1 of \[2, 2\] holds NaN or infinity"):
        reference.quantize_int8(torch.tensor([[1.0, 2.0], [float("inf"), 0.0]]))


@pytest.mark.parametrize(("scale", "beta"), [("column", True), ("row", True), ("tensor", False), ("group", False)])
def test_int8_mode_is_integer_arithmetic(scale: str, beta: bool) -> None:
    """Against Python's integers, element by element."""
    n, k, group_size = 3, 40, 10
    torch.manual_seed(5)
    w, x = torch.randn(n, k), torch.randn(2, k)
    shape = scale_shape(scale, n, k, group_size)
    alpha, shift = torch.rand(shape) + 0.5, torch.randn(shape) if beta else None
    y = reference.binary_linear(x, BinaryWeight(reference.pack_signs(w), alpha, shift, scale, k, group_size), "int8")
    q, step = reference.quantize_int8(x * alpha if scale == "column" else x)
    alpha_NK = torch.ones(n, k) if scale == "column" else alpha.repeat_interleave(k // alpha.shape[1], 1).expand(n, k)
    for m in range(2):
        for row in range(n):
            terms = [int(q[m, i]) * (1 if w[row, i] >= 0 else -1) * float(alpha_NK[row, i]) for i in range(k)]
            wanted = sum(terms) * float(step[m])
            if shift is not None:
                wanted += float((x[m] * shift.expand(n, k)[row]).sum())
            assert float(y[m, row]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def mixture_inputs(m: int, n: int, k: int, n_experts: int) -> tuple[Tensor, ...]:
    torch.manual_seed(m + n + k)
    gates = torch.randn(m, n_experts).softmax(1)
    return torch.randn(m, k).double(), torch.randn(n, k), gates, torch.rand(n_experts, k), torch.rand(n_experts, n)


@pytest.mark.parametrize("n_experts", [1, 4, 64])
def test_mixture_linear_by_its_effective_weights(n_experts: int) -> None:
    """Every token has a dense weight of its own."""
    x, w, gates, alpha_in, alpha_out = mixture_inputs(5, 7, 66, n_experts)
    y = reference.mixture_linear(x, MixtureWeight(reference.pack_signs(w), gates, alpha_in, alpha_out, 66))
    for m in range(5):
        gate = gates[m].double()
        effective = torch.where(w >= 0, 1.0, -1.0) * (gate @ alpha_out.double()).outer(gate @ alpha_in.double())
        torch.testing.assert_close(y[m], effective @ x[m])


def test_mixture_linear_int8_is_integer_arithmetic() -> None:
    x, w, gates, alpha_in, alpha_out = (t.float() for t in mixture_inputs(2, 3, 40, 4))
    y = reference.mixture_linear(x, MixtureWeight(reference.pack_signs(w), gates, alpha_in, alpha_out, 40), "int8")
    q, step = reference.quantize_int8(x * (gates @ alpha_in))
    for m in range(2):
        for row in range(3):
            total = sum(int(q[m, i]) * (1 if w[row, i] >= 0 else -1) for i in range(40))
            wanted = total * float(step[m]) * float(gates[m] @ alpha_out[:, row])
            assert float(y[m, row]) == pytest.approx(wanted, rel=1e-5)


def salient_entries(mask: Tensor, salient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """row_starts, columns and values of the entries of `salient` [N, K] that `mask` [N, K] names."""
    row_starts = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    return row_starts, mask.nonzero()[:, 1].int().to(torch.uint16), salient[mask]


@pytest.mark.parametrize("block_weights", [1, 150, 2**20])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("scale", ["row", "group"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_partial_linear_is_the_product_with_the_effective_weight(
    dtype: torch.dtype, scale: str, share: float, block_weights: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "BLOCK_WEIGHTS", block_weights)
    n, k, group_size = 7, 66, 11
    torch.manual_seed(6)
    w, x, mask = torch.randn(n, k), torch.randn(2, 3, k).double(), torch.rand(n, k) < share
    mask[2] = False
    alpha = torch.rand(scale_shape(scale, n, k, group_size)).double()
    values = torch.randint(-128, 128, (n, k)).to(dtype)
    value_scale = torch.rand(n, 1) if dtype == torch.int8 else None
    entries = salient_entries(mask, values)
    weight = PartialWeight(reference.pack_signs(w), alpha, scale, *entries, value_scale, k, group_size)
    y = reference.partial_linear(x, weight)
    binary = alpha.repeat_interleave(k // alpha.shape[1], 1) * torch.where(w >= 0, 1.0, -1.0)
    salient = values.double() * (1 if value_scale is None else value_scale.double())
    torch.testing.assert_close(y, x @ torch.where(mask, salient, binary).T)


@pytest.mark.parametrize("scale", ["row", "group"])
def test_partial_linear_int8_is_integer_arithmetic(scale: str) -> None:
    n, k, group_size = 3, 40, 10
    torch.manual_seed(7)
    w, x, mask = torch.randn(n, k), torch.randn(2, k), torch.rand(n, k) < 0.3
    alpha, value_scale = torch.rand(scale_shape(scale, n, k, group_size)), torch.rand(n, 1)
    values = torch.randint(-128, 128, (n, k)).to(torch.int8)
    entries = salient_entries(mask, values)
    weight = PartialWeight(reference.pack_signs(w), alpha, scale, *entries, value_scale, k, group_size)
    y = reference.partial_linear(x, weight, "int8")
    q, step = reference.quantize_int8(x)
    size = k // alpha.shape[1]
    for m in range(2):
        for row in range(n):
            total = sum(int(q[m, i]) * int(values[row, i]) for i in range(k) if mask[row, i]) * float(value_scale[row])
            for i in range(k):
                if not mask[row, i]:
                    total += int(q[m, i]) * (1 if w[row, i] >= 0 else -1) * float(alpha[row, i // size])
            assert float(y[m, row]) == pytest.approx(total * float(step[m]), rel=1e-5, abs=1e-5)
