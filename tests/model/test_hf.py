"""The numbers of a release, and packed folders on their way through transformers, with and without fbitrain."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.kernels.reference import unpack_signs
from fbitrain.loading.model_folder import load_lm
from fbitrain.model import remote_code, remote_layers
from fbitrain.model.build import binarize_, build_student, chosen_linears, llama_config
from fbitrain.model.config import BinarizeConfig, ModelConfig, SalientConfig
from fbitrain.model.hf import REMOTE_CODE, BinaryLlamaForCausalLM, ReleasedModel, copy_remote_code, register
from fbitrain.model.method_table import METHODS
from fbitrain.model.packed_layers import PackedBinaryLinear
from fbitrain.model.packing import Levels, pack_layer

SHAPE = ModelConfig(vocab_size=61, n_layers=2, n_heads=4, n_kv_heads=2, d_model=48, d_ff=80, max_seq_len=64)
PATTERNS = [
    BinarizeConfig(scale="column", beta=True),
    BinarizeConfig(scale="column", beta=False),
    BinarizeConfig(scale="row", beta=True),
    BinarizeConfig(scale="tensor", beta=True, skip=["lm_head", "o_proj"]),
    BinarizeConfig(scale="group", beta=False, group_size=16),
    BinarizeConfig(scale="row", beta=False, skip=[]),  # the head is binary too
]
IDS = torch.arange(1, 41).view(2, 20) % SHAPE.vocab_size


def trained_weights(binarize: BinarizeConfig) -> dict[str, torch.Tensor]:
    """A student's state dict with scales as training leaves them: spread out, some α negative."""
    student, _ = build_student(SHAPE, binarize, seed=3)
    generator = torch.Generator().manual_seed(4)
    weights = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    for name, tensor in weights.items():
        if name.endswith((".alpha", ".beta")):
            tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    assert all((t < 0).any() for name, t in weights.items() if name.endswith("alpha") and t.numel() > 100)
    return weights


