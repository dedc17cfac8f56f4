"""A teacher in int8: its layers within the error of two roundings, and its error as it is printed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fbitrain import teacher_int8
from fbitrain.base.errors import UserError
from fbitrain.teacher_int8 import Int8Linear, difference, host_in_int8
from tests.core.tiny_teacher import load, tiny_llama, token_ids

pytestmark = pytest.mark.skipif(
    bool(teacher_int8.why_no_int8(torch.device("cpu"))), reason="this CPU multiplies no int8"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_in", "n_out", "bias"), [(576, 192, False), (33, 7, True), (1, 1, True), (130, 65, False)])
def test_a_layer_is_the_same_within_its_roundings(n_in: int, n_out: int, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(n_in, n_out, bias=bias)
    linear.weight.data[0] = 0
    x = torch.randn(3, 5, n_in, dtype=dtype)
    x[0, 0] = 0
    exact, found = linear(x.float()), Int8Linear(linear)(x)
    assert found.dtype == dtype
    assert found.shape == exact.shape
    assert 20 * torch.log10(exact.norm() / (exact - found.float()).norm()) > 32
    torch.testing.assert_close(found[0, 0].float(), exact[0, 0], rtol=0.01, atol=1e-6)


def test_the_difference_is_that_of_the_two_distributions(tmp_path: object) -> None:
    tiny_llama(tied=False).save_pretrained(str(tmp_path))
    teacher = load(str(tmp_path))
    ids = token_ids()
    exact, before = teacher.hidden(ids), teacher.logits(ids).log_softmax(-1)
    assert difference(teacher, exact, ids).kl == pytest.approx(0, abs=1e-6)
    assert host_in_int8(teacher.body, torch.device("cpu")) == 14
    found, after = difference(teacher, exact, ids), teacher.logits(ids).log_softmax(-1)
    assert found.kl == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=1e-3)
    assert found.entropy == pytest.approx(float(-(before.exp() * before).sum(-1).mean()), rel=1e-4)
    assert found.same_top == pytest.approx(float((before.argmax(-1) == after.argmax(-1)).float().mean()))
    assert 0 < found.kl < 0.05
    assert found.tokens == ids.numel()


def test_a_device_without_int8_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(UserError, match=r"distill\.int8: this CPU has no int8 products; leave it out"):
        host_in_int8(nn.Sequential(nn.Linear(2, 2)), torch.device("cpu"))
