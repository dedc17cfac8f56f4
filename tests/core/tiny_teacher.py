"""A Llama small enough to be every test's teacher, also as a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fbitrain import teacher as teacher_module
from fbitrain.teacher import load_teacher

V, D, LAYERS, HEADS, KV_HEADS, FF = 300, 32, 2, 4, 2, 48


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def token_ids() -> torch.Tensor:
    return torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))


def load(path: Path | str, **options: Any) -> teacher_module.Teacher:
    return load_teacher(path, dtype=torch.float32, device="cpu", **options)


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: the rotary pairs of a head side by side instead of in two halves."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A Llama with fp32 tensors and a byte-level tokenizer with one merge."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(V)
    # GPT-2's printable stand-ins for the 256 bytes, one merged pair, then fillers.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = ["<s>", "</s>", *symbols, "ab", *(f"filler{i}" for i in range(V - 259))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (V - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, HEADS)
        elif name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, KV_HEADS)
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
