"""distill_loss against a plain fp64 implementation (loss, gradients, metrics), and what it promises about memory."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fbitrain.distill import DistillMetrics, distill_loss

V, D, DT = 131, 24, 40


def make_inputs(
    n_tokens: int, *, dtype: torch.dtype = torch.float32, ignored: int = 0, vocab: int = V
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    labels_M = torch.randint(0, vocab, (n_tokens,), generator=generator)
    labels_M[torch.randperm(n_tokens, generator=generator)[:ignored]] = -100
    hidden_MD, head_VD = normal(n_tokens, D), normal(vocab, D, scale=0.5)
    return {
        "hidden_MD": hidden_MD.clone().requires_grad_(),
        "head_VD": head_VD.clone().requires_grad_(),
        "labels_M": labels_M,
        # Part of the teacher is the student, so that they agree on some tokens.
        "teacher_hidden_MD": torch.cat((hidden_MD, normal(n_tokens, DT - D)), dim=1),
        "teacher_head_VD": torch.cat((head_VD, normal(vocab, DT - D, scale=0.4)), dim=1),
    }


def naive(
    inputs: dict[str, Tensor], kd_weight: float, ce_weight: float, temperature: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition, in fp64 with all logits at once; ignored tokens are dropped first."""
    keep = inputs["labels_M"] != -100
    labels = inputs["labels_M"][keep]
    s = inputs["hidden_MD"][keep].double() @ inputs["head_VD"].double().t()
    t = inputs["teacher_hidden_MD"][keep].double() @ inputs["teacher_head_VD"].double().t()
    log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
    kd = -(log_p.exp() * log_q).sum() * temperature**2
    label_ce = F.cross_entropy(s, labels, reduction="sum")
    total = kd_weight * kd + ce_weight * label_ce
    sums = {
        "loss": total,
        "kd": kd,
        "teacher_entropy": -(log_p.exp() * log_p).sum() * temperature**2,
        "label_ce": label_ce,
        "teacher_label_ce": F.cross_entropy(t, labels, reduction="sum"),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).sum(),
        "tokens": torch.tensor(len(labels)),
    }
    return total / max(len(labels), 1), sums


def sqnr_db(got: Tensor, wanted: Tensor) -> float:
    noise = (got.double() - wanted.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(wanted.double().square().sum() / noise))


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (inputs["hidden_MD"], inputs["head_VD"]))


def assert_metrics(metrics: DistillMetrics, wanted: dict[str, Tensor], relative: float) -> None:
    assert metrics.hidden_mse == 0.0  # fbitrain.student adds it
    for field in fields(metrics):
        if field.name == "hidden_mse":
            continue
        value = getattr(metrics, field.name)
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert not value.requires_grad
        assert float(value) == pytest.approx(float(wanted[field.name].detach()), rel=relative), field.name
    assert float(metrics.tokens) == float(wanted["tokens"])


WEIGHTS = [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4), (3.0, 0.0)]


@pytest.mark.parametrize("chunk_tokens", [1, 5, 37, 512])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("kd_weight", "ce_weight"), WEIGHTS)
def test_equals_the_definition(kd_weight: float, ce_weight: float, temperature: float, chunk_tokens: int) -> None:
    inputs = make_inputs(37, ignored=6)
    weights = {"kd_weight": kd_weight, "ce_weight": ce_weight, "temperature": temperature}
    loss, metrics = distill_loss(**inputs, **weights, chunk_tokens=chunk_tokens)
    wanted, sums = naive(inputs, **weights)
    if kd_weight == 0:  # the teacher is not looked at
        sums |= {name: torch.zeros(()) for name in ("kd", "teacher_entropy", "teacher_label_ce", "top1_agreement")}
    else:
        assert 0 < float(metrics.top1_agreement) < float(metrics.tokens)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert_metrics(metrics, sums, 1e-5)
    for got, exact in zip(gradients(loss, inputs), gradients(wanted, inputs), strict=True):
        assert sqnr_db(got, exact) > 110


