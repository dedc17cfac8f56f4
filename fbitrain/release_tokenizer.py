"""The tokenizer of a release: files that AutoTokenizer reads and that give the ids the model was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fbitrain.config import Config
from fbitrain.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from fbitrain.errors import UserError
from fbitrain.files import write_json

NEEDED = ("tokenizer.json", "tokenizer_config.json")
FILES = (*NEEDED, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
# What converters get wrong: leading and repeated spaces, newlines, digits, contractions, scripts, joined emoji.
PROBES = ("def f(x):\n\treturn x['a']  # it's 1234,5\n\n", "  two  spaces", " ", "ΑΩ 漢字 é مرحبا 👩‍🔬", "a", "")


def tokenizer_source(config: Config) -> str:
    """Where the run's tokenizer came from: a path or a hub id."""
    return config.distill.teacher if config.data.tokenizer == "teacher" else config.data.tokenizer


def write_tokenizer(source: str, folder: Path) -> Tokenizer:
    """Writes the tokenizer at `source` into `folder` and returns it as training saw it.

    A Hugging Face folder's files are copied; other kinds, and files that AutoTokenizer would read otherwise than
    training did, are written as a PreTrainedTokenizerFast. Raises UserError if even that gives other token ids.
    """
    trained = load_tokenizer(source)
    if all((Path(source) / name).is_file() for name in NEEDED):
        copies = [Path(shutil.copy(Path(source) / name, folder)) for name in FILES if (Path(source) / name).is_file()]
        if _reads_alike(folder, trained):
            return trained
        for copy in copies:
            copy.unlink()
    _write_fast(trained, folder)
    if not _reads_alike(folder, trained):
        raise UserError(
            f"tokenizer {source} cannot be written in a form that transformers reads the same way; "
            "name a folder with a tokenizer.json that matches it in data.tokenizer of the checkpoint's config.yaml"
        )
    return trained


def _reads_alike(folder: Path, trained: Tokenizer) -> bool:
    readers = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in PROBES:
        ids = trained.encode(text)
        if readers[0].encode(text, add_special_tokens=False) != ids or readers[1].encode(text) != ids:
            return False
    return True


def _write_fast(trained: Tokenizer, folder: Path) -> None:
    if isinstance(trained, HFTokenizer):
        backend = trained.backend
    else:
        assert isinstance(trained, SentencePieceTokenizer)
        backend = _bpe_backend(trained.model)
    names = {
        f"{kind}_token": backend.id_to_token(token_id)
        for kind, token_id in (("bos", trained.bos_id), ("eos", trained.eos_id))
        if token_id is not None
    }
    PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names).save_pretrained(
        folder
    )
    # transformers 5 writes a class name of its own, which versions before it do not know; this one all of them know.
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _bpe_backend(model: SentencePieceProcessor) -> tokenizers.Tokenizer:
    """A SentencePiece BPE model of LLaMA's kind (byte fallback, no normalization) in the `tokenizers` library.

    Not transformers' own conversion, which ranks merges by piece id instead of score and drops a leading space: most
    indented lines would get other ids.
    """
    pieces = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    special = [piece for piece, i in pieces.items() if model.is_control(i) or model.is_unknown(i)]
    merges = [
        (-model.get_score(i), len(piece[:cut]), (piece[:cut], piece[cut:]))
        for piece, i in pieces.items()
        if piece not in special and not model.is_byte(i)
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    merges.sort(key=lambda merge: merge[:2])
    bpe = models.BPE(
        vocab=pieces,
        merges=[pair for *_, pair in merges],
        unk_token=model.id_to_piece(model.unk_id()),
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(bpe)
    backend.add_special_tokens([tokenizers.AddedToken(piece, normalized=False, special=True) for piece in special])
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend
