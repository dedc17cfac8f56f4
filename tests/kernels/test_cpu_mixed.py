"""mixture_linear and partial_linear, every instruction set in turn, against dense weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cpu, reference
from fbitrain.kernels.weights import MixtureWeight, PartialWeight

# Tokens, rows, columns around what tiles and panels hold: 8 tokens side by side, 56 a task, 64 rows, 512 columns.
SHAPES = [(1, 1, 1), (1, 65, 33), (2, 63, 511), (3, 64, 512), (5, 130, 513), (9, 7, 1100), (61, 66, 96), (490, 3, 70)]


def signal_to_noise(wanted: Tensor, got: Tensor) -> float:
    """In dB."""
    noise = (got.double() - wanted.double()).norm()
    return float(20 * torch.log10(wanted.double().norm() / noise.clamp_min(1e-300)))


def signs_of(words: Tensor, k: int) -> Tensor:
    """±1 [N, k], bit by bit."""
    columns = torch.arange(k)
    return ((words[:, columns // 32] >> (columns % 32)) & 1).double() * 2 - 1


def words_and_x(m: int, n: int, k: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(m * 7919 + n * 31 + k)
    return reference.pack_signs(torch.randn(n, k)), torch.randn(m, k)


def mixture_arguments(m: int, n: int, k: int, n_experts: int) -> tuple[Tensor, ...]:
    words, x = words_and_x(m, n, k)
    gates = torch.randn(m, n_experts).softmax(1)
    return x, words, gates, torch.rand(n_experts, k) + 0.5, torch.rand(n_experts, n) + 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_experts", [1, 4, 64])
def test_mixture_float_mode_is_near_fp64(level: str, n_experts: int, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        x, words, gates, alpha_in, alpha_out = mixture_arguments(m, n, k, n_experts)
        y = cpu.kernel("mixture_linear", level)(x.to(dtype), MixtureWeight(words, gates, alpha_in, alpha_out, k))
        assert y.dtype == dtype
        scale_in, scale_out = (gates.double() @ alpha.to(dtype).double() for alpha in (alpha_in, alpha_out))
        wanted = ((x.to(dtype).double() * scale_in) @ signs_of(words, k).T) * scale_out
        assert signal_to_noise(wanted, y) > (105 if dtype == torch.float32 else 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_experts", [1, 5])
def test_mixture_int8_mode_is_exact(level: str, n_experts: int, dtype: torch.dtype) -> None:
    for m, n, k in SHAPES:
        x, *tensors = mixture_arguments(m, n, k, n_experts)
        arguments = (x.to(dtype), MixtureWeight(*tensors, k), "int8")
        y = cpu.kernel("mixture_linear", level)(*arguments)
        assert torch.equal(y, reference.mixture_linear(*arguments))


def partial_arguments(
    m: int, n: int, k: int, share: float, scale: str, dtype: torch.dtype
) -> tuple[tuple[object, ...], Tensor]:
    """The arguments up to `value_scale`, and the salient mask [N, K]. Row 0 has no salient weight; groups are of 32."""
    words, x = words_and_x(m, n, k)
    mask = torch.rand(n, k) < share
    if n > 1:
        mask[0] = False
    row_starts = torch.cat([torch.zeros(1), mask.sum(1).cumsum(0)]).int()
    columns = mask.nonzero()[:, 1].int().to(torch.uint16)
    values = torch.randint(-128, 128, (len(columns),)).to(dtype)
    alpha = torch.rand(n, 1 if scale == "row" else k // 32) + 0.5
    value_scale = (torch.rand(n, 1) + 0.5) / 64 if dtype == torch.int8 else None
    return (x, words, alpha, scale, row_starts, columns, values, value_scale), mask


CASES = [("row", torch.int8), ("row", torch.float16), ("group", torch.int8), ("group", torch.float16)]


def widths(k: int, scale: str) -> int:
    return -(-k // 32) * 32 if scale == "group" else k


@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(("scale", "values_dtype"), CASES)
def test_partial_float_mode_is_near_fp64(level: str, scale: str, values_dtype: torch.dtype, share: float) -> None:
    for index, (m, n, k) in enumerate(SHAPES):
        k, dtype = widths(k, scale), torch.bfloat16 if index % 4 == 3 else torch.float32
        arguments, mask = partial_arguments(m, n, k, share, scale, values_dtype)
        x, words, alpha, _, _, _, values, value_scale = arguments
        y = cpu.kernel("partial_linear", level)(x.to(dtype), PartialWeight(*arguments[1:], k, 32))
        assert y.dtype == dtype
        weight = alpha.to(dtype).double().repeat_interleave(k if scale == "row" else 32, 1) * signs_of(words, k)
        weight[mask] = values.double()
        if value_scale is not None:
            weight[mask] *= value_scale.double().expand(n, k)[mask]
        assert signal_to_noise(x.to(dtype).double() @ weight.T, y) > (105 if dtype == torch.float32 else 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.15, 1.0])
@pytest.mark.parametrize(("scale", "values_dtype"), CASES)
def test_partial_int8_mode_is_exact(
    level: str, scale: str, values_dtype: torch.dtype, share: float, dtype: torch.dtype
) -> None:
    """α of groups are powers of two, so that the sum over groups is exact in any order."""
    for m, n, k in SHAPES:
        k = widths(k, scale)
        (x, words, alpha, *rest), _ = partial_arguments(m, n, k, share, scale, values_dtype)
        alpha = torch.exp2(torch.randint(-2, 3, alpha.shape).float()) if scale == "group" else alpha
        arguments = (x.to(dtype), PartialWeight(words, alpha, *rest, k, 32), "int8")
        y = cpu.kernel("partial_linear", level)(*arguments)
        assert torch.equal(y, reference.partial_linear(*arguments))


def test_partial_int8_mode_at_its_extremes(level: str) -> None:
    """The largest sums of products of activations and salient values, over more entries than a call takes."""
    k, n = 1600, 3
    words, row_starts = reference.pack_signs(torch.ones(n, k)), torch.arange(0, n * k + 1, k).int()
    columns = torch.arange(k).repeat(n).int().to(torch.uint16)
    values, one = torch.full((n * k,), -128, dtype=torch.int8), torch.ones(n, 1)
    for m in (1, 9):
        x = torch.full((m, k), 127.0)
        y = cpu.kernel("partial_linear", level)(
            x, PartialWeight(words, one, "row", row_starts, columns, values, one, k, k), "int8"
        )
        assert (y == -128 * 127 * k).all()


@pytest.mark.parametrize("k", [2**16, 2**16 + 64])
def test_partial_of_rows_that_just_fit_uint16_and_of_longer_ones(level: str, k: int) -> None:
    words, x = words_and_x(1, 2, k)
    columns = torch.tensor([5, 2**16 - 1, k - 1][: 2 if k == 2**16 else 3], dtype=torch.int32)
    values = torch.tensor([3.0, -4.0, 5.0])[: len(columns)].half()
    row_starts = torch.tensor([0, 0, len(columns)], dtype=torch.int32)
    narrow = columns.to(torch.uint16) if k == 2**16 else columns
    y = cpu.kernel("partial_linear", level)(
        x, PartialWeight(words, torch.ones(2, 1), "row", row_starts, narrow, values, None, k, k)
    )
    weight = signs_of(words, k)
    weight[1, columns.long()] = values.double()
    assert signal_to_noise(x.double() @ weight.T, y) > 105


def test_partial_takes_every_float16(level: str) -> None:
    values = torch.arange(2**16).to(torch.int16).view(torch.float16)
    values = values[values.isfinite()]
    n = len(values)
    row_starts, columns = torch.arange(n + 1).int(), torch.zeros(n, dtype=torch.uint16)
    words, alpha = torch.zeros(n, 1, dtype=torch.int32), torch.zeros(n, 1)
    y = cpu.kernel("partial_linear", level)(
        torch.ones(1, 1), PartialWeight(words, alpha, "row", row_starts, columns, values, None, 1, 1)
    )
    assert torch.equal(y[0], values.float())


def x_and_weight(op: str, m: int, n: int, k: int) -> tuple[Tensor, MixtureWeight | PartialWeight]:
    if op == "mixture_linear":
        x, *tensors = mixture_arguments(m, n, k, 4)
        return x, MixtureWeight(*tensors, k)
    (x, *rest), _ = partial_arguments(m, n, k, 0.1, "row", torch.int8)
    return x, PartialWeight(*rest, k)


@pytest.mark.parametrize("op", ["mixture_linear", "partial_linear"])
def test_the_number_of_threads_does_not_change_the_result(level: str, op: str) -> None:
    arguments = x_and_weight(op, 40, 700, 600)
    results = []
    for n_threads in (1, 2, 3, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        results.append(cpu.kernel(op, level)(*arguments))
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("op", ["mixture_linear", "partial_linear"])
def test_without_tokens_there_is_nothing_to_do(level: str, op: str) -> None:
    assert cpu.kernel(op, level)(*x_and_weight(op, 0, 5, 40)).shape == (0, 5)
