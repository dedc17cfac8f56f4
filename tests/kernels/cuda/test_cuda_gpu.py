"""The CUDA kernels on a real GPU, through the public ops: the comparisons that the CPU model makes, at larger sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fbitrain.kernels import cuda_linear, cuda_ops, cupy_backend, ops, reference
from fbitrain.kernels.dispatch import Call, select_backend
from fbitrain.kernels.layout import scale_shape
from fbitrain.kernels.weights import BinaryWeight

pytestmark = pytest.mark.gpu
PATTERNS = [("column", True), ("column", False), ("row", True), ("tensor", True), ("group", False)]
# N, K: odd sizes, then a layer of the 7b preset.
WEIGHTS = [(67, 95), (130, 1057), (4096, 4096)]
TOKENS = (1, 3, 17, 70, 512)


@pytest.fixture(autouse=True)
def a_gpu() -> None:
    """tests/conftest.py hides GPUs from the tests unless CUDA_VISIBLE_DEVICES names some."""
    if reason := cupy_backend.why_not():
        pytest.skip(f"no GPU test runs: {reason}; with one, CUDA_VISIBLE_DEVICES=0 pytest -m gpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_kernels_are_chosen() -> None:
    assert select_backend(Call("xnor_gemm", "cuda", torch.int32)).backend == "cuda"


@pytest.mark.parametrize("dtype", cuda_ops.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 31), (17, 1025), (2, 3, 2081), (4096, 4096)], ids=str)
def test_packing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = randn(*shape).to(dtype)
    words = ops.pack_signs(w.cuda())
    assert torch.equal(words.cpu(), reference.pack_signs(w))
    signs = ops.unpack_signs(words, shape[-1], dtype)
    assert torch.equal(signs.cpu(), reference.sign(w))


@pytest.mark.parametrize(("n", "k"), WEIGHTS)
@pytest.mark.parametrize("m", TOKENS)
def test_xnor_gemm_is_exact(m: int, n: int, k: int) -> None:
    a, b = reference.sign(randn(m, k)), reference.sign(randn(n, k, seed=1))
    product = ops.xnor_gemm(ops.pack_signs(a.cuda()), ops.pack_signs(b.cuda()), k)
    assert torch.equal(product.cpu().float(), a @ b.T)


@pytest.mark.parametrize("mode", ["float", "int8"])
@pytest.mark.parametrize("dtype", cuda_linear.DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "shift"), PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(67, 96), (130, 1056), (1024, 4096)])
def test_binary_linear_is_near_fp64(n: int, k: int, scale: str, shift: bool, dtype: torch.dtype, mode: str) -> None:
    shape = scale_shape(scale, n, k, 32)
    words = reference.pack_signs(randn(n, k))
    alpha, beta = randn(*shape, seed=1).abs() + 0.5, randn(*shape, seed=2) * 0.1 if shift else None
    for m in TOKENS:
        x = randn(m, k, seed=m).to(dtype)
        weight = BinaryWeight(words, alpha, beta, scale, k, 32)
        on_gpu = BinaryWeight(*(field.cuda() if isinstance(field, Tensor) else field for field in weight))
        y = ops.binary_linear(x.cuda(), on_gpu, mode).cpu().double()
        wanted = reference.binary_linear(x.double() if mode == "float" else x.float(), weight, mode).double()
        noise = float(20 * torch.log10(wanted.norm() / (y - wanted).norm().clamp_min(1e-300)))
        assert noise > {torch.float32: 100, torch.float16: 50, torch.bfloat16: 35}[dtype]


def test_int8_refuses_what_is_not_finite() -> None:
    x, words = randn(3, 64).cuda(), ops.pack_signs(randn(5, 64).cuda())
    x[1, 7] = float("nan")
    with pytest.raises(ValueError, match=r"row 1 of \[3, 64\] holds NaN or infinity"):
        ops.binary_linear(x, BinaryWeight(words, torch.ones(5, 1).cuda(), None, "row", 64, 0), "int8")


def test_launches_follow_the_stream_of_torch() -> None:
    """Without the stream's order, the kernel would read what the slow product before it has not written."""
    stream = torch.cuda.Stream()
    large = randn(4096, 4096).cuda()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        product = large
        for _ in range(8):
            product = (product @ large).clamp(-1, 1)
        words = ops.pack_signs(product)
    stream.synchronize()
    assert torch.equal(words.cpu(), reference.pack_signs(product.cpu()))
