"""The compiled decoder against transformers' Llama in fp64 with the binary weights written out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fbitrain.kernels import cpu, reference
from fbitrain.kernels.decoder import Decoder, NotFiniteError
from fbitrain.kernels.decoder_tensors import BinaryTensors, DecoderShape, DecoderTensors, LayerTensors
from fbitrain.kernels.layout import scale_shape
from fbitrain.kernels.weights import BinaryWeight

LINEARS = {
    **{"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"},
    **{"output": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"},
}
SHAPES = {
    "grouped heads": {"d_model": 96, "d_ff": 160, "n_heads": 6, "n_kv_heads": 2, "head_size": 16},
    "head of 10, odd widths": {"d_model": 70, "d_ff": 93, "n_heads": 7, "n_kv_heads": 7, "head_size": 10},
    "head of 64": {"d_model": 128, "d_ff": 288, "n_heads": 2, "n_kv_heads": 1, "head_size": 64},
}
SCALES = [("column", True), ("column", False), ("row", True), ("tensor", True), ("tensor", False), ("group", False)]
VOCABULARY = 101

needs_kernels = pytest.mark.skipif(bool(cpu.levels()["portable"]), reason="the compiled kernels do not run here")
pytestmark = needs_kernels


def shape_of(name: str, scale: str) -> DecoderShape:
    return DecoderShape(n_layers=2, vocab_size=VOCABULARY, norm_eps=1e-5, scale=scale, group_size=32, **SHAPES[name])


def model_of(
    shape: DecoderShape, beta: bool, tied: bool = False, dtype: torch.dtype = torch.float16
) -> tuple[DecoderTensors, LlamaForCausalLM]:
    """Random tensors, and the model in fp64 that has their values."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_size,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=tied,
    )
    generator = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1 + 0.1 * drawn if "norm" in name else 0.2 * drawn).to(dtype)

    def binarized(layer: int, name: str) -> BinaryTensors:
        linear = model.get_submodule(f"model.layers.{layer}.{name}")
        signs = torch.randn(linear.weight.shape, generator=generator).sign()
        scales = scale_shape(shape.scale, *signs.shape, shape.group_size)
        alpha = 0.2 * torch.rand(scales, generator=generator) + 0.02
        shift = 0.02 * torch.randn(scales, generator=generator) if beta else None
        written_out = alpha.repeat_interleave(shape.group_size, 1) if shape.scale == "group" else alpha
        linear.weight.data = signs.double() * written_out + (0 if shift is None else shift)
        return BinaryTensors(reference.pack_signs(signs), alpha, shift)

    layers = []
    for number in range(shape.n_layers):
        norms = [model.model.layers[number].input_layernorm, model.model.layers[number].post_attention_layernorm]
        linears = [binarized(number, name) for name in LINEARS.values()]
        layers.append(LayerTensors(*linears, *(norm.weight.data for norm in norms)))
    frequencies = LlamaRotaryEmbedding(config).inv_freq
    embedding, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    tensors = DecoderTensors(layers, embedding, head, model.model.norm.weight.data, frequencies)
    return tensors, model.double()


class QuantizedLinear(nn.Module):
    """A binary Linear with int8 activations, by the reference."""

    def __init__(self, weight: BinaryTensors, shape: DecoderShape, k: int) -> None:
        super().__init__()
        self.weight_of, self.shape, self.k = weight, shape, k

    def forward(self, x: Tensor) -> Tensor:
        weight = BinaryWeight(*self.weight_of, self.shape.scale, self.k, self.shape.group_size)
        return reference.binary_linear(x.float(), weight, "int8").double()


def quantize_(model: LlamaForCausalLM, shape: DecoderShape, tensors: DecoderTensors) -> None:
    """Puts the reference of int8 activations in the place of the written-out weights."""
    for number, layer in enumerate(tensors.layers):
        for part, name in LINEARS.items():
            name = f"model.layers.{number}.{name}"
            k = model.get_submodule(name).in_features
            model.set_submodule(name, QuantizedLinear(getattr(layer, part), shape, k))


def ids_of(count: int) -> Tensor:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(1))


def logits_of(decoder: Decoder, ids: Tensor) -> Tensor:
    return decoder.logits(decoder.hidden(ids, decoder.new_cache(len(ids))))


