"""Products with the signs of latent weights: from bits and by torch alike, and when which is chosen."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cpu, reference, training
from fbitrain.kernels.training import sign_matmul, sign_matmul_of_gradient

needs_library = pytest.mark.skipif(
    bool(cpu.levels()["portable"]), reason=f"no compiled kernels: {cpu.levels()['portable']}"
)


def signal_to_noise(wanted: Tensor, got: Tensor) -> float:
    """In dB."""
    noise = (got.double() - wanted.double()).norm()
    return float(20 * torch.log10(wanted.double().norm() / noise.clamp_min(1e-300)))


@pytest.fixture
def from_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits are used whatever this machine's backend and the sizes are."""
    monkeypatch.setattr(training, "pays", lambda *sizes: True)


@needs_library
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 65), (32, 32), (600, 31), (513, 1000)])
def test_transposed_bits(n: int, k: int) -> None:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    words = cpu.transpose_signs(reference.pack_signs(weight), k)
    assert torch.equal(words, reference.pack_signs(weight.T))


@needs_library
def test_nothing_to_transpose() -> None:
    assert cpu.transpose_signs(torch.zeros(0, 2, dtype=torch.int32), 40).shape == (40, 0)
    assert cpu.transpose_signs(torch.zeros(3, 0, dtype=torch.int32), 0).shape == (0, 1)


@needs_library
@pytest.mark.usefixtures("from_bits")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 5), (70, 65, 33), (130, 200, 300)])
def test_products_are_those_of_the_signs(m: int, n: int, k: int) -> None:
    torch.manual_seed(m)
    weight, z, dy = torch.randn(n, k), torch.randn(m, k), torch.randn(n, m).T
    weight[0, 0], weight[-1, -1] = 0.0, -0.0
    signs = torch.where(weight >= 0, 1.0, -1.0).double()
    assert signal_to_noise(z.double() @ signs.T, sign_matmul(z, weight)) > 105
    assert signal_to_noise(dy.double() @ signs, sign_matmul_of_gradient(dy, weight)) > 105


@needs_library
@pytest.mark.usefixtures("from_bits")
def test_under_autocast_torch_multiplies_in_its_dtype() -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for product in (sign_matmul, sign_matmul_of_gradient):
            assert product(torch.ones(3, 40), weight).dtype == torch.bfloat16


@needs_library
@pytest.mark.usefixtures("from_bits")
def test_the_backend_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(4))
    sign_matmul(torch.ones(3, 40), weight)
    monkeypatch.setattr(cpu, "levels", None)  # what a choice would ask
    assert sign_matmul(torch.ones(3, 40), weight).shape == (3, 40)


@pytest.mark.parametrize(
    ("backend", "dtype", "m", "pays"),
    [
        ("avx2", torch.float32, 512, True),
        ("avx2", torch.float32, 1, False),
        ("avx2", torch.bfloat16, 512, False),
        ("avx512", torch.float32, 512, True),
        ("amx", torch.float32, 512, True),
        ("amx", torch.bfloat16, 512, False),
        ("reference", torch.float32, 512, False),
    ],
)
def test_the_way_is_chosen_by_backend_dtype_and_size(backend: str, dtype: torch.dtype, m: int, pays: bool) -> None:
    assert training.pays(backend, dtype, m, 768, 768) is pays


@needs_library
@pytest.mark.usefixtures("from_bits")
@pytest.mark.parametrize("product", [sign_matmul, sign_matmul_of_gradient])
def test_other_devices_and_dtypes_go_to_torch(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    weight = torch.randn(40, 40, generator=torch.Generator().manual_seed(2))
    assert product(torch.ones(3, 40, dtype=torch.bfloat16), weight).dtype == torch.bfloat16
    assert product(torch.ones(3, 40, device="meta"), weight.to("meta")).shape == (3, 40)