def student_logits(binarize: BinarizeConfig, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    student, _ = build_student(SHAPE, binarize, seed=0)
    student.load_state_dict(weights)
    return logits(student)


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def write_packed(folder: Path, binarize: BinarizeConfig, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    folder.mkdir()
    weights = trained_weights(binarize)
    save_packed(folder, ReleasedModel.of(llama_config(SHAPE), binarize, weights, dtype))
    return weights


def save_packed(folder: Path, model: ReleasedModel) -> None:
    model.packed_config.save_pretrained(folder)
    save_file(model.packed_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    copy_remote_code(folder)


def dense_model(weights: dict[str, torch.Tensor], binarize: BinarizeConfig, dtype: torch.dtype) -> LlamaForCausalLM:
    model = LlamaForCausalLM(llama_config(SHAPE))
    tensors = ReleasedModel.of(model.config, binarize, weights, dtype).dense_tensors()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beta", [True, False])
def test_packed_scales_rebuild_the_dense_levels_exactly(dtype: torch.dtype, beta: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    alpha = 0.05 * torch.randn(1, 777, generator=generator)
    shift = 0.01 * torch.randn(1, 777, generator=generator) if beta else None
    levels = Levels.of(alpha, shift, dtype)
    assert torch.equal((levels.beta + levels.alpha).to(dtype), levels.high)
    assert torch.equal((levels.beta - levels.alpha).to(dtype), levels.low)
    if not beta:
        assert torch.equal(levels.beta, torch.zeros_like(alpha))
        assert torch.equal(levels.alpha, alpha.to(dtype).float())


def test_dense_takes_the_high_level_for_zero_and_minus_zero() -> None:
    trained = {
        "weight": torch.tensor([[0.0, -0.0, 1e-30], [-1e-30, -1.0, -2.0]]),
        "alpha": torch.tensor([[-0.5, 0.25, 1.0]]),
        "beta": torch.tensor([[0.125, 0.0, -1.0]]),
    }
    packed = pack_layer(BinarizeConfig(), trained, torch.float16)
    assert packed.weight(3, 2).tolist() == [[-0.375, 0.25, 0.0], [0.625, -0.25, -2.0]]


def test_dense_spreads_a_group_over_its_neighbours() -> None:
    trained = {"weight": torch.tensor([[1.0, -1.0, 1.0, -1.0]]), "alpha": torch.tensor([[1.0, 2.0]])}
    packed = pack_layer(BinarizeConfig(scale="group", beta=False, group_size=2), trained, torch.float32)
    assert packed.weight(4, 1).tolist() == [[1.0, -1.0, 2.0, -2.0]]


@pytest.mark.parametrize("binarize", PATTERNS, ids=lambda b: f"{b.scale}-{b.beta}-{len(b.skip)}")
def test_dense_and_both_packed_forms_compute_the_student(tmp_path: Path, binarize: BinarizeConfig) -> None:
    weights = write_packed(tmp_path / "packed", binarize)
    expected = logits(dense_model(weights, binarize, torch.float16))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    assert isinstance(ours, BinaryLlamaForCausalLM)
    plain = remote_code.BinaryLlamaForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(plain), expected, atol=1e-4, rtol=0)
    # What rounding to fp16 costs, against the trained model itself.
    torch.testing.assert_close(expected, student_logits(binarize, weights), atol=5e-3, rtol=0)
    assert expected.std() > 0.05


def test_float32_release_is_the_student_itself() -> None:
    weights = trained_weights(PATTERNS[0])
    expected = student_logits(PATTERNS[0], weights)
    torch.testing.assert_close(logits(dense_model(weights, PATTERNS[0], torch.float32)), expected, atol=2e-5, rtol=0)


def test_packed_layers_unpack_across_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = remote_layers.PackedLinear(70, 45, scale="row", beta=True)
    generator = torch.Generator().manual_seed(1)
    layer.weight_bits.random_(-(2**31), 2**31 - 1, generator=generator)
    layer.alpha.uniform_(-1, 1, generator=generator)
    layer.beta.uniform_(-1, 1, generator=generator)
    x = torch.randn(2, 3, 70, generator=generator)
    expected = x @ (unpack_signs(layer.weight_bits, 70, torch.float32) * layer.alpha + layer.beta).T
    monkeypatch.setattr(remote_layers, "BLOCK_WEIGHTS", 70 * 7)  # seven rows at a time, 45 is no multiple
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loading_in_any_dtype_keeps_bits_scales_and_rotary_frequencies(tmp_path: Path, dtype: torch.dtype) -> None:
    write_packed(tmp_path / "packed", PATTERNS[0])
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    for model_class in (BinaryLlamaForCausalLM, remote_code.BinaryLlamaForCausalLM):
        model = model_class.from_pretrained(tmp_path / "packed", dtype=dtype)
        state = model.state_dict()
        assert state.keys() == stored.keys()
        for name, tensor in stored.items():
            is_packed = name.endswith(("weight_bits", "alpha", "beta"))
            assert state[name].dtype == (tensor.dtype if is_packed else dtype), name
            assert torch.equal(state[name], tensor.to(state[name].dtype)), name
        fresh = LlamaForCausalLM(llama_config(SHAPE)).model.rotary_emb.inv_freq
        assert torch.equal(model.model.rotary_emb.inv_freq, fresh)
        assert torch.isfinite(logits(model)).all()


def test_saving_a_loaded_model_gives_the_same_folder(tmp_path: Path) -> None:
    write_packed(tmp_path / "packed", PATTERNS[4])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float16)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedBinaryLinear)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("packed", "again")]
    for key in ("model_type", "auto_map", "binarize", "bits_per_weight", "architectures"):
        assert configs[0][key] == configs[1][key]
    for file in REMOTE_CODE:
        assert (tmp_path / "again" / file.name).read_text() == file.read_text()


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_files_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    write_packed(tmp_path / "packed", PATTERNS[0])
    file = tmp_path / "packed" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.down_proj.weight_bits"
    if change == "missing":
        del tensors[name]
    elif change == "unknown":
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(48, 80)
    else:
        tensors[name] = tensors[name][:, :1].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    for model_class in (BinaryLlamaForCausalLM, remote_code.BinaryLlamaForCausalLM):
        with pytest.raises((ValueError, RuntimeError), match=r"down_proj|mismatch"):
            model_class.from_pretrained(tmp_path / "packed")


def test_a_config_without_binarize_is_refused() -> None:
    with pytest.raises(ValueError, match="binarize"):
        remote_code.BinaryLlamaForCausalLM(remote_code.BinaryLlamaConfig(num_hidden_layers=1, hidden_size=64))