def sqnr_db(found: Tensor, expected: Tensor) -> float:
    noise = (found.double() - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(("scale", "beta"), SCALES)
def test_it_computes_what_transformers_does(name: str, scale: str, beta: bool) -> None:
    if scale == "group" and name.startswith("head of 10"):
        pytest.skip("70 columns are no whole groups")
    shape = shape_of(name, scale)
    tensors, model = model_of(shape, beta)
    ids = ids_of(75)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    exact = logits_of(Decoder(shape, tensors), ids)
    assert sqnr_db(exact, expected) > 110
    assert torch.equal(exact.argmax(1), expected.argmax(1))
    quantize_(model, shape, tensors)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    # Differences of 2^-11 (the cache is fp16 here) tip roundings to int8, and one that tips moves a whole step.
    assert sqnr_db(logits_of(Decoder(shape, tensors, "int8"), ids), expected) > 27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_in_every_dtype(dtype: torch.dtype, tied: bool) -> None:
    shape = shape_of("grouped heads", "column")
    tensors, model = model_of(shape, True, tied, dtype)
    assert (tensors.head.data_ptr() == tensors.embedding.data_ptr()) == tied
    ids = ids_of(9)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    decoder = Decoder(shape, tensors)
    hidden = decoder.hidden(ids, decoder.new_cache(9))
    assert sqnr_db(decoder.logits(hidden), expected) > 110
    one_by_one = torch.cat([decoder.logits(row[None]) for row in hidden])  # another way through the head
    assert sqnr_db(one_by_one, expected) > 110


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("name", SHAPES)
def test_how_a_text_is_cut_changes_nothing(name: str, activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of(name, "column")
    decoder = Decoder(shape, model_of(shape, True)[0], activations)
    ids = ids_of(250)  # more than go through the layers together
    whole = decoder.hidden(ids, decoder.new_cache(250))
    for cuts in ([1] * 70 + [180], [33, 1, 216], [64, 186]):
        cache = decoder.new_cache(250)
        assert torch.equal(torch.cat([decoder.hidden(part, cache) for part in ids.split(cuts)]), whole)
    assert torch.equal(decoder.hidden(ids, decoder.new_cache(300)), whole)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(decoder.hidden(ids, decoder.new_cache(250)), whole)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_only_the_last_tokens_may_be_asked_for(activations: str) -> None:
    """The others are still there for the tokens that follow."""
    shape = shape_of("grouped heads", "column")
    decoder = Decoder(shape, model_of(shape, True)[0], activations)
    ids = ids_of(250)
    whole = decoder.hidden(ids, decoder.new_cache(250))
    for last in (0, 1, 2, 130, 242):  # the last piece, parts of it and more
        cache = decoder.new_cache(250)
        assert torch.equal(decoder.hidden(ids[:243], cache, last), whole[243 - last : 243])
        assert torch.equal(decoder.hidden(ids[243:], cache, last), whole[250 - min(last, 7) :])


@pytest.mark.parametrize("backend", ["portable", "avx2"])
def test_every_level(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu.levels()[backend]:
        pytest.skip(f"{backend}: {cpu.levels()[backend]}")
    monkeypatch.setenv("FBITRAIN_BACKEND", backend)
    shape = shape_of("grouped heads", "row")
    tensors, model = model_of(shape, True)
    ids = ids_of(40)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert sqnr_db(logits_of(Decoder(shape, tensors), ids), expected) > 110
    quantize_(model, shape, tensors)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    assert sqnr_db(logits_of(Decoder(shape, tensors, "int8"), ids), expected) > 27


def test_a_full_cache_and_unknown_ids_are_refused() -> None:
    shape = shape_of("grouped heads", "column")
    decoder = Decoder(shape, model_of(shape, True)[0])
    cache = decoder.new_cache(5)
    decoder.hidden(ids_of(3), cache)
    with pytest.raises(ValueError, match="3 tokens do not fit a cache of 5 that holds 3 already"):
        decoder.hidden(ids_of(3), cache)
    for ids in ([0, VOCABULARY], [-1, 0]):
        with pytest.raises(ValueError, match=f"do not fit a vocabulary of {VOCABULARY}"):
            decoder.hidden(torch.tensor(ids), cache)
    assert cache.length == 3
    assert decoder.hidden(torch.tensor([], dtype=torch.int64), cache).shape == (0, 96)
    with pytest.raises(ValueError, match=r"hidden is torch.float32 \[2, 95\]"):
        decoder.logits(torch.zeros(2, 95))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), r"ids are torch.int64 \[2, 3\] on cpu; they must be integers \[M\]"),
        (torch.zeros(3), r"ids are torch.float32 \[3\] on cpu"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), r"ids are torch.int64 \[3\] on meta"),
    ],
)
def test_what_are_no_ids_is_refused(ids: Tensor, words: str) -> None:
    shape = shape_of("grouped heads", "column")
    decoder = Decoder(shape, model_of(shape, True)[0])
    with pytest.raises(ValueError, match=words):
        decoder.hidden(ids, decoder.new_cache(9))
    for hidden in (torch.zeros(3, 96, device="meta"), torch.zeros(96)):
        with pytest.raises(
            ValueError, match=r"hidden is torch.float32 .* on (meta|cpu); it must be torch.float32 \[M, 96"
        ):
            decoder.logits(hidden)


def test_the_cache_of_another_decoder_is_refused() -> None:
    shape, other = shape_of("grouped heads", "column"), shape_of("head of 64", "column")
    decoder = Decoder(shape, model_of(shape, True)[0])
    small = Decoder(other, model_of(other, True)[0]).new_cache(9)
    with pytest.raises(
        ValueError, match=r"for 2 layers of 1 heads of 64 .*not 2 layers of 2 heads of 16 in torch.float32"
    ):
        decoder.hidden(ids_of(3), small)
    halves = Decoder(shape, model_of(shape, True)[0], "int8").new_cache(9)
    with pytest.raises(ValueError, match=r"in torch.float16, not .* in torch.float32; make it with this decoder's"):
        decoder.hidden(ids_of(3), halves)


