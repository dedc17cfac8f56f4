"""What is counted as a sign: the bits that a method takes from its weights, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fbitrain.kernels.reference import sign
from fbitrain.model.config import BinarizeConfig, has_signs_of_weights
from fbitrain.model.linear import BinaryLinear
from fbitrain.model.method_table import METHODS
from fbitrain.model.methods import FullLinear, make_layer
from fbitrain.model.partial import PartialBinaryLinear
from fbitrain.shards import Fragment
from fbitrain.tracking import SignTracker

N, K = 5, 9


def engine_of(layer: nn.Module, cut: int) -> Any:
    """Holds the layer's weight as two flat slices, as ZeRO may."""
    flat = layer.get_parameter("weight").detach().flatten()

    def fragments() -> Any:
        for start, stop in ((0, cut), (cut, N * K)):
            yield Fragment("layer.weight", (N, K), start, stop, flat[start:stop], {})

    shards = SimpleNamespace(fragments=fragments)
    return SimpleNamespace(student=SimpleNamespace(lm=nn.ModuleDict({"layer": layer})), shards=shards)


def shares(layer: nn.Module, flip: Tensor, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What is seen when the weights at `flip`, bool [N, K], change their signs and come close to zero."""
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)
    tracker = SignTracker(engine_of(layer, 13), ["layer"], 1e-3, torch.device("cpu"))
    with torch.no_grad():
        layer.get_parameter("weight")[flip] *= -1e-5
    return tracker.look()


def test_every_flip_of_a_binary_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    flip = torch.arange(N * K).view(N, K) % 4 == 0
    seen = shares(BinaryLinear(K, N, init_std=1.0), flip, monkeypatch)
    share = pytest.approx(flip.float().mean().item())
    assert seen == {"signs/flipped": share, "signs/near_zero": share, "signs_flipped/layer": share}


def test_salient_weights_have_no_sign_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.arange(N * K).view(N, K) % 3 == 0
    flip = torch.arange(N * K).view(N, K) < 10  # more of the salient ones than of the others
    layer = PartialBinaryLinear(K, N, mask=mask, salient_dtype="float16", trained=True, init_std=1.0)
    seen = shares(layer, flip, monkeypatch)
    share = pytest.approx(((flip & ~mask).sum() / (~mask).sum()).item())
    assert seen == {"signs/flipped": share, "signs/near_zero": share, "signs_flipped/layer": share}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.routed])
def test_signs_are_watched_where_they_are_the_weights_own(method: str) -> None:
    binarize = BinarizeConfig(method=method, scale="row", beta=False)
    if METHODS[method].salient == "trained":
        binarize = replace(binarize, salient=replace(binarize.salient, dtype="float16"))
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False)
    nn.init.uniform_(linear.weight, -0.5, 1.0)  # a mean that is not 0
    full = FullLinear.of(linear)
    assert full is not None
    mask = torch.zeros(N, K, dtype=torch.bool) if METHODS[method].salient else None
    layer = make_layer(full, binarize, mask, 0.0)
    weight = layer.effective_weight().detach()
    same = torch.equal(sign(weight), sign(linear.weight.detach())) and bool((weight != 0).all())
    assert same == has_signs_of_weights(binarize)


def test_codes_of_several_bits_are_not_signs() -> None:
    assert not has_signs_of_weights(BinarizeConfig(method="cherry", bits=3))
