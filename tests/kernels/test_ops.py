"""The torch operators: schemas and fakes, and checks with shapes in them."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fbitrain.kernels import ops, reference
from fbitrain.kernels.weights import BinaryWeight, MixtureWeight, PartialWeight

K = 65
WORDS_N = reference.pack_signs(torch.randn(6, K, generator=torch.Generator().manual_seed(0)))
WORDS_M = reference.pack_signs(torch.randn(4, K, generator=torch.Generator().manual_seed(1)))
X = torch.randn(2, 3, K, generator=torch.Generator().manual_seed(2))
ALPHA, BETA = torch.rand(1, K), torch.rand(1, K)
GATES = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(3)).softmax(-1)
MIXTURE = MixtureWeight(WORDS_N, GATES, torch.rand(4, K), torch.rand(4, 6), K)
BINARY = BinaryWeight(WORDS_N, ALPHA, BETA, "column", K)
ROW_STARTS = torch.tensor([0, 2, 2, 3, 3, 3, 5], dtype=torch.int32)
COLUMNS = torch.tensor([0, 64, 33, 5, 6], dtype=torch.int32).to(torch.uint16)
VALUES, VALUE_SCALE = torch.tensor([127, -128, 3, -4, 5], dtype=torch.int8), torch.rand(6, 1) / 100
ROW_ALPHA = torch.rand(6, 1)
PARTIAL = PartialWeight(WORDS_N, ROW_ALPHA, "row", ROW_STARTS, COLUMNS, VALUES, VALUE_SCALE, K)

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("pack_signs", (X,)),
    ("pack_signs", (X.transpose(1, 2).bfloat16(),)),
    ("unpack_signs", (WORDS_N, K, torch.bfloat16)),
    ("xnor_gemm", (WORDS_M, WORDS_N, K)),
    ("binary_linear", (X, BINARY)),
    ("binary_linear", (X.transpose(0, 1), BinaryWeight(WORDS_N, torch.rand(6, 1), None, "row", K))),
    ("binary_linear", (X[:, :0], BinaryWeight(WORDS_N, torch.rand(6, 13), None, "group", K, 5))),
    (
        "binary_linear",
        (X.bfloat16(), BinaryWeight(WORDS_N, ALPHA.bfloat16(), BETA.bfloat16(), "column", K), "int8"),
    ),
    (
        "binary_linear",
        (
            torch.randn(2, 64),
            BinaryWeight(WORDS_N[:, :2].contiguous(), torch.rand(6, 2), None, "group", 64, 32),
            "int8",
        ),
    ),
    ("mixture_linear", (X, MIXTURE)),
    ("mixture_linear", (X.transpose(0, 1), MIXTURE._replace(gates=GATES.transpose(0, 1)))),
    ("mixture_linear", (X.bfloat16(), MIXTURE, "int8")),
    ("partial_linear", (X, PARTIAL)),
    ("partial_linear", (X.transpose(0, 1), PARTIAL, "int8")),
    (
        "partial_linear",
        (
            X[:, :0],
            PartialWeight(WORDS_N, torch.rand(6, 13), "group", ROW_STARTS, COLUMNS, VALUES.half(), None, K, 5),
        ),
    ),
]


def flat(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of an op as those of its operator, in which a weight is field by field."""
    return tuple(itertools.chain(*(arg if isinstance(arg, tuple) else (arg,) for arg in args)))


@pytest.mark.parametrize(("op", "args"), CALLS)
def test_opcheck(op: str, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.fbitrain, op).default, flat(args))


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


