"""Held-out text, joined and tokenized once, and calibration text: read in the order of the files, not as a stream."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fbitrain.base.errors import UserError
from fbitrain.data.reading.documents import BadRecord
from fbitrain.data.reading.records import RecordFormat, decode, read_entries
from fbitrain.data.sources.patterns import is_url
from fbitrain.data.sources.shards import TEXT_SUFFIXES, find_files
from fbitrain.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch  # the data room's commands must not pay for torch

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "\n\n"  # of the held-out text (the GPTQ protocol)


@dataclass(frozen=True)
class HeldoutText:
    """Text that is measured, never trained on: its documents joined by a blank line and tokenized once."""

    token_ids: torch.Tensor  # int64 [n]
    n_bytes: int  # UTF-8 bytes of the joined text
    n_documents: int


def load_heldout(paths: Sequence[str], tokenizer: Tokenizer, text_key: str = "text") -> HeldoutText:
    """Reads held-out shards, and .txt or .raw files of which each is one document, in the order of their names.

    Bad records are logged and left out. Raises UserError where no document is left.
    """
    import torch

    documents = list(read_documents(paths, "heldout", text_key))
    text = DOCUMENT_SEPARATOR.join(documents)
    if not text:
        raise UserError(f"the held-out shards {', '.join(paths)} hold no text; correct data.heldout")
    token_ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    return HeldoutText(token_ids, n_bytes=len(text.encode()), n_documents=len(documents))


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
            yield _read_text(shard.path)
            continue
        for entry in read_entries(shard.path, format):
            item = entry if isinstance(entry, BadRecord) else decode(entry, format, shard.path)
            if isinstance(item, BadRecord):
                logger.warning("%s: skipped %s", what, item)
            else:
                yield item.text


def _read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:  # newlines stay as they are, their bytes are counted
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None
