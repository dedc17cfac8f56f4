"""Held-out text, joined and tokenized once, and calibration text: read in the order of the files, not as a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fbitrain.base.errors import UserError
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.sources.patterns import is_url
from fbitrain.data.sources.shards import TEXT_SUFFIXES, find_files
from fbitrain.data.tokenizer import Tokenizer
from fbitrain.data.tokenizing.token_bytes import bytes_of_tokens

if TYPE_CHECKING:
    import torch  # the data room's commands must not pay for torch

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "\n\n"  # of the held-out text (the GPTQ protocol)


@dataclass(frozen=True)
class HeldoutText:
    """Text that is measured, never trained on: its documents joined by a blank line and tokenized once."""

    token_ids: torch.Tensor  # int64 [n]
    token_bytes: torch.Tensor  # int64 [n], UTF-8 bytes of the joined text that each token stands for
    n_documents: int


def load_heldout(paths: Sequence[str], tokenizer: Tokenizer, what: str = "data.heldout") -> HeldoutText:
    """Reads held-out shards, and .txt or .raw files of which each is one document, in the order of their names.

    Bad records are logged and left out. `what` the files are is said in the UserError where no document is left.
    """
    return tokenized(list(read_documents(paths, what)), tokenizer, f"{what}: {', '.join(paths)}")


def tokenized(documents: Sequence[str], tokenizer: Tokenizer, what: str) -> HeldoutText:
    """`documents` as one text. `what` they are is said in the UserError where they hold no text."""
    import torch

    text = DOCUMENT_SEPARATOR.join(documents)
    if not text.strip():
        raise UserError(f"{what} holds no text; name files that do")
    token_ids = tokenizer.encode(text)
    token_bytes = bytes_of_tokens(token_ids, len(text.encode()), tokenizer)
    return HeldoutText(torch.tensor(token_ids, dtype=torch.int64), torch.from_numpy(token_bytes), len(documents))


def read_documents(paths: Sequence[str], what: str, text_key: str = "text") -> Iterator[str]:
    """The documents of local shards, and of .txt and .raw files of which each is one, in the order of their names.

    Bad records are logged and left out. `what` the files are is said there, and in the UserError for one that is not
    here or cannot be read.
    """
    format = RecordFormat("text", text_key)
    for shard in find_files(paths, what):
        if is_url(shard.path):
            raise UserError(f"{what}: {shard.path} is not here; download it, this text is read from files")
        if shard.path.endswith(TEXT_SUFFIXES):
            yield read_text(shard.path)
            continue
        for entry in read_entries(shard.path, format):
            item = entry if isinstance(entry, BadRecord) else decode(entry, format, shard.path)
            if isinstance(item, BadRecord):
                logger.warning("%s: skipped %s", what, item)
            else:
                yield item.text


def read_text(path: str | Path) -> str:
    """A text file's content. Raises UserError for one that cannot be read as UTF-8."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # newlines stay as they are, their bytes are counted
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