@pytest.mark.parametrize(
    ("row_starts", "columns"),
    [
        ([0, 2, 2, 3, 3, 3, 6], [0, 64, 33, 5, 6]),
        ([1, 2, 2, 3, 3, 3, 5], [0, 64, 33, 5, 6]),
        ([0, 2, 1, 3, 3, 3, 5], [0, 64, 33, 5, 6]),
        ([-1, 2, 2, 3, 3, 3, 5], [0, 64, 33, 5, 6]),
        ([0, 2, 2, 3, 3, 3, 5], [0, 65, 33, 5, 6]),
        ([0, 2, 2, 3, 3, 3, 5], [0, 64, 33, 6, 5]),
        ([0, 2, 2, 3, 3, 3, 5], [0, 64, 33, 5, 5]),
    ],
)
@pytest.mark.parametrize("backend", ["", "reference"])
def test_salient_entries_that_are_no_rows_are_refused(
    backend: str, row_starts: list[int], columns: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FBITRAIN_BACKEND", backend)
    starts = torch.tensor(row_starts, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"partial_linear: .* must ascend"):
        partial(row_starts=starts, columns=torch.tensor(columns, dtype=torch.int32).to(torch.uint16))


@pytest.mark.parametrize("mode", ["float", "int8"])
def test_binary_linear_is_traced_whole(mode: str) -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        return ops.binary_linear(x * 2, BINARY, mode) + 1

    compiled = torch.compile(compute, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 3):
        x = X[0, :tokens]
        assert torch.equal(compiled(x), compute(x))


def binary(x: torch.Tensor = X, mode: str = "float", **changes: Any) -> torch.Tensor:
    return ops.binary_linear(x, BINARY._replace(**changes), mode)


def mixture(x: torch.Tensor = X, mode: str = "float", **changes: Any) -> torch.Tensor:
    return ops.mixture_linear(x, MIXTURE._replace(**changes), mode)


def partial(x: torch.Tensor = X, mode: str = "float", **changes: Any) -> torch.Tensor:
    return ops.partial_linear(x, PARTIAL._replace(**changes), mode)


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
        (lambda: binary(X[..., 1:]), r"x \[..., 65\], not .*\[2, 3, 64\]"),
        (lambda: binary(X.int()), "needs a float x"),
        (lambda: binary(beta=None, scale="row"), r"alpha of scale='row' must be float \[6, 1\]"),
        (lambda: binary(beta=BETA.T), r"beta .*\[1, 65\], not float32 \[65, 1\]"),
        (lambda: binary(scale="group", group_size=5), "beta must be None"),
        (lambda: binary(scale="colum"), "scale='colum' is unknown"),
        (lambda: binary(mode="int4"), "mode='int4' is unknown"),
        (
            lambda: binary(words=WORDS_N.T.contiguous().T),
            r"words must be contiguous, not int32 \[6, 3\] with strides \(1, 6\)",
        ),
        (lambda: ops.xnor_gemm(WORDS_M, WORDS_N[::2], K), r"b must be contiguous, not int32 \[3, 3\]"),
        (lambda: mixture(alpha_in=torch.rand(4, 64)), r"alpha_in must be float \[4, 65\], not float32 \[4, 64\]"),
        (lambda: mixture(alpha_in=torch.rand(65, K)), r"float \[1 to 64 experts, 65\], not float32 \[65, 65\]"),
        (lambda: mixture(alpha_out=torch.rand(3, 6)), r"alpha_out must be float \[4, 6\], not float32 \[3, 6\]"),
        (lambda: mixture(gates=GATES[0]), r"gates must be float32 \[2, 3, 4\], not float32 \[3, 4\]"),
        (lambda: mixture(gates=GATES.double()), r"gates must be float32 \[2, 3, 4\], not float64 \[2, 3, 4\]"),
        (lambda: mixture(alpha_out=torch.rand(6, 4).T), r"alpha_out must be contiguous, not float32 \[4, 6\]"),
        (lambda: mixture(mode="int4"), "mixture_linear: mode='int4' is unknown"),
        (lambda: partial(scale="column"), "partial_linear: scale='column' is unknown; choose row or group"),
        (lambda: partial(alpha=torch.rand(6, 2)), r"alpha of scale='row' must be float \[6, 1\], not float32 \[6, 2\]"),
        (lambda: partial(row_starts=ROW_STARTS[1:]), r"row_starts must be int32 \[7\], not int32 \[6\]"),
        (lambda: partial(columns=COLUMNS.int()), r"columns of rows of 65 must be uint16 \[entries\], not int32 \[5\]"),
        (lambda: partial(values=VALUES[1:]), r"values must be int8 or float16 \[5\], not int8 \[4\]"),
        (lambda: partial(values=VALUES.float()), r"values must be int8 or float16 \[5\], not float32 \[5\]"),
        (lambda: partial(values=VALUES.half()), r"float16 values none, not float16 \[5\]"),
        (lambda: partial(value_scale=None), r"int8 values need a value_scale .*not int8 \[5\]"),
        (lambda: partial(value_scale=torch.ones(6)), r"value_scale must be float32 \[6, 1\], not float32 \[6\]"),
        (lambda: partial(x=X[..., 1:]), r"partial_linear needs a float x \[..., 65\], not float32 \[2, 3, 64\]"),
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
    with Watcher() as watcher:
        y = binary()
    assert "fbitrain.binary_linear.default" in watcher.seen
    assert torch.equal(y, binary())

    def compute(x: torch.Tensor) -> torch.Tensor:
        return binary(x)

    assert "binary_linear" in make_fx(compute)(X).code
    assert "binary_linear" in str(torch.jit.trace(compute, (X,)).graph)


def test_fake_refuses_wrong_shapes_too() -> None:
    with pytest.raises(ValueError, match=r"not int32 \[6, 3\]"):
        ops.unpack_signs(WORDS_N.to("meta"), 97, torch.float32)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_int8_mode_refuses_what_it_cannot_quantize(poison: float) -> None:
    x = X.clone()
    x[1, 2, 7] = poison
    with pytest.raises(ValueError, match=r"finite activations: row 5 of \[2, 3, 65\] holds NaN or infinity"):
        binary(x, "int8")
    assert not binary(x).isfinite().all()
    for linear in (mixture, partial):
        with pytest.raises(ValueError, match=r"finite activations: row 5 of \[2, 3, 65\] holds NaN or infinity"):
            linear(x, "int8")
        assert not linear(x).isfinite().all()


@pytest.mark.parametrize("call", [binary, mixture, partial])
def test_backward_says_that_packed_layers_do_not_train(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    y = call(X.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="train the model with BinaryLinear"):
        y.sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda t: binary(beta=t(BETA)),
        lambda t: binary(alpha=t(ALPHA)),
        lambda t: mixture(gates=t(GATES)),
        lambda t: partial(value_scale=t(VALUE_SCALE)),
        lambda t: partial(values=t(VALUES.half()), value_scale=None),
    ],
)
def test_a_parameter_that_requires_a_gradient_gets_no_zero(call: Callable[[Any], torch.Tensor]) -> None:
    y = call(lambda parameter: parameter.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="train the model with BinaryLinear"):
        y.sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda t: binary(t(X)),
        lambda t: binary(alpha=t(ALPHA), beta=t(BETA)),
        lambda t: mixture(t(X)),
        lambda t: mixture(gates=t(GATES)),
        lambda t: partial(t(X)),
        lambda t: partial(alpha=t(ROW_ALPHA)),
        lambda t: ops.pack_signs(t(X)),
    ],
)
def test_a_negation_that_is_yet_to_be_carried_out(call: Callable[[Any], torch.Tensor]) -> None:
    """torch._neg_view is what the imaginary part of a conjugate is: memory that holds -x, and a bit that says so."""
    assert torch.equal(call(torch._neg_view), call(torch.neg))


def test_import_under_a_second_name_defines_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("second_name_for_ops", Path(ops.__file__))
    assert spec is not None
    assert spec.loader is not None
    second = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, second)
    spec.loader.exec_module(second)
    assert torch.equal(second.pack_signs(X), ops.pack_signs(X))
