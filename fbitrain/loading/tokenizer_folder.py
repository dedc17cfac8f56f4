"""A tokenizer as a folder of files: the copy that a run keeps, and what a release gives to AutoTokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import decoders, models, normalizers
from transformers import AutoTokenizer

from fbitrain.base.errors import UserError
from fbitrain.base.files import replacing_folder, write_json, write_text
from fbitrain.data.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from fbitrain.loading.pretrained_shape import KEPT_TOKENIZER

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CHAT_TEMPLATE = "chat_template.jinja"
# What converters get wrong: leading and repeated spaces, newlines, digits, contractions, scripts, joined emoji.
PROBES = ("def f(x):\n\treturn x['a']  # it's 1234,5\n\n", "  two  spaces", " ", "ΑΩ 漢字 é مرحبا 👩‍🔬", "a", "")


def keep_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Copies the tokenizer's files into a run, which then needs no other folder to be released.

    pretrained_shape.kept_tokenizer finds them. Raises OSError if they cannot be written.
    """
    kept = run_dir / KEPT_TOKENIZER
    if _holds(kept, tokenizer):
        return
    with replacing_folder(kept) as folder:
        if isinstance(tokenizer, SentencePieceTokenizer):
            (folder / "tokenizer.model").write_bytes(tokenizer.model.serialized_model_proto())
            return
        _copy(tokenizer, folder)
        if not _holds(folder, tokenizer):  # a single file, or BOS or EOS stands in a file of the model's
            bos, eos = _names(tokenizer)
            _write(_definition(tokenizer), {"bos_token": bos, "eos_token": eos}, folder)


def _holds(folder: Path, tokenizer: Tokenizer) -> bool:
    try:
        return load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    except UserError:  # nothing is there, or it is damaged
        return False


def write_tokenizer(trained: Tokenizer, folder: Path, *, add_bos: bool, max_length: int | None) -> None:
    """Writes a tokenizer into `folder`, as training saw it, in a form that every transformers from 4.51 on reads alike.

    add_bos: whether BOS stands before a text. tokenizer.json itself says so, so that everything that reads the folder
    does the same; a tokenizer that puts no BOS there names none. max_length: positions of the model, in tokens. Write
    the model's config.json first: AutoTokenizer looks at it. Raises UserError if AutoTokenizer reads other token ids.
    """
    bos, eos = _names(trained)
    start = {bos: trained.bos_id} if add_bos and bos is not None and trained.bos_id is not None else {}
    definition = {**_definition(trained), "post_processor": _template(start)}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the one name that all versions know
        "model_input_names": ["input_ids", "attention_mask"],  # without token_type_ids, which most models refuse
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",  # a batch's continuations begin at the end of its prompts
        "add_bos_token": bool(start),
        "add_eos_token": False,  # it would end every prompt
        "bos_token": bos if start else None,
        "eos_token": eos,
        "pad_token": _piece(trained, pad_id(trained)),
        "model_max_length": max_length,
        "chat_template": _original_settings(trained).get("chat_template"),
    }
    _write(definition, settings, folder)
    if (chat := Path(trained.path) / CHAT_TEMPLATE).is_file():
        shutil.copy(chat, folder)
    if not _reads_alike(folder, trained, list(start.values())):
        raise UserError(
            f"tokenizer {trained.path} cannot be written in a form that transformers reads the same way; "
            "name a folder with a tokenizer.json that matches it in data.tokenizer of the checkpoint's config.yaml"
        )


def pad_id(trained: Tokenizer) -> int | None:
    """What fills up the shorter texts of a batch: the tokenizer's own padding, or else EOS, or else BOS."""
    if isinstance(trained, HFTokenizer):
        own = _original_settings(trained).get("pad_token")
        own = own.get("content") if isinstance(own, dict) else own
        if isinstance(own, str) and (token_id := trained.backend.token_to_id(own)) is not None:
            return int(token_id)
    return trained.eos_id if trained.eos_id is not None else trained.bos_id