ARCHITECTURES = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True},
    "gpt2": {"num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 1},  # Conv1D, biases, tied head
    "opt": {"num_attention_heads": 4, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "qwen2": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
}


def binarize_config(method: str) -> BinarizeConfig:
    if method == "partial":
        return BinarizeConfig(method=method, scale="group", beta=False, group_size=32)
    if method == "cherry":
        return BinarizeConfig(method=method, scale="row", beta=False, bits=2, salient=SalientConfig(dtype="float16"))
    return BinarizeConfig(method=method)


def fine_tuned(architecture: str, binarize: BinarizeConfig) -> PreTrainedModel:
    """A tiny model of any architecture with binary layers, every parameter moved from where it started."""
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
    sizes |= {} if architecture in ("gpt2", "opt") else {"intermediate_size": 96}
    torch.manual_seed(5)
    config = AutoConfig.for_model(architecture, **sizes, **ARCHITECTURES[architecture])
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    masks = {  # one in ten in every second layer, which is stored as a mask, one in a hundred in the others
        name: torch.rand(linear.out_features, linear.in_features) < (0.1 if i % 2 else 0.01)
        for i, (name, linear) in enumerate(chosen_linears(lm, binarize).items())
    }
    binarize_(lm, binarize, masks=masks if binarize.traits.salient else None)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    return lm.eval()


def checkpointed(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of it: every parameter once, and persistent buffers."""
    buffers = {name: buffer for name, buffer in lm.named_buffers() if name in lm.state_dict()}
    return {name: parameter.detach() for name, parameter in lm.named_parameters()} | buffers


CASES = [(architecture, method) for architecture in ("llama", "gpt2") for method in METHODS]
CASES += [("opt", "partial"), ("opt", "mixture_of_scales"), ("qwen2", "cherry"), ("qwen2", "ternary")]


@pytest.mark.parametrize(("architecture", "method"), CASES)
def test_every_method_and_architecture_in_both_formats(tmp_path: Path, architecture: str, method: str) -> None:
    binarize = binarize_config(method)
    lm = fine_tuned(architecture, binarize)
    model = ReleasedModel.of(lm.config, binarize, checkpointed(lm), torch.float16)
    save_packed(tmp_path, model)
    register(f"fbitrain_{architecture}")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    plain_class = getattr(remote_code, model.packed_config.architectures[0])
    plain = plain_class.from_pretrained(tmp_path, dtype=torch.float32)
    expected, found = logits(lm), logits(ours)
    # With int8 activations, a difference in the last place may move a code to its neighbour.
    near = 2e-2 if method in ("bitnet", "ternary") else 1e-5 if method != "bnn" else 1e-4
    torch.testing.assert_close(found, logits(plain), atol=near, rtol=0)
    # bnn has no scales: its activations are large, and fp16 rounds embeddings, norms and biases too.
    fp16 = 5e-2 if method == "bnn" else 2e-2 if method in ("bitnet", "ternary") else 3e-3
    torch.testing.assert_close(found, expected, atol=fp16, rtol=0)
    assert expected.std() > 0.15
    if method != "mixture_of_scales":
        dense = AutoModelForCausalLM.from_config(lm.config, dtype=torch.float32)
        missing, unexpected = dense.load_state_dict(
            {name: tensor.float() for name, tensor in model.dense_tensors().items()}, strict=False
        )
        assert (set(missing), unexpected) == ({"lm_head.weight"} & set(lm.all_tied_weights_keys), [])
        dense.tie_weights()
        torch.testing.assert_close(logits(dense), found, atol=fp16, rtol=0)


def test_generation_and_saving_work_in_another_architecture(tmp_path: Path) -> None:
    binarize = binarize_config("partial")
    lm = fine_tuned("gpt2", binarize)
    save_packed(tmp_path / "packed", ReleasedModel.of(lm.config, binarize, checkpointed(lm), torch.float32))
    register("gpt2")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    wanted = lm.generate(IDS[:, :5], max_new_tokens=8, do_sample=False)
    assert torch.equal(packed.generate(IDS[:, :5], max_new_tokens=8, do_sample=False), wanted)
    packed.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)


def test_an_unknown_class_is_an_attribute_error() -> None:
    for name in ("BinaryNonesuch", "Nonesuch", "Binary__name__"):
        with pytest.raises(AttributeError, match=name):
            getattr(remote_code, name)
    register("fbitrain_nonesuch")


# Run with `python -I` in an environment where importing fbitrain fails.
BARE = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fbitrain":
            raise ModuleNotFoundError(f"hidden: {name}")
sys.meta_path.insert(0, Hidden())
try:
    import fbitrain
except ModuleNotFoundError:
    pass
else:
    sys.exit("fbitrain can be imported, so this proves nothing")
import torch
from transformers import AutoModelForCausalLM
from safetensors.torch import save_file
packed, dense, gpt2, out = sys.argv[1:]
try:
    AutoModelForCausalLM.from_pretrained(packed)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    sys.exit("loaded without trust_remote_code")
ids = torch.arange(1, 41).view(2, 20) % 61
packed_model = AutoModelForCausalLM.from_pretrained(packed, trust_remote_code=True, dtype=torch.float32)
packed_model.save_pretrained(out + "/resaved")
again = AutoModelForCausalLM.from_pretrained(out + "/resaved", trust_remote_code=True, dtype=torch.float32)
dense_model, info = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.inference_mode():
    models = {"packed": packed_model, "again": again, "dense": dense_model}
    models["gpt2"] = AutoModelForCausalLM.from_pretrained(gpt2, trust_remote_code=True, dtype=torch.float32)
    save_file({name: model.eval()(input_ids=ids).logits for name, model in models.items()}, out + "/logits.safetensors")
"""


def test_in_a_bare_environment_packed_loads_by_its_own_code_and_equals_dense(tmp_path: Path) -> None:
    binarize = PATTERNS[0]
    weights = write_packed(tmp_path / "packed", binarize)
    dense_model(weights, binarize, torch.float16).half().save_pretrained(tmp_path / "dense")
    partial = binarize_config("partial")
    gpt2 = fine_tuned("gpt2", partial)
    (tmp_path / "gpt2").mkdir()
    save_packed(tmp_path / "gpt2", ReleasedModel.of(gpt2.config, partial, checkpointed(gpt2), torch.float16))
    hidden = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    hidden["HF_MODULES_CACHE"] = str(tmp_path / "hf" / "modules")
    command = [sys.executable, "-I", "-c", BARE, *(str(tmp_path / name) for name in ("packed", "dense", "gpt2", ""))]
    done = subprocess.run(
        command, cwd=tmp_path, env=hidden, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    bare = load_file(tmp_path / "logits.safetensors")
    expected = logits(dense_model(weights, binarize, torch.float16))
    torch.testing.assert_close(bare["dense"], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(bare["packed"], expected, atol=1e-4, rtol=0)
    assert torch.equal(bare["again"], bare["packed"])
    torch.testing.assert_close(bare["gpt2"], logits(gpt2), atol=3e-3, rtol=0)


def _last_row(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.salient_rows"][-1] = 2**31 - 1


def _falling_rows(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.salient_rows"][3] = 2**30


def _columns_beyond(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.salient_columns"] = torch.full_like(tensors[f"{name}.salient_columns"].int(), 60000).to(
        torch.uint16
    )


def _equal_columns(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.salient_columns"] = torch.zeros_like(tensors[f"{name}.salient_columns"].int()).to(torch.uint16)
    rows = tensors[f"{name}.salient_rows"]
    rows[1:] = rows[-1]  # all in the first row, all in its first column


def _other_mask(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.salient_mask"].zero_()


def _scale(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.alpha"][-1] = torch.nan


def _salient(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.salient_values"][-1] = torch.inf


@pytest.mark.parametrize(
    ("tamper", "kind", "said"),
    [
        (_last_row, "salient_rows", "salient_rows does not divide the"),
        (_falling_rows, "salient_rows", "salient_rows does not divide the"),
        (_columns_beyond, "salient_columns", "columns beyond the"),
        (_equal_columns, "salient_columns", "not in ascending order"),
        (_other_mask, "salient_mask", "marks 0 weights"),
        (_scale, "alpha", "alpha is not finite"),
        (_salient, "salient_values", "salient_values is not finite"),
    ],
)
def test_a_tampered_release_is_refused_before_anything_is_allocated(
    tmp_path: Path, tamper: Callable[[dict[str, torch.Tensor], str], None], kind: str, said: str
) -> None:
    """With fbitrain and without; a last row of 2**31 - 1 asked for 8.6 GB."""
    binarize = binarize_config("cherry")
    lm = fine_tuned("llama", binarize)
    model = ReleasedModel.of(lm.config, binarize, checkpointed(lm), torch.float16)
    save_packed(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith(kind)).rpartition(".")[0]
    tamper(tensors, name)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for model_class in (AutoModelForCausalLM, getattr(remote_code, model.packed_config.architectures[0])):
        with pytest.raises(ValueError, match=f"files are damaged: {name}.*{said}"):
            model_class.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(UserError, match=f"{name}.*{said}"):
        load_lm(tmp_path, torch.float32)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
