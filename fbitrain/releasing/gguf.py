"""A release as a GGUF file, which llama.cpp runs: Llamas only.

Ternary matrices become TQ2_0 blocks (256 weights, 2 bits each and one fp16 scale), and those of binarize.scale=group
with 128 weights a group Q1_0 blocks (1 bit each). The matrices of other methods, and those whose rows are no whole
number of blocks, are written out in fp16, like the embedding. llama.cpp rounds activations to 8 bits for TQ2_0 and
Q1_0.

Block formats: ggml-common.h of https://github.com/ggml-org/llama.cpp.
N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, LlamaFileType
from torch import Tensor
from transformers import PretrainedConfig

from fbitrain.base.errors import UserError
from fbitrain.config import Config
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.model.config import BinarizeConfig
from fbitrain.model.hf import ReleasedModel
from fbitrain.releasing.gguf_tokenizer import add_tokenizer, check_tokenizer

Q1_0_GROUP = 128
FILE_TYPES = {
    GGMLQuantizationType.TQ2_0: LlamaFileType.MOSTLY_TQ2_0,
    GGMLQuantizationType.Q1_0: LlamaFileType.MOSTLY_Q1_0,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
}


def check_gguf(run: Path, config: PretrainedConfig, dtype: str) -> None:
    """Raises UserError if the run `run`, a model of `config`, cannot be written as GGUF in `dtype`."""
    if config.model_type != "llama":
        raise UserError(
            f"{run} is a {config.model_type}, and only Llamas are written as GGUF; release it as dense or packed"
        )
    if dtype != "float16":
        raise UserError(f"GGUF's blocks have their scales in fp16; release it with dtype float16, not {dtype}")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind != "default":
        raise UserError(
            f"{run} scales its rotary embedding ({kind}), which is not written as GGUF; release it as dense or packed"
        )


def write_gguf(
    folder: Path, config: Config, model: ReleasedModel, tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> Path:
    """Writes `tensors`, the model's dense ones in fp16, to a file in `folder` and returns it.

    Raises UserError if the tokenizer is of a kind that cannot be written.
    """
    kind = block_type(config.binarize)
    path = folder / f"{config.run.name}-{kind.name}.gguf"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    writer.add_name(config.run.name)
    writer.add_file_type(FILE_TYPES[kind])
    add_shape(writer, model.config)
    add_tokenizer(writer, tokenizer, model.config.vocab_size, add_bos=config.data.add_bos)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    for name, tensor in tensors.items():
        values = _reordered(name, tensor.numpy(), model.config)
        is_binary = name.rpartition(".")[0] in model.linears and values.ndim == 2
        _add_tensor(writer, names.get_name(name, (".weight", ".bias")), values, kind if is_binary else None)
    write_all(writer)
    check_tokenizer(path, tokenizer)
    return path


def block_type(binarize: BinarizeConfig) -> GGMLQuantizationType:
    """The blocks that hold a binary layer's weights exactly; F16 where there are none."""
    traits = binarize.traits
    if binarize.enabled and traits.levels == 3:
        return GGMLQuantizationType.TQ2_0
    groups = binarize.scale == "group" and binarize.group_size == Q1_0_GROUP
    one_pattern = binarize.enabled and traits.has_pattern and not traits.salient
    return GGMLQuantizationType.Q1_0 if one_pattern and groups else GGMLQuantizationType.F16


def q1_0_blocks(weight: npt.NDArray[np.float16]) -> npt.NDArray[np.uint8]:
    """[N, K] of two levels ±d per 128 neighbours -> bytes [N, K/128·18]: d in fp16, then a bit per weight, 1 for +d."""
    groups = weight.reshape(len(weight), -1, Q1_0_GROUP)
    scales = np.abs(groups[..., :1]).view(np.uint8)
    return np.concatenate([scales, np.packbits(groups >= 0, axis=-1, bitorder="little")], axis=-1).reshape(
        len(weight), -1
    )


def write_all(writer: gguf.GGUFWriter) -> None:
    """Writes what was added to its file, and closes that."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_shape(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Adds the sizes of a Llama as llama.cpp names them."""
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _reordered(name: str, values: npt.NDArray[np.float16], config: PretrainedConfig) -> npt.NDArray[np.float16]:
    """Rows of q and k change places: llama.cpp rotates neighbours in a head, transformers those half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n_heads = heads.get(name.split(".")[-2])
    if n_heads is None:
        return values
    halves = values.reshape(n_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, values: npt.NDArray[np.float16], kind: GGMLQuantizationType | None
) -> None:
    if values.ndim == 1:  # norms and biases, which llama.cpp takes in fp32 only
        writer.add_tensor(name, values.astype(np.float32))
    elif kind == GGMLQuantizationType.TQ2_0 and values.shape[1] % gguf.QK_K == 0:
        writer.add_tensor(name, gguf.quants.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    elif kind == GGMLQuantizationType.Q1_0:
        writer.add_tensor(name, q1_0_blocks(np.ascontiguousarray(values)), raw_dtype=kind)
    else:
        writer.add_tensor(name, np.ascontiguousarray(values))
