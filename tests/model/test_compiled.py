"""Packed folders on the compiled decoder: which run there, as the same function as elsewhere, in how much memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from fbitrain.base.errors import UserError
from fbitrain.benches.decoding import write_random_packed
from fbitrain.kernels import cpu
from fbitrain.loading.model_folder import load_lm
from fbitrain.model.compiled import PackedLlama, level_for, mapped_tensors, why_not_compiled
from fbitrain.model.config import BinarizeConfig, ModelConfig
from fbitrain.model.hf import BinaryLlamaConfig
from fbitrain.model.packing import sign_options

pytestmark = pytest.mark.skipif(bool(cpu.levels()["portable"]), reason="the compiled kernels do not run here")
SHAPE = {"n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 64, "d_ff": 160, "vocab_size": 300}


def written(folder: Path, scale: str = "column", beta: bool = True, **changes: Any) -> Path:
    model = ModelConfig(**{**SHAPE, **changes})
    write_random_packed(folder / "packed", model, BinarizeConfig(scale=scale, beta=beta, group_size=32))
    return folder / "packed"


def opened(folder: Path, activations: str = "float") -> PackedLlama:
    return PackedLlama(folder, AutoConfig.from_pretrained(folder), activations)


@pytest.mark.parametrize(
    ("scale", "beta", "tied"),
    [
        ("column", True, False),
        ("column", False, True),
        ("row", True, True),
        ("tensor", True, False),
        ("group", False, 0),
    ],
)
def test_a_folder_is_the_same_function_as_through_transformers(
    tmp_path: Path, scale: str, beta: bool, tied: bool
) -> None:
    folder = written(tmp_path, scale, beta, tie_embeddings=bool(tied), rope_theta=5000.0, norm_eps=1e-3)
    ids = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_lm(folder, torch.float32)(ids).logits.double()
    packed = opened(folder)
    found = packed.head(packed.hidden(ids).flatten(0, 1)).view_as(expected)
    noise = (found - expected).square().sum() / expected.square().sum()
    assert -10 * torch.log10(noise) > 90
    step = packed.continuation(33).logits
    by_steps = torch.stack([step([token]) for token in ids[1].tolist()])
    torch.testing.assert_close(by_steps, found[1].float(), rtol=1e-4, atol=1e-5)


def config_of(**changes: Any) -> Any:
    how = {"layer": "binary", "options": sign_options("column", True, 128), "own_options": {}, "skip": ["lm_head"]}
    return BinaryLlamaConfig(binarize={**how, **changes.pop("binarize", {})}, **changes)


@pytest.mark.parametrize(
    ("config", "device", "dtype", "level", "why"),
    [
        (config_of(), "cpu", torch.float32, "avx2", ""),
        (LlamaConfig(), "cpu", torch.float32, "avx2", "not a packed Llama"),
        (config_of(), "cuda:0", torch.float32, "avx2", "only for cpu, not cuda:0"),
        (config_of(), "cpu", torch.bfloat16, "avx2", "only for float32, not bfloat16"),
        (config_of(binarize={"skip": ["lm_head", "down_proj"]}), "cpu", torch.float32, "avx2", "down_proj"),
        (config_of(binarize={"skip": []}), "cpu", torch.float32, "avx2", "or none"),
        (config_of(binarize={"layer": "ternary"}), "cpu", torch.float32, "avx2", "ternary"),
        (
            config_of(binarize={"options": sign_options("tensor", False, 0, int8=True)}),
            *("cpu", torch.float32, "avx2", "round their inputs"),
        ),
        (
            config_of(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
            *("cpu", torch.float32, "avx2", "rope_type='linear'"),
        ),
        (config_of(hidden_act="gelu"), "cpu", torch.float32, "avx2", "plain Llama's"),
        (config_of(attention_bias=True), "cpu", torch.float32, "avx2", "plain Llama's"),
        (config_of(), "cpu", torch.float32, "", "no compiled kernel"),
    ],
)
def test_why_a_model_does_not_run_on_it(config: Any, device: str, dtype: torch.dtype, level: str, why: str) -> None:
    found = why_not_compiled(config, device, dtype, level)
    assert why in found
    assert bool(why) == bool(found)


def test_a_level_is_looked_for_only_where_there_are_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert level_for(LlamaConfig()) == ""
    assert level_for(config_of()) in cpu.LEVELS
    assert level_for(config_of(binarize={"options": sign_options("group", False, 100)})) == ""
    monkeypatch.setenv("FBITRAIN_BACKEND", "portable")
    assert level_for(config_of()) == "portable"


def test_a_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.alpha"
    save_file({key: tensor for key, tensor in whole.items() if key != name}, file)
    with pytest.raises(UserError, match=f"lacks its model's tensor {name}"):
        opened(folder)
    save_file(whole | {name: whole[name][:, 1:].contiguous()}, file)
    with pytest.raises(UserError, match=r"layer 1, up alpha is torch.float32 \[1, 63\]"):
        opened(folder)
    file.write_bytes(b"short")
    with pytest.raises(UserError, match="cannot be loaded as a packed model"):
        opened(folder)


def test_scales_and_flags_that_the_files_contradict_are_one_sentence(tmp_path: Path) -> None:
    folder = written(tmp_path)
    file, config = folder / "model.safetensors", folder / "config.json"
    whole, settings = load_file(file), config.read_text()
    for name, value in (("1.mlp.up_proj.alpha", torch.nan), ("0.self_attn.q_proj.beta", torch.inf)):
        damaged = whole[f"model.layers.{name}"].clone()
        damaged.view(-1)[-1] = value
        save_file(whole | {f"model.layers.{name}": damaged}, file)
        with pytest.raises(UserError, match=f"{name} is not finite"):
            opened(folder)
    save_file(whole, file)
    flipped = json.loads(settings)
    flipped["binarize"]["options"]["beta"] = False
    config.write_text(json.dumps(flipped))
    with pytest.raises(UserError, match=r"hold model.layers.0.mlp.down_proj.beta, which its config.json has no place"):
        opened(folder)
    config.write_text(settings)
    save_file(whole | {"model.norm.weight": torch.full_like(whole["model.norm.weight"], torch.nan)}, file)
    with pytest.raises(UserError, match="hidden states are not finite"):
        opened(folder).continuation(2).likeliest([1])


def test_int8_refuses_a_diverged_model_in_the_users_words(tmp_path: Path) -> None:
    folder = written(tmp_path)
    whole = load_file(folder / "model.safetensors")
    whole["model.norm.weight"][3] = torch.nan  # after the last Linear: no activations are quantized there
    whole["model.embed_tokens.weight"][5, 3] = torch.inf
    save_file(whole, folder / "model.safetensors")
    assert opened(folder).continuation(2).logits([1]).isnan().all()
    with pytest.raises(UserError, match="position 1 are not; run the model with --activations float"):
        opened(folder, "int8").continuation(4).logits([1, 5])


def test_sharded_folders_are_read_whole(tmp_path: Path) -> None:
    folder = written(tmp_path)
    whole = load_file(folder / "model.safetensors")
    expected = opened(folder).continuation(3).logits([1, 2, 3])
    names = sorted(whole)
    for number, part in enumerate((names[:10], names[10:])):
        save_file({name: whole[name] for name in part}, folder / f"part{number}.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"part{int(name not in names[:10])}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    assert set(mapped_tensors(folder)) == set(whole)
    assert torch.equal(opened(folder).continuation(3).logits([1, 2, 3]), expected)


GENERATE = """
import sys
from pathlib import Path
from transformers import AutoConfig
from fbitrain.benches.decoding import peak_memory
from fbitrain.inference.generate import Sampling, stream_tokens
from fbitrain.model.compiled import PackedLlama
from fbitrain.loading.model_folder import load_lm
folder = Path(sys.argv[1])
config = AutoConfig.from_pretrained(folder)
with peak_memory() as peak:
    model = PackedLlama(folder, config, sys.argv[2])
    list(stream_tokens(model, list(range(100)), Sampling(max_new_tokens=8)))
