"""The screened head against all logits: the same token always, also where its bounds decide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cpu, reference
from fbitrain.kernels.decoder import Decoder
from fbitrain.kernels.decoder_tensors import BinaryTensors, DecoderShape, DecoderTensors, LayerTensors

LEVELS = [level for level in ("portable", "avx2") if not cpu.levels()[level]]
pytestmark = pytest.mark.skipif(not LEVELS, reason="the compiled kernels do not run here")


def decoder_of(head: Tensor) -> Decoder:
    """The smallest decoder that has this head [V,D]."""
    vocabulary, d_model = head.shape
    shape = DecoderShape(1, d_model, 32, 1, 1, 2, vocabulary, 1e-5, "tensor", 0)

    def linear(n: int, k: int) -> BinaryTensors:
        return BinaryTensors(reference.pack_signs(torch.ones(n, k)), torch.ones(1, 1), None)

    by_k = [linear(2, d_model)] * 3 + [linear(d_model, 2)] + [linear(32, d_model)] * 2 + [linear(d_model, 32)]
    norm = torch.ones(d_model)
    return Decoder(shape, DecoderTensors([LayerTensors(*by_k, norm, norm)], head, head, norm, torch.ones(1)))


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def apart_in_the_last_bits(d_model: int) -> tuple[Tensor, Tensor]:
    """Rows that the codes cannot tell apart: their bounds of what was left out decide."""
    row = random(d_model)
    return row + 0.002 * random(90, d_model, seed=1), random(60, d_model, seed=2)


def exact_codes(d_model: int) -> tuple[Tensor, Tensor]:
    """Rows that codes hold exactly, almost the same, and inputs that int8 does not: the bounds of x decide."""
    rows = random(d_model).mul(9).round().clamp(-30, 30).repeat(90, 1)
    for number in range(90):
        rows[number, random(d_model, seed=number).argsort()[:9]] += 1
    rows[:, 0] = 31
    return rows, random(60, d_model, seed=2)


def ties(d_model: int) -> tuple[Tensor, Tensor]:
    return random(7, d_model)[torch.arange(90) % 7], random(20, d_model, seed=2)


def outliers(d_model: int) -> tuple[Tensor, Tensor]:
    """Rows of very different sizes, a column 300 times as large as the others, in the rows and in x."""
    rows, x = random(90, d_model) * 10 ** random(90, 1, seed=1), random(40, d_model, seed=2)
    rows[:45, 5] *= 300
    x[:20, 7] *= 300
    return rows, x


def tiny_and_zero(d_model: int) -> tuple[Tensor, Tensor]:
    rows, x = random(90, d_model) * 1e-6, random(8, d_model, seed=2)
    rows[::3] = 0
    x[2], x[3], x[4], x[5] = 0, x[3] * 1e-25, x[4] * 1e-15, x[5] * 1e-39
    return rows, x


def overflowing(d_model: int) -> tuple[Tensor, Tensor]:
    """Logits beyond what float32 holds, of finite weights (but in float16)."""
    return random(90, d_model) * 2e37, random(8, d_model, seed=2)


def as_far_off_as_codes_may_be(d_model: int) -> tuple[Tensor, Tensor]:
    """All that is left out of row 40 adds up, just more than what row 7 has more in its codes."""
    x = random(d_model).sign()
    rows = random(1, d_model).mul(9).round().clamp(-20, 20).repeat(90, 1)
    rows[:, 0] = 31
    rows[40, 1:] += 0.49 * x[1:]
    rows[7, 1 : 1 + 2 * d_model // 5] += x[1 : 1 + 2 * d_model // 5]
    return rows, x[None]


def as_far_off_as_int8_may_be(d_model: int) -> tuple[Tensor, Tensor]:
    """All that is left out of x adds up for row 40, just more than what row 7 has more in integers."""
    half = d_model // 2
    signs, rows = random(d_model).sign(), random(90, d_model).sign()
    rows[40], rows[7] = signs, torch.cat([signs[:half], -signs[half:]])
    x = torch.zeros(d_model)
    x[0] = 127 * signs[0]
    x[half : half + 2 * d_model // 10] -= signs[half : half + 2 * d_model // 10]
    x[1:] += 0.49 * signs[1:]
    return 31 * rows, x[None]


def not_finite_rows(d_model: int) -> tuple[Tensor, Tensor]:
    rows, x = random(90, d_model), random(8, d_model, seed=2)
    rows[11, 3], rows[12, 4], rows[60, 5] = torch.inf, -torch.inf, torch.inf
    return rows, x


def nan_rows(d_model: int) -> tuple[Tensor, Tensor]:
    rows, x = random(90, d_model), random(4, d_model, seed=2)
    rows[80, 3] = rows[83, 0] = torch.nan
    return rows, x


def not_finite_inputs(d_model: int) -> tuple[Tensor, Tensor]:
    x = random(4, d_model, seed=2)
    x[0, 1], x[1, 2], x[2, 3] = torch.nan, torch.inf, -torch.inf
    return random(90, d_model), x


CASES = [
    *(apart_in_the_last_bits, exact_codes, ties, outliers),
    *(as_far_off_as_codes_may_be, as_far_off_as_int8_may_be, overflowing),
    *(tiny_and_zero, not_finite_rows, nan_rows, not_finite_inputs),
]


@pytest.mark.parametrize("backend", LEVELS)
@pytest.mark.parametrize("d_model", [32, 129, 300])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_it_finds_the_token_that_all_logits_give(
    case: Callable[[int], tuple[Tensor, Tensor]], d_model: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FBITRAIN_BACKEND", backend)
    rows, x = case(d_model)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoder = decoder_of(rows.to(dtype))
        for hidden in x:
            assert decoder.likeliest(hidden[None]) == int(decoder.logits(hidden[None]).argmax())


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 4, 5, 63, 64, 65, 130, 257, 1000])
@pytest.mark.parametrize("threads", [1, 3])
def test_vocabularies_of_every_size(vocabulary: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = random(vocabulary, 700)
    decoder = decoder_of(rows)
    for token in range(0, vocabulary, 1 + vocabulary // 60):  # the token whose own row is the input
        assert (
            decoder.likeliest(rows[token : token + 1]) == int(decoder.logits(rows[token : token + 1]).argmax()) == token
        )


def test_levels_make_the_same_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random(50, 300)
    made = []
    for level in LEVELS:
        monkeypatch.setenv("FBITRAIN_BACKEND", level)
        decoder = decoder_of(rows)
        decoder.likeliest(rows[:1])
        assert decoder._screen is not None
        made.append(decoder._screen)
    assert all(torch.equal(screen.codes, made[0].codes) for screen in made)
    assert all(torch.equal(screen.bounds, made[0].bounds) for screen in made)
    scales, kept, lost = made[0].bounds
    norms = rows.double().norm(dim=1)
    assert (kept + lost >= norms).all()
    assert (lost <= 0.06 * norms).all()  # 6 bits leave out a thirtieth of what is evenly spread
    assert torch.equal(scales, rows.abs().amax(1) / 31)


def test_what_is_not_one_token_is_refused() -> None:
    decoder = decoder_of(random(9, 64))
    for hidden in (torch.zeros(2, 64), torch.zeros(1, 63), torch.zeros(1, 64).double(), torch.zeros(0, 64)):
        with pytest.raises(
            ValueError, match=r"hidden is torch.float.* \[M, 64\]|must be torch.float32 \[1, 64\] on cpu"
        ):
            decoder.likeliest(hidden)