@pytest.mark.parametrize("change", ["dtype", "device"])
def test_torchs_defaults_change_nothing(change: str) -> None:
    shape = shape_of("grouped heads", "column")
    tensors, _ = model_of(shape, True)
    expected = logits_of(Decoder(shape, tensors), ids_of(9))
    ids, meta = ids_of(9), torch.device("meta")
    if change == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    try:
        with meta if change == "device" else torch.device("cpu"):
            found = logits_of(Decoder(shape, tensors), ids)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("scale", ["column", "row", "tensor"])
def test_some_linears_may_have_a_shift_and_others_none(scale: str, activations: str) -> None:
    """None is the same as zeros, also where a Linear that is computed with others is the first of them."""
    shape = shape_of("grouped heads", scale)
    tensors, _ = model_of(shape, True)

    def logits(of: Any) -> Tensor:
        layers = [
            layer._replace(
                query=layer.query._replace(beta=of(layer.query.beta)), up=layer.up._replace(beta=of(layer.up.beta))
            )
            for layer in tensors.layers
        ]
        return logits_of(Decoder(shape, tensors._replace(layers=layers), activations), ids_of(9))

    assert torch.equal(logits(lambda beta: None), logits(torch.zeros_like))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_size": 15}, "head_size=15 must be even, and 1024 at most"),
        ({"head_size": 1026}, "head_size=1026 must be even"),
        ({"n_kv_heads": 4}, "n_heads=6 is not a multiple of n_kv_heads=4"),
        ({"n_kv_heads": 0}, "n_kv_heads=0 is no size"),
    ],
)
def test_shapes_that_no_decoder_has_are_refused(changes: dict[str, int], words: str) -> None:
    shape = shape_of("grouped heads", "column")
    tensors, _ = model_of(shape, True)
    with pytest.raises(ValueError, match=words):
        Decoder(replace(shape, **changes), tensors)


def test_a_shift_of_groups_is_refused() -> None:
    shape = shape_of("grouped heads", "group")
    tensors, _ = model_of(shape, False)
    up = tensors.layers[1].up
    layers = [tensors.layers[0], tensors.layers[1]._replace(up=up._replace(beta=torch.zeros_like(up.alpha)))]
    with pytest.raises(ValueError, match="layer 1, up has a shift, which scale=group does not; beta must be None"):
        Decoder(shape, tensors._replace(layers=layers))


def test_nan_is_passed_on_by_float_and_refused_by_int8() -> None:
    shape = shape_of("grouped heads", "column")
    tensors, _ = model_of(shape, True)
    tensors.embedding[7, 3] = torch.nan
    ids = torch.tensor([1, 2, 7, 3])
    assert logits_of(Decoder(shape, tensors), ids)[2:].isnan().all()
    decoder = Decoder(shape, tensors, "int8")
    cache = decoder.new_cache(9)
    decoder.hidden(ids[:1], cache)
    with pytest.raises(NotFiniteError, match="position 2 are not"):
        decoder.hidden(ids[1:3], cache)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("embedding", lambda t: t[:-1], r"embedding is torch.float16 \[100, 96\] on cpu; it must be .* \[101, 96\]"),
        ("head", lambda t: t.float(), r"head is torch.float32"),
        ("final_norm", lambda t: t[:1], r"final_norm is torch.float16 \[1\]"),
        ("frequencies", lambda t: t[1:], r"frequencies is torch.float32 \[7\]"),
        ("layers", lambda layers: layers[:1], "there are 1 layers; they must be 2"),
        (
            "layers",
            lambda layers: [layers[0], layers[1]._replace(up=layers[1].down)],
            r"layer 1, up words is .* \[96, 5\]",
        ),
        (
            "layers",
            lambda layers: [layers[0]._replace(key=layers[0].key._replace(alpha=torch.ones(1, 95))), layers[1]],
            r"layer 0, key alpha is torch.float32 \[1, 95\]",
        ),
        (
            "layers",
            lambda layers: [layers[0], layers[1]._replace(mlp_norm=torch.ones(2, 96)[:, 0])],
            r"layer 1, mlp_norm is torch.float32 \[2\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(part: str, change: Any, words: str) -> None:
    shape = shape_of("grouped heads", "column")
    tensors, _ = model_of(shape, True)
    with pytest.raises(ValueError, match=words):
        Decoder(shape, tensors._replace(**{part: change(getattr(tensors, part))}))


def test_what_no_kernel_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of("grouped heads", "column")
    tensors, _ = model_of(shape, True)
    with pytest.raises(ValueError, match="activations='int4' is unknown; choose float or int8"):
        Decoder(shape, tensors, "int4")
    monkeypatch.setenv("FBITRAIN_BACKEND", "reference")
    with pytest.raises(ValueError, match="no compiled kernel runs scale=column"):
        Decoder(shape, tensors)
