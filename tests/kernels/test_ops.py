"""The torch operators: schemas and fakes, and checks with shapes in them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fbitrain.kernels import ops, reference

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
    ("binary_linear", (X.bfloat16(), WORDS_N, ALPHA.bfloat16(), BETA.bfloat16(), "column", K, 1, "int8")),
    (
        "binary_linear",
        (torch.randn(2, 64), WORDS_N[:, :2].contiguous(), torch.rand(6, 2), None, "group", 64, 32, "int8"),
    ),
]


@pytest.mark.parametrize(("op", "args"), [*CALLS, ("binary_linear_inference", CALLS[4][1])])
def test_opcheck(op: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fbitrain, op).default, args)


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_op_agrees_with_the_reference(op: str, args: tuple[Any, ...]) -> None:
    result, wanted = getattr(ops, op)(*args), getattr(reference, op)(*args)
    torch.testing.assert_close(result, wanted, rtol=0.02 if result.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert result.is_contiguous()


def test_ops_are_traced_whole() -> None:
    def compute(w: torch.Tensor) -> torch.Tensor:
        words = ops.pack_signs(w)
        return ops.xnor_gemm(words, words, w.shape[1]) + ops.unpack_signs(words, w.shape[1], torch.float32).sum()

    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager", dynamic=True)
    for width in (40, 33):
        assert torch.equal(compiled(w[:, :width]), compute(w[:, :width]))


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_binary_linear_is_traced_whole(mode: str) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        return ops.binary_linear(x * 2, WORDS_N, ALPHA, BETA, "column", K, 1, mode) + 1

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 3):
        x = X[0, :tokens]
        assert torch.equal(compiled(x), compute(x))


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
        (lambda: ops.binary_linear(X, WORDS_N, ALPHA, None, "column", K, 1, "int4"), "mode='int4' is unknown"),
        (
            lambda: ops.binary_linear(X, WORDS_N.T.contiguous().T, ALPHA, None, "column", K, 1),
            r"words must be contiguous, not int32 \[6, 3\] with strides \(1, 6\)",
        ),
        (lambda: ops.xnor_gemm(WORDS_M, WORDS_N[::2], K), r"b must be contiguous, not int32 \[3, 3\]"),
        (lambda: ops.xnor_gemm(WORDS_M, WORDS_N, -1), "k=-1 is not a row length"),
        (lambda: ops.xnor_gemm(WORDS_M, WORDS_N, 2**24 + 1), "k=16777217 is not a row length"),
    ],
)
def test_wrong_input_is_refused_with_its_shape(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class Watcher(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_and_tracers_see_binary_linear() -> None:
    """Eager calls go past the dispatcher, but not past anybody who listens to it."""
    with Watcher() as watcher:
        y = ops.binary_linear(X, WORDS_N, ALPHA, BETA, "column", K, 1)
    assert "fbitrain.binary_linear_inference.default" in watcher.seen
    assert torch.equal(y, ops.binary_linear(X, WORDS_N, ALPHA, BETA, "column", K, 1))

    def compute(x: torch.Tensor) -> torch.Tensor:
        return ops.binary_linear(x, WORDS_N, ALPHA, BETA, "column", K, 1)

    assert "binary_linear_inference" in make_fx(compute)(X).code
    assert "binary_linear_inference" in str(torch.jit.trace(compute, (X,)).graph)


def test_fake_refuses_wrong_shapes_too() -> None:
    with pytest.raises(ValueError, match=r"not int32 \[6, 3\]"):
        ops.unpack_signs(WORDS_N.to("meta"), 97, torch.float32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_int8_mode_refuses_what_it_cannot_quantize(poison: float) -> None:
    x = X.clone()
    x[1, 2, 7] = poison
    with pytest.raises(ValueError, match=r"finite activations: row 5 of \[2, 3, 65\] holds NaN or infinity"):
        ops.binary_linear(x, WORDS_N, ALPHA, BETA, "column", K, 1, "int8")
    assert not ops.binary_linear(x, WORDS_N, ALPHA, BETA, "column", K, 1).isfinite().all()


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
