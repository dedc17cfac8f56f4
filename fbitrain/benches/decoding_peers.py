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
from transformers import LlamaConfig

from fbitrain.base.errors import UserError
from fbitrain.releasing.gguf import add_shape, write_all

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


def write_gguf(path: Path, config: LlamaConfig, format_name: str) -> None:
    """Writes a Llama of `config`'s dimensions to `path`, its Linears random in the GGUF type `format_name`."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    add_shape(writer, config)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{number}>" for number in range(config.vocab_size)])
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_token_types([gguf.TokenType.NORMAL] * config.vocab_size)
    width, inner = config.hidden_size, config.intermediate_size
    for name in ("token_embd", "output"):
        _add(writer, f"{name}.weight", (config.vocab_size, width), Type.F16, rng)
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    kv_width = config.num_key_value_heads * (width // config.num_attention_heads)
    linears = {
        **{"attn_q": (width, width), "attn_k": (kv_width, width), "attn_v": (kv_width, width)},
        **{"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)},
        "ffn_down": (width, inner),
    }
    for layer in range(config.num_hidden_layers):
        for name, shape in linears.items():
            _add(writer, f"blk.{layer}.{name}.weight", shape, Type[format_name], rng)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, np.float32))
    write_all(writer)


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
