"""A tokenizer as a folder of files: the copy that a run keeps, and what a release gives to AutoTokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_folder, fsync_tree, write_json
from fbitrain.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer

KEPT = "tokenizer"  # the folder's name in a run
NEEDED = ("tokenizer.json", "tokenizer_config.json")
FILES = (*NEEDED, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")
# What converters get wrong: leading and repeated spaces, newlines, digits, contractions, scripts, joined emoji.
PROBES = ("def f(x):\n\treturn x['a']  # it's 1234,5\n\n", "  two  spaces", " ", "ΑΩ 漢字 é مرحبا 👩‍🔬", "a", "")


def keep_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Copies the tokenizer's files into a run, which then needs no other folder to be released (`kept_tokenizer`).

    Raises OSError if they cannot be written.
    """
    kept = run_dir / KEPT
    if _holds(kept, tokenizer):
        return
    building = run_dir / f".{KEPT}.tmp"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    if isinstance(tokenizer, SentencePieceTokenizer):
        (building / "tokenizer.model").write_bytes(tokenizer.model.serialized_model_proto())
    else:
        _copy(tokenizer, building)
        if not _holds(building, tokenizer):  # a single file, or BOS or EOS stands in a file of the model's
            _write_fast(tokenizer, building)
    fsync_tree(building)
    shutil.rmtree(kept, ignore_errors=True)
    building.replace(kept)
    fsync_folder(run_dir)


def _holds(folder: Path, tokenizer: Tokenizer) -> bool:
    try:
        return load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    except UserError:  # nothing is there, or it is damaged
        return False


def kept_tokenizer(run_dir: Path) -> str:
    """The folder with the tokenizer's files in a run; empty if it has none, as runs of earlier versions."""
    return str(run_dir / KEPT) if (run_dir / KEPT).is_dir() else ""


def write_tokenizer(trained: Tokenizer, folder: Path) -> None:
    """Writes a tokenizer into `folder` as training saw it, for transformers' AutoTokenizer.

    A Hugging Face folder's files are copied; other kinds, and files that AutoTokenizer would read otherwise than
    training did, are written as a PreTrainedTokenizerFast. Raises UserError if even that gives other token ids.
    """
    copies = _copy(trained, folder)
    if {path.name for path in copies}.issuperset(NEEDED) and _reads_alike(folder, trained):
        return
    for copy in copies:
        copy.unlink()
    _write_fast(trained, folder)
    if not _reads_alike(folder, trained):
        raise UserError(
            f"tokenizer {trained.path} cannot be written in a form that transformers reads the same way; "
            "name a folder with a tokenizer.json that matches it in data.tokenizer of the checkpoint's config.yaml"
        )


def _copy(tokenizer: Tokenizer, folder: Path) -> list[Path]:
    """Copies of a Hugging Face folder's tokenizer files; none of a tokenizer that is a single file."""
    original = Path(tokenizer.path)
    return [Path(shutil.copy(original / name, folder)) for name in FILES if (original / name).is_file()]


def _reads_alike(folder: Path, trained: Tokenizer) -> bool:
    readers = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), load_tokenizer(folder)
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
