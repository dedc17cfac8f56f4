"""llama.cpp as a peer in whole-model benchmarks: GGUF files of a Llama's dimensions with random weights, run by it.

Needs `llama-cpp-python` (pip install 'fbitrain[bench]'). Embedding and head are F16 in every file, as in a release.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from fbitrain.base.errors import UserError
from fbitrain.model.config import ModelConfig

FORMATS = ("Q1_0", "TQ2_0", "F16")


class LlamaCpp:
    """A GGUF file run by llama.cpp. Raises UserError without llama-cpp-python."""

    def __init__(self, path: Path, threads: int, n_positions: int) -> None:
        try:
            import llama_cpp
        except ImportError:
            raise UserError("llama-cpp-python is not installed; pip install 'fbitrain[bench]'") from None
        self.llama = llama_cpp.Llama(
            str(path),
            n_ctx=n_positions,
            n_batch=n_positions,
            n_ubatch=n_positions,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def start(self) -> None:
        """Forgets the text so far."""
        self.llama.reset()

    def feed(self, ids: Sequence[int]) -> None:
        """Computes the logits after `ids`."""
        self.llama.eval(ids)


def write_gguf(path: Path, model: ModelConfig, format_name: str) -> None:
    """Writes a Llama of `model`'s dimensions to `path`, its Linears random in the GGUF type `format_name`."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    head_size, kv_heads = model.d_model // model.n_heads, model.n_kv_heads or model.n_heads
    writer.add_block_count(model.n_layers)
    writer.add_context_length(model.max_seq_len)
    writer.add_embedding_length(model.d_model)
    writer.add_feed_forward_length(model.d_ff)
    writer.add_head_count(model.n_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(model.rope_theta)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(model.vocab_size)])
    writer.add_token_scores([0.0] * model.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * model.vocab_size)
    for name in ("token_embd", "output"):
        _add(writer, f"{name}.weight", (model.vocab_size, model.d_model), Type.F16, rng)
    writer.add_tensor("output_norm.weight", np.ones(model.d_model, np.float32))
    kv_width = kv_heads * head_size
    linears = {
        **{"attn_q": (model.d_model, model.d_model), "attn_k": (kv_width, model.d_model)},
        **{"attn_v": (kv_width, model.d_model), "attn_output": (model.d_model, model.d_model)},
        **{"ffn_gate": (model.d_ff, model.d_model), "ffn_up": (model.d_ff, model.d_model)},
        "ffn_down": (model.d_model, model.d_ff),
    }
    for layer in range(model.n_layers):
        for name, shape in linears.items():
            _add(writer, f"blk.{layer}.{name}.weight", shape, Type[format_name], rng)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(model.d_model, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, shape: tuple[int, int], kind: Type, rng: np.random.Generator) -> None:
    if kind is Type.F16:
        values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, _random_blocks(shape, kind, rng), raw_dtype=kind)


def _random_blocks(shape: tuple[int, int], kind: Type, rng: np.random.Generator) -> NDArray[Any]:
    """Random bits where the weights are, and 0.02 as each block's scale, fp16: first in Q1_0, last in TQ2_0."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[1] % weights:
        raise UserError(f"{kind.name} needs widths that are multiples of {weights}, not {shape[1]}")
    blocks = rng.integers(0, 256, (shape[0], shape[1] // weights, size), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.02).tobytes(), np.uint8)
    if kind is Type.TQ2_0:
        blocks[:] = np.array([0, 1, 2])[blocks % 3] * 0b01010101  # digits 0 to 2, four in a byte
        blocks[..., -2:] = scale
    else:
        blocks[..., :2] = scale
    return blocks.reshape(shape[0], -1)
