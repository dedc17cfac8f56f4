"""The compiled kernels, every instruction set in turn: integers exactly, floats by their signal-to-noise ratio."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cpu, reference
from fbitrain.kernels.layout import SCALES, scale_shape
from fbitrain.kernels.weights import BinaryWeight

WIDTHS = (1, 31, 32, 33, 63, 65, 511, 4096)
# Tokens and rows around what tiles and panels hold: 1 to 6 tokens a tile, 56 or 60 a task; 64 rows a panel.
SHAPES = [(1, 1), (2, 63), (3, 64), (5, 65), (6, 7), (7, 130), (61, 5)]


@pytest.mark.parametrize("level", cpu.LEVELS)
def test_this_machine_runs(level: str) -> None:
    """Skips what this machine lacks; the tests below run AVX-512 and AMX emulated, here as everywhere."""
    if why_not := cpu.levels()[level]:
        pytest.skip(f"{level}: {why_not}")
    assert cpu.kernel("pack_signs", level)(torch.ones(33)).tolist() == [-1, 1]


def signs(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1).float()


def signal_to_noise(wanted: Tensor, got: Tensor) -> float:
    """In dB."""
    noise = (got.double() - wanted.double()).norm()
    return float(20 * torch.log10(wanted.double().norm() / noise.clamp_min(1e-300)))


@pytest.mark.parametrize("k", WIDTHS)
def test_xnor_gemm_is_exact(level: str, k: int) -> None:
    for m, n in SHAPES:
        a, b = signs(m, k, seed=k), signs(n, k, seed=k + 1)
        product = cpu.kernel("xnor_gemm", level)(reference.pack_signs(a), reference.pack_signs(b), k)
        assert product.dtype == torch.int32
        assert torch.equal(product.float(), a @ b.T)


def test_xnor_gemm_of_thousands_of_tokens(level: str) -> None:
    a, b = signs(1963, 70, seed=0), signs(66, 70, seed=1)
    product = cpu.kernel("xnor_gemm", level)(reference.pack_signs(a), reference.pack_signs(b), 70)
    assert torch.equal(product.float(), a @ b.T)


@pytest.mark.parametrize(("m", "n"), [(4, 5), (1, 3)])
def test_xnor_gemm_at_its_extremes(level: str, m: int, n: int) -> None:
    """All bits equal and all bits different: the largest counts that the byte sums must hold."""
    k = 4096
    ones, minus = torch.full((m, 128), -1, dtype=torch.int32), torch.zeros(n, 128, dtype=torch.int32)
    run = cpu.kernel("xnor_gemm", level)
    assert (run(ones, minus, k) == -k).all()
    assert (run(ones, torch.full((n, 128), -1, dtype=torch.int32), k) == k).all()


def linear_inputs(m: int, n: int, k: int, scale: str, beta: bool, group_size: int) -> tuple[Tensor, ...]:
    torch.manual_seed(m * 7919 + n * 31 + k)
    shape = scale_shape(scale, n, k, group_size)
    x, words = torch.randn(m, k), reference.pack_signs(torch.randn(n, k))
    return x, words, torch.rand(shape) + 0.5, torch.randn(shape) * 0.1 if beta else None


PATTERNS = [
    (scale, beta) for scale, beta in itertools.product(SCALES, [False, True]) if not (beta and scale == "group")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
@pytest.mark.parametrize("k", WIDTHS)
def test_float_mode_is_near_fp64(level: str, k: int, scale: str, beta: bool, dtype: torch.dtype) -> None:
    group_size = 32
    if scale == "group":
        k = -(-k // 32) * 32  # groups are whole words
    for m, n in SHAPES if dtype == torch.float32 else SHAPES[1:4]:
        x, words, alpha, shift = linear_inputs(m, n, k, scale, beta, group_size)
        x = x.to(dtype)
        y = cpu.kernel("binary_linear", level)(x, BinaryWeight(words, alpha, shift, scale, k, group_size))
        assert y.dtype == dtype
        assert y.shape == (m, n)
        alpha, shift = alpha.to(dtype).double(), None if shift is None else shift.to(dtype).double()
        wanted = reference.binary_linear(x.double(), BinaryWeight(words, alpha, shift, scale, k, group_size))
        assert signal_to_noise(wanted, y) > (110 if dtype == torch.float32 else 45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", ["column", "row", "tensor"])
@pytest.mark.parametrize("k", WIDTHS)
def test_int8_mode_without_shift_is_exact(level: str, k: int, scale: str, dtype: torch.dtype) -> None:
    for m, n in SHAPES if dtype == torch.float32 else SHAPES[1:4]:
        x, words, alpha, _ = linear_inputs(m, n, k, scale, False, k)
        arguments = (x.to(dtype), BinaryWeight(words, alpha, None, scale, k, k), "int8")
        assert torch.equal(cpu.kernel("binary_linear", level)(*arguments), reference.binary_linear(*arguments))


@pytest.mark.parametrize(("k", "group_size"), [(64, 32), (512, 128), (1152, 384), (2048, 1024), (768, 768), (352, 352)])
@pytest.mark.parametrize("mode", ["float", "int8"])
def test_groups_that_are_smaller_and_larger_than_a_panel(level: str, k: int, group_size: int, mode: str) -> None:
    """α are powers of two, so that the sum over groups is exact in any order, and int8 must agree to the bit."""
    for m, n in SHAPES:
        x, words, alpha, _ = linear_inputs(m, n, k, "group", False, group_size)
        alpha = torch.exp2(torch.randint(-2, 3, alpha.shape).float())
        arguments = (x, BinaryWeight(words, alpha, None, "group", k, group_size), mode)
        y, wanted = cpu.kernel("binary_linear", level)(*arguments), reference.binary_linear(*arguments)
        assert torch.equal(y, wanted) if mode == "int8" else signal_to_noise(wanted, y) > 110


@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
def test_int8_mode_with_shift_is_near_its_reference(level: str, scale: str, beta: bool) -> None:
    for m, n in [(1, 65), (7, 130), (490, 70)]:
        x, words, alpha, shift = linear_inputs(m, n, 768, scale, beta, 128)
        arguments = (x, BinaryWeight(words, alpha, shift, scale, 768, 128), "int8")
        y, wanted = cpu.kernel("binary_linear", level)(*arguments), reference.binary_linear(*arguments)
        assert signal_to_noise(wanted, y) > 110
        exact = reference.binary_linear(x.double(), arguments[1])
        assert signal_to_noise(exact, y) > 30


def test_int8_mode_at_its_extremes(level: str) -> None:
    """Every activation at ±127 steps, every bit set or clear: the largest sums that 16 bits must hold."""
    for k, m in itertools.product([512, 4096, 4097], [1, 6, 7]):
        words = torch.stack([reference.pack_signs(torch.ones(k)), reference.pack_signs(-torch.ones(k))])
        for value in (127.0, -127.0):
            x = torch.full((m, k), value)
            y = cpu.kernel("binary_linear", level)(
                x, BinaryWeight(words, torch.ones(1, 1), None, "tensor", k, k), "int8"
            )
            assert torch.equal(y, torch.tensor([[value * k, -value * k]]).expand(m, 2))


@pytest.mark.parametrize("n_words", [1, 2, 7, 8, 9, 15, 16, 17, 128, 130])
def test_interleaved_bits_change_no_result(level: str, n_words: int) -> None:
    """Passes of 8 and 16 words, reads of 128; panels of 64 rows; one token, two, and what is looked up anyway."""
    k = 32 * n_words - n_words % 3
    for m, n in [(1, 1), (1, 65), (2, 63), (3, 129), (57, 64)]:
        for scale, group_size in (("row", k), ("column", k), ("group", 32 * n_words)):
            width = group_size if scale == "group" else k
            x, words, alpha, _ = linear_inputs(m, n, width, scale, False, group_size)
            arguments = (x, BinaryWeight(words, alpha, None, scale, width, group_size), "int8")
            interleaved = cpu.interleave(level, words, width)
            assert (interleaved is None) == (level != "avx2")
            if interleaved is None:
                return  # nothing that the tests above do not see
            y = cpu.kernel("binary_linear", level)(*arguments, interleaved=interleaved)
            assert torch.equal(y, reference.binary_linear(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "beta"), PATTERNS)
@pytest.mark.parametrize("k", WIDTHS)
def test_floats_in_digits_are_near_fp64(level: str, k: int, scale: str, beta: bool, dtype: torch.dtype) -> None:
    """With bits in order floats are put in fixed point; one column is a hundred times as large as the others."""
    if scale == "group":
        k = -(-k // 32) * 32
    for m, n in SHAPES if dtype == torch.float32 else SHAPES[1:4]:
        x, words, alpha, shift = linear_inputs(m, n, k, scale, beta, 32)
        x[:, k // 2] *= 100
        x = x.to(dtype)
        interleaved = cpu.interleave(level, words, k)
        if interleaved is None:
            return  # this level puts no bits in order
        y = cpu.kernel("binary_linear", level)(x, BinaryWeight(words, alpha, shift, scale, k, 32), "float", interleaved)
        assert y.dtype == dtype
        alpha, shift = alpha.to(dtype).double(), None if shift is None else shift.to(dtype).double()
        wanted = reference.binary_linear(x.double(), BinaryWeight(words, alpha, shift, scale, k, 32))
        assert signal_to_noise(wanted, y) > (110 if dtype == torch.float32 else 45)


def test_floats_in_digits_that_are_integers_are_exact(level: str) -> None:
    """Every digit at both its ends, in every column and row: the largest sums that 16 and 32 bits must hold."""
    largest = 127 * 65536  # digits 127, 0, 0; a step is 1 where a token holds it
    worst = [127 * 65536 - 32640, -127 * 65536, 126 * 65536 + 32639, -126 * 65536 - 32896, 128, -129, 255, 1, 0]
    for k in (288, 512, 4097):
        words = torch.stack([reference.pack_signs(torch.ones(k)), reference.pack_signs(-torch.ones(k))])
        interleaved = cpu.interleave(level, words, k)
        if interleaved is None:
            return  # this level puts no bits in order
        for value in worst:
            x = torch.full((3, k), float(value), dtype=torch.float64)
            x[:, -1] = largest
            total = value * (k - 1) + largest
            y = cpu.kernel("binary_linear", level)(
                x.float(), BinaryWeight(words, torch.ones(1, 1), None, "tensor", k, k), "float", interleaved
            )
            assert torch.equal(y, torch.tensor([[total, -total]], dtype=torch.float64).float().expand(3, 2))


def test_floats_in_digits_do_not_depend_on_their_neighbours(level: str) -> None:
    x, words, alpha, shift = linear_inputs(131, 67, 1100, "column", True, 128)
    interleaved = cpu.interleave(level, words, 1100)
    if interleaved is None:
        return  # this level puts no bits in order

    def run(x: Tensor) -> Tensor:
        return cpu.kernel("binary_linear", level)(
            x, BinaryWeight(words, alpha, shift, "column", 1100, 128), "float", interleaved
        )

    together = run(x)
    assert torch.equal(together, torch.cat([run(x[i : i + 1]) for i in range(131)]))
    assert torch.equal(together[5:64], run(x[5:64]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-44])
def test_floats_that_have_no_digits_are_multiplied_as_floats(level: str, value: float) -> None:
    """What holds NaN or infinity, or is too small to be divided by its largest value, as if no bits were in order."""
    x, words, alpha, shift = linear_inputs(70, 65, 500, "row", True, 128)
    x[66] = x[66] * 1e-44 if value == 1e-44 else x[66]
    x[66, 3] = value
    arguments = (x, BinaryWeight(words, alpha, shift, "row", 500, 128), "float")
    y = cpu.kernel("binary_linear", level)(*arguments, interleaved=cpu.interleave(level, words, 500))
    assert torch.equal(y.nan_to_num(7.0), cpu.kernel("binary_linear", level)(*arguments).nan_to_num(7.0))


@pytest.mark.parametrize("n_words", range(1, 18))
def test_int8_mode_at_every_width_of_a_block(level: str, n_words: int) -> None:
    """A block is 16 words. AVX2 looks up from 3 tokens on, 8 or 16 words of 2 tokens, 60 tokens a slab."""
    k = 32 * n_words - n_words % 3
    for m, n in [(2, 65), (3, 63), (4, 129), (5, 1), (57, 64)]:
        x, words, alpha, _ = linear_inputs(m, n, k, "row", False, k)
        arguments = (x, BinaryWeight(words, alpha, None, "row", k, k), "int8")
        assert torch.equal(cpu.kernel("binary_linear", level)(*arguments), reference.binary_linear(*arguments))


def test_int8_mode_of_slabs_that_wide_rows_make_small(level: str) -> None:
    x, words, alpha, _ = linear_inputs(27, 3, 11008, "tensor", False, 11008)
    arguments = (x, BinaryWeight(words, alpha, None, "tensor", 11008, 11008), "int8")
    assert torch.equal(cpu.kernel("binary_linear", level)(*arguments), reference.binary_linear(*arguments))


@pytest.mark.parametrize("k", [4, 32, 224, 256, 288, 512, 2049])
def test_int8_mode_where_rows_select_what_has_one_sign(level: str, k: int) -> None:
    """x is ±127 everywhere; rows select all that is positive or negative in a token, all or nothing: the largest
    and the least sums of 4, 32, 256 and more columns."""
    for m in (2, 3, 4, 57):
        x = 127 * signs(m, k, seed=m)
        weight = torch.cat([x, -x, torch.ones(1, k), -torch.ones(1, k)]).sign()
        words = reference.pack_signs(weight)
        y = cpu.kernel("binary_linear", level)(x, BinaryWeight(words, torch.ones(1, 1), None, "tensor", k, k), "int8")
        assert torch.equal(y, x @ weight.T)


def fours_that_add_up_to(high_parts: Tensor, seed: int) -> Tensor:
    """Columns [K] of any signs, whose magnitudes add up, four by four, to 16 * high_parts [K / 4] + 15."""
    sizes = (4 * high_parts[:, None] + torch.tensor([4, 4, 4, 3])).clamp(0, 127).flatten()
    return sizes * signs(len(sizes), seed=seed)


@pytest.mark.parametrize("n_words", [4, 9, 16, 17, 40])
def test_int8_mode_where_bytes_of_lookups_are_full(level: str, n_words: int) -> None:
    """High parts of two neighbouring words add up to 255, the most that AVX2 adds up in a byte, or to one more, beside
    tokens of little magnitude."""
    k, tokens = 32 * n_words, []
    for number, first in enumerate([0, 1, 3, n_words - 3] * 2):
        high_parts = torch.full((8 * n_words,), 3)
        high_parts[8 * first : 8 * first + 16] = 16
        high_parts[8 * first] -= int(number < 4)
        x = fours_that_add_up_to(high_parts, number)
        x[-1] = 127  # so that a step is 1
        tokens.append(x)
    x = torch.stack(tokens)[torch.tensor([0, 1, 4, 2, 5, 6, 7, 3, 3])]  # pairs of one kind and of both
    weight = torch.cat([x.sign(), -x.sign(), torch.ones(1, k), -torch.ones(1, k), signs(50, k, seed=0)])
    words = reference.pack_signs(weight)
    for m in (1, 2, 3, 9):
        for interleaved in (None, cpu.interleave(level, words, k)):
            y = cpu.kernel("binary_linear", level)(
                x[-m:], BinaryWeight(words, torch.ones(1, 1), None, "tensor", k, k), "int8", interleaved
            )
            assert torch.equal(y, x[-m:] @ weight.T)
    for group_size in (32, 96) if n_words % 3 == 0 else (32,):  # sums that begin at any word
        alpha = torch.ones(len(weight), k // group_size)
        y = cpu.kernel("binary_linear", level)(x, BinaryWeight(words, alpha, None, "group", k, group_size), "int8")
        assert torch.equal(y, x @ weight.T)


def test_int8_mode_of_millions_of_columns(level: str) -> None:
    k = 2**21
    words, x = torch.full((1, k // 32), -1, dtype=torch.int32), torch.full((1, k), 127.0)
    y = cpu.kernel("binary_linear", level)(x, BinaryWeight(words, torch.ones(1, 1), None, "tensor", k, k), "int8")
    assert y.item() == 127 * k


def test_int8_mode_names_the_first_token_that_it_refuses(level: str) -> None:
    x, words, alpha, _ = linear_inputs(9, 5, 96, "tensor", False, 96)
    x[[2, 4, 8], 7] = float("nan")
    with pytest.raises(ValueError, match=r"row 2 of \[9, 96\] holds NaN"):
        cpu.kernel("binary_linear", level)(x, BinaryWeight(words, alpha, None, "tensor", 96, 96), "int8")


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-39, 1.2e-38, 1e-30, 1e30, 3e38])
def test_int8_mode_of_tiny_and_huge_tokens(level: str, magnitude: float) -> None:
    x, words, _, _ = linear_inputs(3, 9, 96, "tensor", False, 96)
    x = x / x.abs().max() * magnitude
    arguments = (x, BinaryWeight(words, torch.full((1, 1), 0.01), None, "tensor", 96, 96), "int8")
    assert torch.equal(cpu.kernel("binary_linear", level)(*arguments), reference.binary_linear(*arguments))


def test_float_mode_passes_nan_and_infinity_on(level: str) -> None:
    x, words, alpha, _ = linear_inputs(3, 70, 100, "column", False, 100)
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    y = cpu.kernel("binary_linear", level)(x, BinaryWeight(words, alpha, None, "column", 100, 100))
    assert y[0].isnan().all()
    assert y[1].isinf().all()
    assert y[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", WIDTHS)
def test_pack_and_unpack_agree_with_the_reference(level: str, k: int, dtype: torch.dtype) -> None:
    """Each packs what the other unpacks, strided rows and all kinds of zero, NaN and infinity among them."""
    w = torch.randn(k, 5, 2, generator=torch.Generator().manual_seed(k)).to(dtype).permute(2, 1, 0)
    special = torch.tensor([0.0, -0.0, float("nan"), -float("nan"), float("inf"), -float("inf")], dtype=dtype)
    w[0, 0, : len(special)] = special[:k]
    words = cpu.kernel("pack_signs", level)(w)
    assert torch.equal(words, reference.pack_signs(w))
    unpack = cpu.kernel("unpack_signs", level)
    assert torch.equal(unpack(words, k, dtype), reference.unpack_signs(words, k, dtype))
    assert torch.equal(unpack(words[:, ::2], k, dtype), reference.unpack_signs(words[:, ::2], k, dtype))


@pytest.mark.parametrize("shape", [(0, 33), (2, 0, 33), (3, 0)])
def test_empty_inputs(level: str, shape: tuple[int, ...]) -> None:
    words = cpu.kernel("pack_signs", level)(torch.empty(shape))
    assert words.shape == (*shape[:-1], -(-shape[-1] // 32))
    assert cpu.kernel("unpack_signs", level)(words, shape[-1], torch.float32).shape == shape
    a, b = torch.empty(0, 2, dtype=torch.int32), torch.zeros(3, 2, dtype=torch.int32)
    assert cpu.kernel("xnor_gemm", level)(a, b, 40).shape == (0, 3)
    assert (cpu.kernel("xnor_gemm", level)(torch.empty(2, 0).int(), torch.empty(3, 0).int(), 0) == 0).all()
    x, alpha = torch.empty(2, 0, 40), torch.rand(1, 40)
    assert cpu.kernel("binary_linear", level)(x, BinaryWeight(b, alpha, None, "column", 40, 1)).shape == (2, 0, 3)


def test_the_default_device_does_not_matter(level: str) -> None:
    w = signs(70, 40, seed=0)
    with torch.device("meta"):
        words = cpu.kernel("pack_signs", level)(w)
        back = cpu.kernel("unpack_signs", level)(words, 40, torch.float32)
        product = cpu.kernel("xnor_gemm", level)(words, words, 40)
        transposed = cpu.transpose_signs(words, 40)
    assert torch.equal(back, w)
    assert torch.equal(product.float(), w @ w.T)
    assert torch.equal(transposed, reference.pack_signs(w.T))


def test_the_number_of_threads_does_not_change_the_result(level: str) -> None:
    x, words, alpha, beta = linear_inputs(40, 700, 600, "column", True, 600)
    results = []
    for n_threads in (1, 2, 3, 7):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        results.append(cpu.kernel("binary_linear", level)(x, BinaryWeight(words, alpha, beta, "column", 600, 600)))
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
