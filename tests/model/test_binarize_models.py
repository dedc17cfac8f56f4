"""binarize_ on whole models of other kinds, with every method, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from fbitrain.base.errors import UserError
from fbitrain.model.build import binarize_, chosen_linears
from fbitrain.model.config import (
    BinarizeConfig,
    ModelConfig,
    SalientConfig,
    binarize_problems,
)
from fbitrain.model.latent import LatentLinear
from fbitrain.model.method_table import METHODS
from fbitrain.model.packed_layers import PackedBinaryLinear
from tests.model.packing import pack_

VOCABULARY, D = 61, 24


def gpt2() -> nn.Module:
    """Conv1D with biases, a fused QKV, a tied head."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=D, n_layer=2, n_head=2))


def opt() -> nn.Module:
    """Linears with biases, a tied head."""
    torch.manual_seed(0)
    shape = {"hidden_size": D, "num_hidden_layers": 2, "ffn_dim": 48, "num_attention_heads": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=32, word_embed_proj_dim=D, **shape))


def llama() -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": D, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape))


def mixtral() -> nn.Module:
    """Experts whose weights are one tensor of three dimensions."""
    shape = {"hidden_size": D, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 1, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **shape, **experts))


def config_of(method: str) -> BinarizeConfig:
    if not METHODS[method].salient:
        return BinarizeConfig(method=method)
    dtype = "float16" if method == "cherry" else "int8"
    return BinarizeConfig(method=method, scale="row", beta=False, salient=SalientConfig(dtype=dtype))


def masks_of(model: nn.Module, binarize: BinarizeConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(linear.out_features, linear.in_features, generator=generator) < 0.1
        for name, linear in chosen_linears(model, binarize).items()
    }


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))
    found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [gpt2, opt, llama])
def test_every_method_on_every_architecture(make: Callable[[], nn.Module], method: str) -> None:
    """The model gives the logits of the original architecture with the effective weights written into it."""
    model, plain, binarize = make().eval(), make().eval(), config_of(method)
    report = binarize_(model, binarize, masks=masks_of(model, binarize))
    assert len(report.binarized) == sum(isinstance(module, LatentLinear) for module in model.modules())
    assert report.bits_per_weight > 1
    found = logits(model)
    found.square().mean().backward()
    for name in report.binarized:
        layer, original = model.get_submodule(name), plain.get_submodule(name)
        assert isinstance(layer, LatentLinear)
        assert layer.weight.grad is not None
        assert not layer.training
        weight = original.weight.T if isinstance(original, Conv1D) else original.weight
        assert torch.equal(layer.weight, weight)
        assert (layer.bias is None) == (original.bias is None)
        if method != "mixture_of_scales":
            weight.data.copy_(layer.effective_weight())
    if method not in ("mixture_of_scales", "bitnet", "ternary"):  # the last two round their activations as well
        torch.testing.assert_close(found, logits(plain), rtol=1e-4, atol=1e-5)


def test_biases_are_kept_in_packed_layers() -> None:
    model = gpt2().eval()
    binarize_(model, BinarizeConfig())
    bias = model.get_submodule("transformer.h.0.mlp.c_fc").bias
    with torch.no_grad():
        bias.copy_(torch.arange(len(bias)))
        wanted = logits(model)
        pack_(model)
        torch.testing.assert_close(logits(model), wanted)
    packed = model.get_submodule("transformer.h.0.mlp.c_fc")
    assert isinstance(packed, PackedBinaryLinear)
    assert "bias" in packed.state_dict()


def shared(model: nn.Module) -> None:
    layers = model.get_submodule("model.layers")
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def quantized(model: nn.Module) -> None:
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    linear.weight = nn.Parameter(torch.zeros(48, D, dtype=torch.uint8), requires_grad=False)


def unchanged(model: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "binarize", "masks", "message"),
    [
        (shared, BinarizeConfig(), None, r"0\.mlp\.up_proj shares its weight with model\.layers\.1\.mlp\.up_proj; add"),
        (quantized, BinarizeConfig(), None, r"weight of model\.layers\.0\.mlp\.up_proj is uint8, already quantized"),
        (unchanged, config_of("partial"), None, "method=partial needs a trained model.*; set model.pretrained"),
        (unchanged, config_of("cherry"), {}, r"no mask of salient weights for model\.layers\.0\.self_attn\.q_proj"),
        (
            unchanged,
            config_of("partial"),
            {"model.layers.0.self_attn.q_proj": torch.ones(D, D + 1, dtype=torch.bool)},
            r"the mask of model\.layers\.0\.self_attn\.q_proj is bool \[24, 25\], not bool \[24, 24\]",
        ),
        (
            unchanged,
            BinarizeConfig(method="partial", scale="row", beta=False, salient=SalientConfig(scope="group")),
            None,
            r"q_proj cannot be binarized: in_features=24 is not a multiple of group_size=128",
        ),
    ],
)
def test_refusals_change_nothing(
    change: Callable[[nn.Module], None], binarize: BinarizeConfig, masks: dict[str, Tensor] | None, message: str
) -> None:
    model = llama()
    change(model)
    with pytest.raises(UserError, match=message):
        binarize_(model, binarize, masks=masks)
    assert not any(isinstance(module, LatentLinear) for module in model.modules())


