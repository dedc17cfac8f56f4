"""Bits per weight, added up by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fbitrain.model.build import binarize_
from fbitrain.model.config import BinarizeConfig, SalientConfig
from fbitrain.model.salience import select_mask
from fbitrain.model.storage import salient_count, storage_bits

ROW = {"scale": "row", "beta": False}


@pytest.mark.parametrize(
    ("binarize", "parts"),
    [
        # 100 columns take 4 words; 10 rows of them 1280 bits.
        (BinarizeConfig(), {"signs": 1280, "scales": 2 * 100 * 32}),
        (BinarizeConfig(scale="group", beta=False, group_size=20), {"signs": 1280, "scales": 50 * 32}),
        (BinarizeConfig(method="onebit"), {"signs": 1280, "scales": 110 * 32}),
        (
            BinarizeConfig(method="mixture_of_scales", n_experts=3),
            {"signs": 1280, "scales": 3 * 110 * 32, "router": 300 * 32},
        ),
        (BinarizeConfig(method="bnn"), {"signs": 1280, "scales": 32}),
        (BinarizeConfig(method="recu"), {"signs": 1280, "scales": 320}),
        (BinarizeConfig(method="bitnet"), {"signs": 1280, "scales": 32}),
        (BinarizeConfig(method="ternary"), {"codes": 2560, "scales": 32}),
        # 100 salient weights: a mask of 1280 bits is smaller than 11 row starts and 100 columns, 352 + 1600.
        (
            BinarizeConfig(method="partial", **ROW),
            {"signs": 1280, "mask": 1280, "salient": 800, "scales": 10 * 32 + 10 * 32},
        ),
        # 4 salient weights: 352 + 64.
        (
            BinarizeConfig(method="cherry", bits=3, salient=SalientConfig(fraction=0.004, dtype="float16"), **ROW),
            {"codes": 3840, "csr": 416, "salient": 64, "scales": 320},
        ),
    ],
)
def test_bits_of_a_10_by_100_layer(binarize: BinarizeConfig, parts: dict[str, int]) -> None:
    assert storage_bits(binarize, 10, 100) == parts


def test_columns_beyond_16_bits() -> None:
    sparse = BinarizeConfig(method="partial", salient=SalientConfig(fraction=1e-5), **ROW)
    narrow, wider = storage_bits(sparse, 2, 2**16), storage_bits(sparse, 2, 2**16 + 32)
    assert (narrow["csr"], narrow["salient"]) == (3 * 32 + 1 * 16, 8)
    assert (wider["csr"], wider["salient"]) == (3 * 32 + 1 * 32, 8)


def test_pb_llm_at_ten_percent() -> None:
    """The paper counts 1 bit for signs, 1 for the mask and 8 for each of the 10 %: 2.8, beside the scales."""
    parts = storage_bits(BinarizeConfig(method="partial", **ROW), 4096, 4096)
    scales = parts.pop("scales")
    assert sum(parts.values()) / 4096**2 == pytest.approx(2.8, abs=1e-6)
    assert scales / 4096**2 == pytest.approx(64 / 4096)


@pytest.mark.parametrize("scope", ["layer", "row", "group"])
@pytest.mark.parametrize("fraction", [0.004, 0.1, 0.5])
def test_the_count_is_that_of_the_selected_mask(fraction: float, scope: str) -> None:
    salient = SalientConfig(fraction=fraction, scope=scope)
    binarize = BinarizeConfig(method="partial", group_size=20, salient=salient, **ROW)
    weight = torch.randn(7, 60, generator=torch.Generator().manual_seed(0))
    mask = select_mask(weight.abs(), fraction, scope, 20)
    assert salient_count(binarize, 7, 60) == int(mask.sum())
    linear = nn.Linear(60, 7, bias=False)
    linear.weight.data = weight
    report = binarize_(nn.Sequential(linear), replace(binarize, skip=[]), masks={"0": mask})
    assert report.stored_bits == sum(storage_bits(binarize, 7, 60).values())
