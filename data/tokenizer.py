"""Text to token ids: one small interface over tokenizer.json, SentencePiece and GGUF files.

`fbitrain data train-tokenizer --help` makes a new one.

Built on `tokenizers` and `sentencepiece` directly: a tokenizer process must start in a fraction of a second, and
transformers reads a bare SentencePiece Llama tokenizer silently wrong.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from fbitrain.base.errors import UserError
from fbitrain.data.reading.records import REPLACEMENT, SURROGATES
from fbitrain.data.tokenizing.gguf_tokenizer import build_bpe
from fbitrain.data.tokenizing.long_text import PIECE_CHARS, Seams, encode_in_pieces
from fbitrain.data.tokenizing.seams import byte_level_seams, metaspace_seams, sentencepiece_seams

logger = logging.getLogger(__name__)

# Files that say which tokens BOS and EOS are, the most trustworthy first.
SPECIALS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Tells apart tokenizers that share a vocabulary but cut text differently (runs of spaces, digits, scripts, specials).
PROBE = (
    " Hello  World\n\n\tdef f(x):\n    return x['a']    1234,5 it's \u0391\u03a9 \u6f22\u5b57 "
    "\U0001f469\u200d\U0001f52c \u00e9 e\u0301 \u0645\u0631 <s></s><|im_end|><|endoftext|>"
)

PANIC = "PanicException"  # pyo3's, whose module cannot be imported
LONG_CHARS = 2 * PIECE_CHARS  # longer texts are encoded in pieces, where the kind of tokenizer is known well enough
PROBE_PIECE_CHARS = 64


class UnencodableText(UserError):
    """The library gives up on a text, as a regular expression does that backtracks too often: it is a bad record."""


class Tokenizer(ABC):
    """Encodes documents as plain text: nothing is added, and the names of special tokens in a text stay text.

    Ids are those of the library the tokenizer is made for. Half a surrogate pair, which no such library takes, is
    encoded as U+FFFD. (A token that its maker flagged as ordinary added text, not as special, is still matched as one.)
    Raises UnencodableText for a text that the library cannot encode.

    Attributes: path; vocab_size (largest id + 1); bos_id and eos_id (None where the files name none); fingerprint (a
    hash of vocabulary, BOS, EOS and the ids of a probe text: equal for one tokenizer kept in different file formats).
    """

    path: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without BOS or EOS."""
        return [token_id for piece in self._encoded(text) for token_id in piece]

    def encode_array(self, text: str) -> npt.NDArray[np.uint32]:
        """The same ids, uint32 [n]; of a long text without ever holding them as Python numbers all at once."""
        ids = array("I")  # grows in place
        for piece in self._encoded(text):
            ids.extend(piece)
        return np.frombuffer(ids, dtype=np.uint32) if ids else np.zeros(0, dtype=np.uint32)

    @abstractmethod
    def _encode_whole(self, text: str) -> list[int]:
        """Token ids of `text`, by one call of the library."""

    @abstractmethod
    def _find_seams(self) -> Seams | None:
        """Where this tokenizer permits to cut a text."""

    def _may_be_cut(self, text: str) -> bool:
        return len(text) > LONG_CHARS and self._seams is not None

    @cached_property
    def _seams(self) -> Seams | None:
        seams = self._find_seams()
        if seams is not None:
            text = PROBE * 20 + "letters" * 40
            pieces = encode_in_pieces(text, self._encode_whole, seams, PROBE_PIECE_CHARS)
            if [token_id for piece in pieces for token_id in piece] == self._encode_whole(text):
                return seams
        logger.info("tokenizer %s encodes long texts whole, at 50 to 100 bytes of memory per byte", self.path)
        return None

    def _encoded(self, text: str) -> Iterator[list[int]]:
        if not text.isascii():
            text = SURROGATES.sub(REPLACEMENT, text)
        if self._may_be_cut(text):
            assert self._seams is not None
            return encode_in_pieces(text, self._encode_whole, self._seams)
        return iter((self._encode_whole(text),))

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; special tokens are left out."""

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return load_tokenizer, (self.path,)

    def _identify(self, pieces: dict[str, int]) -> None:
        """Sets what follows from the vocabulary; called last by the subclasses' __init__. Raises UserError if empty."""
        if not pieces:
            raise UserError(f"tokenizer {self.path} has an empty vocabulary; fetch it again")
        self.vocab_size = max(pieces.values()) + 1
        content = (sorted(pieces.items()), self.bos_id, self.eos_id, self.encode(PROBE))
        self.fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()


class HFTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, path: str, backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
        self.path, self.backend, self.bos_id, self.eos_id = path, backend, bos_id, eos_id
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|im_end|>" in a document is a document's text, not an end
        self._identify(backend.get_vocab(with_added_tokens=True))

    def encode_markup(self, text: str) -> list[int]:
        """Token ids of `text`, in which the names of special tokens are these tokens, as in what chat templates write.

        Raises UnencodableText.
        """
        return self._encode_by(self._markup_backend, SURROGATES.sub(REPLACEMENT, text))

    @cached_property
    def special_names(self) -> list[str]:
        """What the special tokens are called in a text."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    @cached_property
    def _markup_backend(self) -> tokenizers.Tokenizer:
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def _encode_whole(self, text: str) -> list[int]:
        return self._encode_by(self.backend, text)

    def _encode_by(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        # Only the batch form can leave out the character offsets, which nobody reads here.
        try:
            encoded: list[int] = backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except BaseException as error:  # a panic in Rust is no Exception
            if type(error).__name__ != PANIC:
                raise
            raise _unencodable(self.path, text, error) from None
        return encoded

    def _find_seams(self) -> Seams | None:
        definition = json.loads(self.backend.to_str())
        finders = (byte_level_seams, metaspace_seams)
        return next(filter(None, (find(definition, self._encode_whole) for find in finders)), None)

    @cached_property
    def _ordinary_added(self) -> list[tokenizers.AddedToken]:
        return [token for token in self.backend.get_added_tokens_decoder().values() if not token.special]

    def _may_be_cut(self, text: str) -> bool:
        # An added token that does not occur changes nothing; one that does may lie across any cut.
        return super()._may_be_cut(text) and not any(
            token.content in text or (token.normalized and self.backend.normalizer) for token in self._ordinary_added
        )

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=True)
        return text


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model, e.g. LLaMA-2's tokenizer.model."""

    def __init__(self, path: str, model_file: str) -> None:
        self.path = path
        self.model = sentencepiece.SentencePieceProcessor(model_file=model_file)
        self.bos_id, self.eos_id = (i if i >= 0 else None for i in (self.model.bos_id(), self.model.eos_id()))
        self._identify({self.model.id_to_piece(i): i for i in range(self.model.get_piece_size())})

    def _encode_whole(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.model.encode(text)
        except RuntimeError as error:
            raise _unencodable(self.path, text, error) from None
        return ids

    def _find_seams(self) -> Seams | None:
        return sentencepiece_seams(self.model)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.model.decode(list(ids))
        return text


def _unencodable(path: str, text: str, error: BaseException) -> UnencodableText:
    reason = " ".join(str(error).split())
    return UnencodableText(
        f"the tokenizer {path} gives up on a text of {len(text):,} characters ({reason}); leave it out"
    )


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a folder with tokenizer.json or tokenizer.model, a tokenizer.json, a SentencePiece .model, or a .gguf.

    The name of a model on the Hugging Face hub is looked up in the local cache, then on the hub. Raises UserError.
    """
    local = Path(path)
    if not local.exists():
        if not HUB_ID.fullmatch(str(path)):
            raise UserError(f"tokenizer {path} does not exist; correct data.tokenizer (or distill.teacher)")
        local = _from_hub(str(path))
    file = local
    if local.is_dir():
        named = [local / name for name in ("tokenizer.json", "tokenizer.model") if (local / name).is_file()]
        if not named:
            raise UserError(f"tokenizer folder {local} has neither tokenizer.json nor tokenizer.model")
        file = named[0]
    if file.suffix == ".gguf":
        backend, bos_id, eos_id = build_bpe(str(file))
        for kind, token_id in (("bos", bos_id), ("eos", eos_id)):
            check_special(token_id, kind, file, backend.get_vocab_size(with_added_tokens=True))
        return HFTokenizer(str(local), backend, bos_id, eos_id)
    if file.suffix == ".model":
        return _load_sentencepiece(local, file)
    if file.suffix == ".json":
        return _load_json(local, file)
    raise UserError(f"tokenizer {file} is of unknown kind; give a folder, a tokenizer.json, a .model or a .gguf")


def _load_json(local: Path, file: Path) -> HFTokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"tokenizer {file} cannot be read ({error})") from None
    except BaseException as error:
        # The library raises bare Exception, so its class tells nothing; anything that is more than that is ours.
        if type(error) is not Exception and type(error).__name__ != PANIC:
            raise
        raise UserError(f"tokenizer {file} is not a tokenizer.json ({error}); fetch it again") from None
    return HFTokenizer(str(local), backend, *_specials(file.parent, backend))


def _load_sentencepiece(local: Path, file: Path) -> SentencePieceTokenizer:
    try:
        return SentencePieceTokenizer(str(local), str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"tokenizer {file} is not a SentencePiece model ({error}); fetch it again") from None


def _specials(folder: Path, backend: tokenizers.Tokenizer) -> tuple[int | None, int | None]:
    """BOS and EOS ids as the files in `folder` name them; each may be named in another file."""
    found: dict[str, int | None] = {"bos": None, "eos": None}
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    for name in SPECIALS_FILES:
        if not (folder / name).is_file():
            continue
        try:
            values = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{folder / name} cannot be read ({error}); fetch the tokenizer again") from None
        if not isinstance(values, dict):
            raise UserError(f"{folder / name} is not a JSON object; fetch the tokenizer again")
        for kind, known in found.items():
            if known is None:
                found[kind] = _special_id(values, kind, backend)
                check_special(found[kind], kind, folder / name, vocab_size)
    return found["bos"], found["eos"]


def check_special(token_id: int | None, kind: str, file: Path, vocab_size: int) -> None:
    """Raises UserError for a `kind` ("bos", "eos") of token, named in `file`, that is outside the vocabulary."""
    if token_id is not None and not (isinstance(token_id, int) and 0 <= token_id < vocab_size):
        raise UserError(
            f"{file} names {token_id} as the {kind.upper()} token, but the vocabulary has ids 0 to {vocab_size - 1}; "
            f"correct {kind}_token_id there, or use the tokenizer that belongs to it"
        )


def _special_id(values: dict[str, Any], kind: str, backend: tokenizers.Tokenizer) -> int | None:
    token = values.get(f"{kind}_token")  # "</s>" or {"content": "</s>", …}
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str):
        token_id: int | None = backend.token_to_id(token)
        return token_id
    number = values.get(f"{kind}_token_id")  # 2 or [2, 7], the first being the end of a text
    if isinstance(number, list) and number:
        number = number[0]
    return number if isinstance(number, int) else None


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["tokenizer.json", "tokenizer.model", *SPECIALS_FILES]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"tokenizer {name} is neither a local path nor found on the hub ({reason})") from None
