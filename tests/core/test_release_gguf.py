"""Releases for llama.cpp: blocks hold the weights exactly, other readers understand tensors and tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fbitrain.base.errors import UserError
from fbitrain.config import Config, DistillConfig, RunConfig
from fbitrain.data.config import DataConfig
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.loading.language_model import load_gguf
from fbitrain.loading.tokenizer_folder import PROBES
from fbitrain.model.build import binarize_
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.hf import ReleasedModel
from fbitrain.releasing.gguf import check_gguf, q1_0_blocks, write_gguf
from fbitrain.releasing.release import is_release

TERNARY = BinarizeConfig(method="ternary")
GROUPS = BinarizeConfig(scale="group", beta=False, group_size=128)
IDS = [5, 9, 20, 33, 7, 11, 40, 2]
LLAMA_TOKENIZER = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer" / "llama.model"


def tiny(binarize: BinarizeConfig, vocab_size: int, **fields: Any) -> tuple[ReleasedModel, PreTrainedModel]:
    """A trained model in its released form, and its dense form in fp32."""
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}
    shape |= {"vocab_size": vocab_size, "num_hidden_layers": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**{**shape, "initializer_range": 0.05, "rope_theta": 5000.0, **fields})
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    binarize_(lm, binarize)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
    weights = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    released = ReleasedModel.of(config, binarize, weights, torch.float16)
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    dense.load_state_dict({name: t.float() for name, t in released.dense_tensors().items()}, strict=False)
    dense.tie_weights()
    return released, dense


def write(folder: Path, tokenizer: Path, binarize: BinarizeConfig, **fields: Any) -> tuple[Path, PreTrainedModel]:
    released, dense = tiny(binarize, load_tokenizer(tokenizer).vocab_size + 3, **fields)
    config = Config(
        run=RunConfig(name="small"), binarize=binarize, data=DataConfig(), distill=DistillConfig(teacher=str(tokenizer))
    )
    return write_gguf(folder, config, released, released.dense_tensors(), load_tokenizer(tokenizer)), dense


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model.eval()(torch.tensor([IDS])).logits[0]
    return result


@pytest.mark.parametrize(
    ("binarize", "kind"), [(TERNARY, "TQ2_0"), (GROUPS, "Q1_0"), (BinarizeConfig(method="onebit"), "F16")]
)
def test_binary_layers_are_stored_in_their_blocks(
    tmp_path: Path, workspace: Any, binarize: BinarizeConfig, kind: str
) -> None:
    path, dense = write(tmp_path, workspace.teacher, binarize)
    assert path.name == f"small-{kind}.gguf"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kinds[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_output", "ffn_down", "ffn_up")} == {kind}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "F16"
    assert kinds["blk.0.attn_norm.weight"] == kinds["output_norm.weight"] == "F32"
    if kind != "Q1_0":  # what the package itself cannot read back
        stored = gguf.quants.dequantize(tensors["blk.1.ffn_down.weight"].data, GGMLQuantizationType[kind])
        assert np.array_equal(stored.reshape(256, 512), dense.model.layers[1].mlp.down_proj.weight.detach().numpy())


def test_q1_0_blocks_are_a_scale_and_128_bits() -> None:
    generator = np.random.default_rng(0)
    signs = generator.choice([-1.0, 1.0], (3, 2, 128))
    scales = generator.uniform(0.1, 2, (3, 2, 1)).astype(np.float16)
    blocks = q1_0_blocks((signs * scales).astype(np.float16).reshape(3, 256))
    assert blocks.shape == (3, 36)
    for row in range(3):
        for group in range(2):
            block = blocks[row, 18 * group : 18 * group + 18]
            assert block[:2].view(np.float16) == scales[row, group]
            bits = [block[2 + i // 8] >> (i % 8) & 1 for i in range(128)]
            assert bits == (signs[row, group] > 0).astype(int).tolist()


@pytest.mark.parametrize(
    ("binarize", "fields"),
    [
        (TERNARY, {}),
        (BinarizeConfig(method="xnor"), {"tie_word_embeddings": True}),
        (TERNARY, {"hidden_size": 192, "num_attention_heads": 4}),  # no whole number of blocks: fp16
    ],
)
def test_transformers_reads_the_same_model(
    tmp_path: Path, workspace: Any, binarize: BinarizeConfig, fields: dict[str, Any]
) -> None:
    path, dense = write(tmp_path, workspace.teacher, binarize, **fields)
    torch.testing.assert_close(logits(load_gguf(path, torch.float32)), logits(dense), rtol=0, atol=1e-5)


def test_the_tokenizer_in_the_file_gives_the_same_ids(tmp_path: Path, workspace: Any) -> None:
    path, _ = write(tmp_path, workspace.teacher, TERNARY)
    trained, written = load_tokenizer(workspace.teacher), load_tokenizer(path)
    for text in (*PROBES, "the model learns one bit"):
        assert written.encode(text) == trained.encode(text)
    assert (written.bos_id, written.eos_id) == (trained.bos_id, trained.eos_id)
    assert written.vocab_size == trained.vocab_size + 3


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, workspace: Any, change: dict[str, Any]) -> None:
    definition = json.loads((workspace.teacher / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**definition, **change}))
    with pytest.raises(UserError, match="cannot be written as GGUF"):
        write(tmp_path, tmp_path / "tokenizer.json", TERNARY)


def test_models_that_are_no_plain_llamas_are_refused() -> None:
    llama = LlamaConfig(num_hidden_layers=1)
    check_gguf(Path("run"), llama, "float16")
    with pytest.raises(UserError, match="float16, not bfloat16"):
        check_gguf(Path("run"), llama, "bfloat16")
    scaled = LlamaConfig(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(UserError, match=r"scales its rotary embedding \(linear\)"):
        check_gguf(Path("run"), scaled, "float16")
    scaled.model_type = "gpt2"
    with pytest.raises(UserError, match="only Llamas"):
        check_gguf(Path("run"), scaled, "float16")


def test_a_folder_with_a_gguf_file_is_a_release(tmp_path: Path) -> None:
    (tmp_path / "gguf").mkdir()
    assert not is_release(tmp_path)
    (tmp_path / "gguf" / "small-TQ2_0.gguf").write_bytes(b"")
    assert is_release(tmp_path)


# llama.cpp itself, where a Python has it

RUN = """
import sys, numpy, llama_cpp
path, text, out, *ids = sys.argv[1:]
model = llama_cpp.Llama(path, n_ctx=64, logits_all=True, verbose=False, n_threads=1)
model.eval([int(i) for i in ids])
tokens = model.tokenize(text.encode(), add_bos=False, special=False)
numpy.savez(out, logits=numpy.array(model.scores[:len(ids)]), tokens=tokens)
"""


def llama_python() -> str | None:
    """A Python interpreter with llama-cpp-python: this one, or that which LLAMA_CPP_PYTHON names."""
    return sys.executable if importlib.util.find_spec("llama_cpp") else os.environ.get("LLAMA_CPP_PYTHON")


@pytest.mark.skipif(llama_python() is None, reason="no llama-cpp-python; set LLAMA_CPP_PYTHON to a Python that has it")
@pytest.mark.parametrize(
    ("tokenizer", "binarize"),
    [("byte-level", TERNARY), ("byte-level", GROUPS), ("byte-level", BinarizeConfig()), ("sentencepiece", TERNARY)],
    ids=["TQ2_0", "Q1_0", "F16", "TQ2_0-sentencepiece"],
)
def test_llama_cpp_runs_the_file(tmp_path: Path, workspace: Any, binarize: BinarizeConfig, tokenizer: str) -> None:
    tokenizer_path = workspace.teacher if tokenizer == "byte-level" else LLAMA_TOKENIZER
    if not tokenizer_path.exists():
        pytest.skip(f"{tokenizer_path} is absent")
    path, dense = write(tmp_path, tokenizer_path, binarize)
    text, out = "def f(x):\n\treturn x['a']  # it's 1234,5\n\n two  spaces 漢字 é", tmp_path / "out.npz"
    command = [str(llama_python()), "-c", RUN, str(path), text, str(out), *map(str, IDS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, wanted = np.load(out), logits(dense).numpy()
    error = np.abs(found["logits"] - wanted).max() / wanted.std()
    assert error < (0.01 if "F16" in path.name else 0.15)  # blocks are multiplied by activations in 8 bits
    assert found["tokens"].tolist() == load_tokenizer(tokenizer_path).encode(text)