def prompt_start(tokenizer: Tokenizer, folder: Path) -> list[int]:
    """The ids that the tokenizer in `folder` puts before a text, as transformers' does: [BOS], or nothing."""
    adds_bos = read_settings(folder).get("add_bos_token")
    if isinstance(tokenizer, HFTokenizer) and not isinstance(adds_bos, bool):
        text = "a"
        plain, whole = (tokenizer.backend.encode(text, add_special_tokens=add).ids for add in (False, True))
        return list(whole[: whole.index(plain[0])]) if plain and plain[0] in whole else []
    # A SentencePiece model says nothing of it, and transformers' class for it adds BOS.
    return [tokenizer.bos_id] if tokenizer.bos_id is not None and adds_bos is not False else []


def _copy(tokenizer: Tokenizer, folder: Path) -> None:
    """Copies a Hugging Face folder's tokenizer files; none of a tokenizer that is a single file."""
    original = Path(tokenizer.path)
    for name in (*FILES, CHAT_TEMPLATE):
        if (original / name).is_file():
            shutil.copy(original / name, folder)


def _reads_alike(folder: Path, trained: Tokenizer, start: list[int]) -> bool:
    readers = AutoTokenizer.from_pretrained(folder, trust_remote_code=False), load_tokenizer(folder)
    for text in PROBES:
        ids = trained.encode(text)
        if readers[0].encode(text, add_special_tokens=False) != ids or readers[1].encode(text) != ids:
            return False
        if readers[0].encode(text) != start + ids:
            return False
    return prompt_start(readers[1], folder) == start


def _definition(trained: Tokenizer) -> dict[str, Any]:
    """The tokenizer as the values of a tokenizer.json."""
    if isinstance(trained, HFTokenizer):
        backend = trained.backend
    else:
        assert isinstance(trained, SentencePieceTokenizer)
        backend = _bpe_backend(trained.model)
    definition: dict[str, Any] = json.loads(backend.to_str())
    return definition


def _template(start: dict[str, int]) -> dict[str, Any]:
    """The part of a tokenizer.json that puts the tokens `start` (name -> id) before a text, and both of a pair."""
    special = {piece: {"id": piece, "ids": [token_id], "tokens": [piece]} for piece, token_id in start.items()}

    def part(name: str, type_id: int) -> list[dict[str, Any]]:
        before = [{"SpecialToken": {"id": piece, "type_id": type_id}} for piece in start]
        return [*before, {"Sequence": {"id": name, "type_id": type_id}}]

    pair = [*part("A", 0), *part("B", 1)]
    return {"type": "TemplateProcessing", "single": part("A", 0), "pair": pair, "special_tokens": special}


def _write(definition: dict[str, Any], settings: dict[str, Any], folder: Path) -> None:
    write_text(folder / "tokenizer.json", json.dumps(definition, ensure_ascii=False))
    known = {name: value for name, value in settings.items() if value is not None}
    write_json(folder / "tokenizer_config.json", known)


def _original_settings(trained: Tokenizer) -> dict[str, Any]:
    path = Path(trained.path)
    return read_settings(path if path.is_dir() else path.parent) if path.suffix != ".gguf" else {}


def read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says; empty where there is none that can be read."""
    try:
        return dict(json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _names(trained: Tokenizer) -> tuple[str | None, str | None]:
    """BOS and EOS as text."""
    return _piece(trained, trained.bos_id), _piece(trained, trained.eos_id)


def _piece(trained: Tokenizer, token_id: int | None) -> str | None:
    if token_id is None:
        return None
    if isinstance(trained, HFTokenizer):
        piece: str | None = trained.backend.id_to_token(token_id)
    else:
        assert isinstance(trained, SentencePieceTokenizer)
        piece = trained.model.id_to_piece(token_id)
    return piece


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
