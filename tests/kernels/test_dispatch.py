"""Which backend is chosen: from the call and the machine's levels alone, or by FBITRAIN_BACKEND."""

from __future__ import annotations

import pytest
import torch

from fbitrain.kernels import cpu, dispatch, ops, reference
from fbitrain.kernels.cuda_plan import Gpu
from fbitrain.kernels.dispatch import BACKENDS, FORCE_VARIABLE, BackendError, Call, select_backend

ZEN3 = {"amx": "no tiles", "avx512": "no zmm", "avx2": "", "portable": ""}
XEON = dict.fromkeys(cpu.LEVELS, "")
NO_COMPILER = dict.fromkeys(cpu.LEVELS, "no compiler")
LINEAR = Call("binary_linear", "cpu", torch.bfloat16)
PACK, XNOR = Call("pack_signs", "cuda", torch.float16), Call("xnor_gemm", "cuda", torch.int32)
A100, T4, P100, NO_CUPY = Gpu(80), Gpu(75), Gpu(60), Gpu(0, "no cupy")


@pytest.fixture(autouse=True)
def unforced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCE_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("call", "levels", "backend"),
    [
        (LINEAR, XEON, "amx"),
        (LINEAR, ZEN3, "avx2"),
        (LINEAR, NO_COMPILER, "reference"),
        (LINEAR._replace(dtype=torch.float16), XEON, "reference"),
        (LINEAR._replace(group_size=128), ZEN3, "avx2"),
        (LINEAR._replace(group_size=48), ZEN3, "reference"),
        (Call("pack_signs", "cpu", torch.float16), ZEN3, "avx2"),
        (Call("unpack_signs", "cpu", torch.float64), ZEN3, "avx2"),
        (Call("xnor_gemm", "cpu", torch.int32), ZEN3, "avx2"),
    ],
)
def test_the_fastest_backend_that_runs_is_chosen(call: Call, levels: dict[str, str], backend: str) -> None:
    assert select_backend(call, levels).backend == backend


@pytest.mark.parametrize(
    ("call", "gpu", "backend"),
    [
        (XNOR, A100, "cuda"),
        (XNOR, T4, "cuda"),
        (XNOR, P100, "reference"),
        (XNOR, NO_CUPY, "reference"),
        (PACK, T4, "cuda"),
        (PACK._replace(op="unpack_signs", dtype=torch.float64), A100, "cuda"),
        (PACK._replace(dtype=torch.float8_e5m2), A100, "reference"),
        (LINEAR._replace(device_type="cuda"), A100, "cuda"),
        (LINEAR._replace(device_type="cuda"), T4, "reference"),
        (LINEAR._replace(device_type="cuda", dtype=torch.float16), A100, "cuda"),
        (LINEAR._replace(device_type="cuda", group_size=128), A100, "cuda"),
        (LINEAR._replace(device_type="cuda", group_size=48), A100, "reference"),
    ],
)
def test_a_gpu_runs_the_cuda_kernels_if_it_can(call: Call, gpu: Gpu, backend: str) -> None:
    assert select_backend(call, {}, gpu).backend == backend


def test_a_choice_says_what_the_gpu_lacks() -> None:
    assert str(select_backend(XNOR, {}, A100)) == (
        "xnor_gemm: amx no (only for cpu) | avx512 no (only for cpu) | avx2 no (only for cpu) | "
        "portable no (only for cpu) | cuda yes (compute capability 8.0) | reference yes -> cuda"
    )
    assert "cuda no (needs compute capability 7.5, not 6.0)" in str(select_backend(XNOR, {}, P100))
    assert "cuda no (no cupy)" in str(select_backend(XNOR, {}, NO_CUPY))
    assert "cuda no (only for cuda)" in str(select_backend(XNOR._replace(device_type="cpu"), XEON, A100))


def test_forcing_cuda_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "cuda")
    assert select_backend(XNOR, {}, A100).backend == "cuda"
    with pytest.raises(BackendError, match=r"=cuda cannot run xnor_gemm on cuda torch\.int32: no cupy; unset it"):
        select_backend(XNOR, {}, NO_CUPY)
    with pytest.raises(BackendError, match="only for cuda"):
        select_backend(XNOR._replace(device_type="cpu"), XEON)


def test_a_choice_names_every_backend_and_why() -> None:
    assert str(select_backend(LINEAR, ZEN3)) == (
        "binary_linear: amx no (no tiles) | avx512 no (no zmm) | avx2 yes | portable yes | "
        "cuda no (only for cuda) | reference yes -> avx2"
    )
    assert "avx2 no (not for torch.float16)" in str(select_backend(LINEAR._replace(dtype=torch.float16), ZEN3))
    assert "group_size=48 is not a multiple of 32" in str(select_backend(LINEAR._replace(group_size=48), ZEN3))


@pytest.mark.parametrize("op", dispatch.OPS)
@pytest.mark.parametrize("forced", ["amx", "avx512", "avx2", "portable", "reference"])
def test_a_forced_backend_is_taken_for_every_op(op: str, forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, forced)
    assert select_backend(Call(op, "cpu", torch.float32), XEON).backend == forced


def test_a_forced_backend_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCE_VARIABLE, "avx512")
    with pytest.raises(BackendError, match=r"cannot run binary_linear on cpu torch\.bfloat16: no zmm; unset it"):
        select_backend(LINEAR, ZEN3)
    monkeypatch.setenv(FORCE_VARIABLE, "mmx")
    with pytest.raises(BackendError, match="mmx is no backend of binary_linear; choose amx or avx512 or avx2"):
        select_backend(LINEAR, ZEN3)


def test_forcing_takes_effect_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found for one value of the variable is not remembered for another."""
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ops.pack_signs(w), reference.pack_signs(w))
    monkeypatch.setenv(FORCE_VARIABLE, "mmx")
    with pytest.raises(BackendError):
        ops.pack_signs(w)


def test_every_op_ends_with_the_reference() -> None:
    assert set(BACKENDS) == set(dispatch.OPS)
    for backends in BACKENDS.values():
        assert [backend.name for backend in backends] == [*cpu.LEVELS, "cuda", "reference"]