@pytest.mark.parametrize("n_tokens", [1, 2, 64])
def test_row_tiles_and_single_tokens(n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fbitrain.targets.tiles._CPU_TILE_ELEMENTS", 3 * V)  # three rows at a time
    inputs = make_inputs(n_tokens)
    loss, metrics = distill_loss(**inputs, kd_weight=0.5, ce_weight=0.5, chunk_tokens=20)
    wanted, sums = naive(inputs, 0.5, 0.5, 1.0)
    assert_metrics(metrics, sums, 1e-5)
    for got, exact in zip(gradients(loss, inputs), gradients(wanted, inputs), strict=True):
        assert sqnr_db(got, exact) > 110


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bf16_inputs_keep_fp32_losses(temperature: float) -> None:
    inputs = make_inputs(50, dtype=torch.bfloat16, ignored=3)
    weights = {"kd_weight": 0.8, "ce_weight": 0.3, "temperature": temperature}
    loss, metrics = distill_loss(**inputs, **weights, chunk_tokens=16)
    wanted, sums = naive(inputs, **weights)
    sums["top1_agreement"] = metrics.top1_agreement  # logits rounded to bf16 can tie
    assert loss.dtype == torch.float32
    assert_metrics(metrics, sums, 2e-3)
    for got, exact in zip(gradients(loss, inputs), gradients(wanted, inputs), strict=True):
        assert got.dtype == torch.bfloat16
        assert sqnr_db(got, exact) > 40


def test_large_logits_stay_finite() -> None:
    inputs = make_inputs(9)
    inputs["hidden_MD"] = (inputs["hidden_MD"].detach() * 200).requires_grad_()
    inputs["teacher_hidden_MD"] *= 200
    loss, metrics = distill_loss(**inputs, kd_weight=1.0, ce_weight=1.0)
    wanted, sums = naive(inputs, 1.0, 1.0, 1.0)
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert float(metrics.teacher_entropy) == pytest.approx(float(sums["teacher_entropy"]), abs=1e-2)
    assert all(grad.isfinite().all() for grad in gradients(loss, inputs))


def test_kd_of_a_student_that_is_the_teacher_is_its_entropy() -> None:
    inputs = make_inputs(20)
    inputs["teacher_hidden_MD"], inputs["teacher_head_VD"] = inputs["hidden_MD"], inputs["head_VD"]
    loss, metrics = distill_loss(**inputs, temperature=2.0)
    assert float(metrics.kd) == pytest.approx(float(metrics.teacher_entropy), rel=1e-6)
    assert float(metrics.top1_agreement) == 20
    assert all(float(grad.abs().max()) < 1e-6 for grad in gradients(loss, inputs))


@pytest.mark.parametrize("kd_weight", [0.0, 1.0])
def test_no_valid_token_gives_zeros(kd_weight: float) -> None:
    inputs = make_inputs(7, ignored=7)
    loss, metrics = distill_loss(**inputs, kd_weight=kd_weight, ce_weight=0.5)
    assert float(loss.detach()) == 0
    assert all(float(getattr(metrics, field.name)) == 0 for field in fields(metrics))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in gradients(loss, inputs))


def test_ignored_tokens_get_no_gradient() -> None:
    inputs = make_inputs(12, ignored=5)
    loss, _ = distill_loss(**inputs, ce_weight=1.0)
    grad_hidden, _ = gradients(loss, inputs)
    ignored = inputs["labels_M"] == -100
    assert torch.equal(grad_hidden[ignored], torch.zeros(5, D))
    assert (grad_hidden[~ignored] != 0).any(dim=1).all()


def test_labels_alone_need_no_teacher() -> None:
    inputs = make_inputs(11)
    loss, _ = distill_loss(
        inputs["hidden_MD"], inputs["head_VD"], inputs["labels_M"], None, None, kd_weight=0, ce_weight=2
    )
    assert float(loss.detach()) == pytest.approx(float(naive(inputs, 0.0, 2.0, 1.0)[0].detach()), rel=1e-5)


def test_gradient_accumulation_scales_and_adds() -> None:
    first, second = make_inputs(8), make_inputs(8, ignored=2)
    second["head_VD"] = first["head_VD"]
    for inputs in (first, second):
        loss, _ = distill_loss(**inputs)
        (loss / 4).backward()
    exact = sum(gradients(naive(inputs, 1.0, 0.0, 1.0)[0] / 4, inputs)[1].double() for inputs in (first, second))
    assert sqnr_db(first["head_VD"].grad, exact) > 110


