"""The torch operators: schemas and fakes, checks with shapes in them, and which backend is chosen."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fbitrain.kernels import ops, reference
from fbitrain.kernels.ops import Availability, Backend, BackendError, select_backend

K = 65
WORDS_N = reference.pack_signs(torch.randn(6, K, generator=torch.Generator().manual_seed(0)))
WORDS_M = reference.pack_signs(torch.randn(4, K, generator=torch.Generator().manual_seed(1)))
X = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2))
ALPHA, BETA = torch.rand(1, K), torch.rand(1, K)

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("pack_signs", (X,)),
    ("pack_signs", (X.transpose(1, 2).bfloat16(),)),
    ("unpack_signs", (WORDS_N, K, torch.bfloat16)),
    ("xnor_gemm", (WORDS_M, WORDS_N, K)),
    ("binary_linear", (X, WORDS_N, ALPHA, BETA, "column", K, 1)),
    ("binary_linear", (X.transpose(0, 1), WORDS_N, torch.rand(6, 1), None, "row", K, 1)),
    ("binary_linear", (X[:, :0], WORDS_N, torch.rand(6, 13), None, "group", K, 5)),
]


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_opcheck(op: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fbitrain, op).default, args)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_op_runs_the_reference(op: str, args: tuple[Any, ...]) -> None:
    result = getattr(ops, op)(*args)
    assert torch.equal(result, getattr(reference, op)(*args))
    assert result.is_contiguous()


def test_ops_are_traced_whole() -> None:
    def compute(w: torch.Tensor) -> torch.Tensor:
        words = ops.pack_signs(w)
        return ops.xnor_gemm(words, words, w.shape[1]) + ops.unpack_signs(words, w.shape[1], torch.float32).sum()

    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (40, 33):
        assert torch.equal(compiled(w[:, :width]), compute(w[:, :width]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.pack_signs(torch.ones(3, dtype=torch.int32)), r"float tensor \[..., K\], not int32 \[3\]"),
        (lambda: ops.pack_signs(torch.tensor(1.0)), r"not float32 \[\]"),
        (
            lambda: ops.unpack_signs(WORDS_N, 97, torch.float32),
            r"int32 \[..., 4\] to hold 97 bits a row, not int32 \[6, 3\]",
        ),
        (lambda: ops.unpack_signs(WORDS_N.long(), K, torch.float32), r"not int64 \[6, 3\]"),
        (lambda: ops.unpack_signs(WORDS_N, K, torch.int8), "gives a float dtype, not torch.int8"),
        (
            lambda: ops.xnor_gemm(WORDS_M, WORDS_N[:, :2], K),
            r"xnor_gemm: b must be int32 \[rows, 3\].*not int32 \[6, 2\]",
        ),
        (lambda: ops.xnor_gemm(WORDS_M[0], WORDS_N, K), r"a must be int32 \[rows, 3\].*not int32 \[3\]"),
        (lambda: ops.xnor_gemm(WORDS_M, WORDS_N.to("meta"), K), "on one device, not on cpu and meta"),
        (
            lambda: ops.binary_linear(X[..., 1:], WORDS_N, ALPHA, None, "column", K, 1),
            r"x \[..., 65\], not .*\[2, 3, 64\]",
        ),
        (lambda: ops.binary_linear(X.int(), WORDS_N, ALPHA, None, "column", K, 1), "needs a float x"),
        (
            lambda: ops.binary_linear(X, WORDS_N, ALPHA, None, "row", K, 1),
            r"alpha of scale='row' must be float \[6, 1\]",
        ),
        (
            lambda: ops.binary_linear(X, WORDS_N, ALPHA, BETA.T, "column", K, 1),
            r"beta .*\[1, 65\], not float32 \[65, 1\]",
        ),
        (lambda: ops.binary_linear(X, WORDS_N, ALPHA, BETA, "group", K, 5), "beta must be None"),
        (lambda: ops.binary_linear(X, WORDS_N, ALPHA, None, "colum", K, 1), "scale='colum' is unknown"),
    ],
)
def test_wrong_input_is_refused_with_its_shape(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_fake_refuses_wrong_shapes_too() -> None:
    with pytest.raises(ValueError, match=r"not int32 \[6, 3\]"):
        ops.unpack_signs(WORDS_N.to("meta"), 97, torch.float32)


def test_backward_says_that_packed_layers_do_not_train() -> None:
    y = ops.binary_linear(X.clone().requires_grad_(), WORDS_N, ALPHA, BETA, "column", K, 1)
    with pytest.raises(RuntimeError, match="train the model with BinaryLinear"):
        y.sum().backward()


def test_import_under_a_second_name_defines_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("second_name_for_ops", Path(ops.__file__))
    assert spec is not None
    assert spec.loader is not None
    second = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, second)
    spec.loader.exec_module(second)
    assert torch.equal(second.pack_signs(X), ops.pack_signs(X))


@pytest.fixture
def two_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    """pack_signs with a backend that runs bf16 only, ahead of the reference; it answers with 7s."""

    def fast(w: torch.Tensor) -> torch.Tensor:
        return torch.full_like(reference.pack_signs(w), 7)

    def availability(device_type: str, dtype: torch.dtype) -> Availability:
        return Availability(True, "vpopcntdq") if dtype == torch.bfloat16 else Availability(False, f"not for {dtype}")

    monkeypatch.delenv(ops.FORCE_VARIABLE, raising=False)
    backends = [Backend("fast", fast, availability), *ops.BACKENDS["pack_signs"]]
    monkeypatch.setitem(ops.BACKENDS, "pack_signs", backends)


@pytest.mark.usefixtures("two_backends")
def test_first_backend_that_runs_is_chosen() -> None:
    assert select_backend("pack_signs", "cpu", torch.bfloat16).backend == "fast"
    choice = select_backend("pack_signs", "cpu", torch.float32)
    assert choice.backend == "reference"
    assert str(choice) == "pack_signs: fast no (not for torch.float32) | reference yes -> reference"
    assert (ops.pack_signs(X.bfloat16()) == 7).all()
    assert torch.equal(ops.pack_signs(X), reference.pack_signs(X))


@pytest.mark.usefixtures("two_backends")
def test_forced_backend_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ops.FORCE_VARIABLE, "reference")
    assert select_backend("pack_signs", "cpu", torch.bfloat16).backend == "reference"
    monkeypatch.setenv(ops.FORCE_VARIABLE, "fast")
    with pytest.raises(BackendError, match=r"cannot run pack_signs on cpu torch\.float32: not for torch\.float32"):
        ops.pack_signs(X)
    monkeypatch.setenv(ops.FORCE_VARIABLE, "cuda")
    with pytest.raises(BackendError, match="cuda is no backend of pack_signs; choose fast or reference"):
        ops.pack_signs(X)