print(peak())
"""


@pytest.mark.parametrize(
    ("set_default", "value", "usual"),
    [(torch.set_default_device, "meta", "cpu"), (torch.set_default_dtype, torch.bfloat16, torch.float32)],
)
def test_torchs_defaults_change_nothing(
    tmp_path: Path, set_default: Callable[[Any], None], value: Any, usual: Any
) -> None:
    folder = written(tmp_path)
    expected = opened(folder).continuation(9).logits([1, 2, 3])
    set_default(value)
    try:
        found = opened(folder).continuation(9).logits([1, 2, 3])
    finally:
        set_default(usual)
    assert torch.equal(found, expected)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_generating_never_builds_a_dense_weight(tmp_path: Path, activations: str) -> None:
    # Few wide layers, so that what torch and the allocator add from run to run (ten MiB or so) is small beside a layer.
    folder = written(tmp_path, n_layers=2, n_heads=16, n_kv_heads=16, d_model=2048, d_ff=5632)
    one_layer_dense = (4 * 2048 * 2048 + 3 * 2048 * 5632) * 4 / 2**20  # 196 MiB; both 392, their bits 12
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, folder, activations], capture_output=True, text=True, timeout=120, check=True
    )
    assert 12 < float(done.stdout) < one_layer_dense / 2