def test_gradient_flows_on_through_hidden_and_only_where_wanted() -> None:
    inputs = make_inputs(6)
    inputs["head_VD"].requires_grad_(False)
    source = torch.randn(6, D, generator=torch.Generator().manual_seed(1), requires_grad=True)
    loss, _ = distill_loss(**inputs | {"hidden_MD": source * 2})
    (got,) = torch.autograd.grad(loss, source)
    (exact,) = torch.autograd.grad(naive(inputs | {"hidden_MD": source * 2}, 1.0, 0.0, 1.0)[0], source)
    assert sqnr_db(got, exact) > 110


def test_a_second_backward_is_refused() -> None:
    inputs = make_inputs(4)
    loss, _ = distill_loss(**inputs)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_tied_head_gets_both_gradients() -> None:
    """The head is also the embedding, so autograd must add the loss's part to the embedding's."""
    inputs = make_inputs(10)
    table, tokens = inputs["head_VD"], torch.arange(10)
    loss, _ = distill_loss(**inputs | {"hidden_MD": F.embedding(tokens, table).tanh()})
    (got,) = torch.autograd.grad(loss, table)
    (exact,) = torch.autograd.grad(
        naive(inputs | {"hidden_MD": F.embedding(tokens, table).tanh()}, 1.0, 0.0, 1.0)[0], table
    )
    assert sqnr_db(got, exact) > 110


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements that any operation returned, and how many matrices were multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.numel = max(self.numel, value.numel())
        self.products += func in (torch.ops.aten.mm.out, torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
        return result


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_all_tokens_never_exist(dtype: torch.dtype, temperature: float) -> None:
    inputs = make_inputs(128, dtype=dtype, vocab=1000)
    with LargestTensor() as largest:
        loss, _ = distill_loss(**inputs, ce_weight=0.5, temperature=temperature, chunk_tokens=32)
        loss.backward()
    assert largest.numel <= 4 * 32 * 1000  # four scratch tiles of a chunk; all tokens would be 128 × 1000
    assert largest.products == 4 * 4  # four chunks: two heads, two gradients

    with LargestTensor() as naive_largest:
        naive(inputs, 1.0, 0.5, temperature)
    assert naive_largest.numel == 128 * 1000  # the measure notices


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_evaluation_computes_no_gradients(context: type) -> None:
    inputs = make_inputs(30)
    trained, wanted = distill_loss(**inputs, chunk_tokens=10)
    with context(), LargestTensor() as largest:
        loss, metrics = distill_loss(**inputs, chunk_tokens=10)
    assert largest.products == 3 * 2
    assert not loss.requires_grad
    assert torch.equal(loss, trained.detach())
    assert_metrics(metrics, {field.name: getattr(wanted, field.name) for field in fields(wanted)}, 0)


def test_compiled_callers_get_the_same() -> None:
    inputs = make_inputs(16)
    compiled = torch.compile(lambda: distill_loss(**inputs)[0] * 2, backend="eager")
    loss = compiled()
    assert torch.equal(loss, distill_loss(**inputs)[0] * 2)
    assert sqnr_db(gradients(loss, inputs)[1], gradients(naive(inputs, 2.0, 0.0, 1.0)[0], inputs)[1]) > 110


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "one > 0"),
        ({"kd_weight": 1.0, "ce_weight": -1.0}, "weights must be >= 0"),
        ({"temperature": 0.0}, "must be positive"),
        ({"chunk_tokens": 0}, "must be positive"),
        ({"teacher_head_VD": None}, "needs the teacher's"),
        ({"teacher_head_VD": torch.zeros(V + 1, DT)}, f"teacher has 5 tokens and {V + 1} words"),
        ({"labels_M": torch.zeros(4, dtype=torch.int64)}, "expected 4"),
        ({"hidden_MD": torch.zeros(5, D + 1)}, r"must be \[M, D\] and \[V, D\]"),
        ({"hidden_MD": torch.zeros(5, D, dtype=torch.bfloat16)}, "but its head is"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill_loss(**make_inputs(5) | change)  # type: ignore[arg-type]
