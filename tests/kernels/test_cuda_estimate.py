"""The table of what the CUDA kernels can take at best: its arithmetic, and that docs/kernels.md shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbitrain.kernels.cuda_estimate import GPUS, OPS, SHAPES, TOKENS, bytes_of, dense_seconds, estimate, table
from fbitrain.kernels.cuda_plan import plan_xnor_gemm

A100 = GPUS[0]


def test_the_documentation_shows_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page, (
        "run python -m fbitrain.kernels.cuda_estimate and put its table into docs/kernels.md"
    )


def test_one_token_is_bound_by_reading_the_bits() -> None:
    found = estimate("xnor_gemm", 1, 4096, 4096, A100)
    assert found.kernel == "xnor_popc_1"
    assert found.bytes_moved == 4096 * 4096 // 8 + 4096 // 8 + 4096 * 4  # the weight, the token, the result
    assert found.bound == "memory"
    assert found.seconds["memory"] == found.bytes_moved / 2.04e12
    assert found.expected == pytest.approx(found.seconds["memory"] / 0.75 + 2e-6)


def test_temporaries_are_written_and_read() -> None:
    assert bytes_of(plan_xnor_gemm(100, 200, 64, 80)) == 100 * 200 * 4 + 2 * (100 + 200) * 4


def test_a_bit_plane_is_a_product_of_its_own() -> None:
    found = estimate("binary_linear int8", 1, 4096, 4096, A100)
    assert (found.kernel, found.unit, found.operations) == ("planes_1", "b1", 2 * 8 * 4096 * 4096)


def test_tokens_are_rounded_up_to_tiles() -> None:
    found = estimate("binary_linear float", 3, 4096, 4096, A100)
    assert (found.unit, found.operations) == ("bf16", 2 * 8 * 4096 * 4096)
    assert found.seconds["instructions"] == pytest.approx(4096 * 4096 / A100.instructions)


def test_a_dense_product_is_bound_as_its_data_sheet_says() -> None:
    assert dense_seconds(1, 4096, 4096, A100) == pytest.approx(2 * (4096**2 + 2 * 4096) / 2.04e12 / 0.75 + 2e-6)
    assert dense_seconds(4096, 4096, 4096, A100) == pytest.approx(2 * 4096**3 / 312e12 / 0.75 + 2e-6)


@pytest.mark.parametrize("op", OPS)
def test_nothing_beats_its_bound(op: str) -> None:
    for gpu in GPUS:
        for m in TOKENS:
            for n, k in SHAPES:
                found = estimate(op, m, n, k, gpu)
                assert found.expected > found.seconds[found.bound] >= max(found.seconds.values()) > 0