def test_fused_experts_are_refused_unless_skipped() -> None:
    model = mixtral()
    said = r"model\.layers\.0\.mlp\.experts\.\w+ holds the weights of several Linears .* add 'experts' to binarize.skip"
    with pytest.raises(UserError, match=said):
        binarize_(model, BinarizeConfig())
    report = binarize_(model, BinarizeConfig(skip=["lm_head", "experts"]))
    assert len(report.binarized) == 4


def test_a_skipped_conv1d_is_named_in_the_report() -> None:
    model = gpt2()
    report = binarize_(model, BinarizeConfig(skip=["lm_head", "c_attn"]))
    assert report.kept["transformer.h.1.attn.c_attn"] == "skip=[c_attn]"
    assert isinstance(model.get_submodule("transformer.h.1.attn.c_attn"), Conv1D)


@pytest.mark.parametrize("method", METHODS)
def test_good_configs_have_no_problem(method: str) -> None:
    assert list(binarize_problems(config_of(method), ModelConfig())) == []


@pytest.mark.parametrize(
    ("binarize", "problem"),
    [
        (BinarizeConfig(method="pb"), "binarize.method='pb' is unknown; choose one of binary, partial, "),
        (BinarizeConfig(method="partial", beta=False), "has its scales per row or group; set binarize.scale=row"),
        (BinarizeConfig(method="partial", scale="row"), "has no shift; set binarize.beta=false"),
        (BinarizeConfig(method="mixture_of_scales", n_experts=0), "binarize.n_experts=0 must be from 1 to 64"),
        (BinarizeConfig(bits=2), "binarize.bits=2 is for binarize.method=cherry, not binary; leave it out"),
        (BinarizeConfig(output_norm=True), "binarize.output_norm=True is for binarize.method=onebit, not binary"),
        (
            BinarizeConfig(variant="benchmark"),
            "is for binarize.method=bnn or xnor or bireal or recu or fda",
        ),
        (
            BinarizeConfig(method="xnor", variant="code"),
            "binarize.variant='code' is unknown; choose one of paper",
        ),
    ],
)
def test_contradictions(binarize: BinarizeConfig, problem: str) -> None:
    (found,) = binarize_problems(binarize, ModelConfig())
    assert problem in found


@pytest.mark.parametrize(
    ("method", "bits", "salient", "problem"),
    [
        ("partial", 1, SalientConfig(fraction=0.0), "binarize.salient.fraction=0.0 must lie between 0 and 1"),
        ("partial", 1, SalientConfig(fraction=1.0), "binarize.salient.fraction=1.0 must lie between 0 and 1"),
        ("partial", 1, SalientConfig(criterion="l2"), "binarize.salient.criterion='l2' is unknown; choose one of mag"),
        (
            "partial",
            1,
            SalientConfig(scope="column"),
            "binarize.salient.scope='column' is unknown; choose one",
        ),
        ("partial", 1, SalientConfig(dtype="int4"), "binarize.salient.dtype='int4' is unknown; choose one of int8"),
        ("cherry", 1, SalientConfig(), "trains its salient weights, which int8 cannot; set binarize.salient.dtype"),
        (
            "partial",
            1,
            SalientConfig(scope="row", fraction=0.0006),
            "keeps none of a row's model.d_model=768",
        ),
        ("cherry", 5, SalientConfig(dtype="float16"), "binarize.bits=5 must be from 1 to 4"),
        ("partial", 1, SalientConfig(scope="group"), "model.d_ff=2000 is not a multiple of binarize.group_size=128"),
    ],
)
def test_contradictions_about_salient_weights(method: str, bits: int, salient: SalientConfig, problem: str) -> None:
    binarize = BinarizeConfig(method=method, scale="row", beta=False, bits=bits, salient=salient)
    (found,) = binarize_problems(binarize, ModelConfig(d_ff=2000))
    assert problem in found


def test_the_minmax_grid_has_no_one_bit_form() -> None:
    salient = SalientConfig(dtype="float16")
    binarize = BinarizeConfig(method="cherry", scale="row", beta=False, grid="minmax", salient=salient)
    (found,) = binarize_problems(binarize, ModelConfig())
    assert "binarize.grid=minmax is of 2 to 4 bits; set binarize.bits" in found
