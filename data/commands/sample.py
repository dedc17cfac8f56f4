"""Writes the sample corpus, RedPajama-format shards made from the Python installation.

`fbitrain data sample --out DIR` gives

    DIR/github/github_00.jsonl.zst …   Python sources
    DIR/docs/docs_00.jsonl.zst …       documentation in prose
    DIR/heldout.jsonl.zst              documents of both kinds that are in no shard
    DIR/manifest.json                  how it was made, and the sha256 of every file

The same Python installation and seed give the same files. Run again, it checks the manifest and keeps what is valid.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import orjson
import zstandard
from tqdm import tqdm

from fbitrain.base.errors import UserError
from fbitrain.base.files import fsync_folder, fsync_tree, scratch_folder, sha256_of, write_json
from fbitrain.data.streaming.plan import shuffle_key
from fbitrain.data.tools.sample_sources import Document, code_documents, prose_documents

VERSION = 5
MIN_MEGABYTES = 0.1  # with less, a shard may have no document at all
DOCS_SHARE = 0.1  # of the text; the rest is code
SHARDS = {"github": 4, "docs": 2}
HELDOUT_BYTES = 300_000  # of text, and at most a tenth of all
HELDOUT_MAX_DOCUMENT = 8_000  # bytes; many documents say more than a few long ones
MANIFEST = "manifest.json"
HELDOUT = "heldout.jsonl.zst"


def write_sample(out: Path, megabytes: float, seed: int) -> bool:
    """Makes the sample corpus in `out`; False if a valid one was there already. Raises UserError."""
    if not MIN_MEGABYTES <= megabytes < math.inf:
        raise UserError(f"--megabytes {megabytes} must be a number, and at least {MIN_MEGABYTES}")
    out = out.resolve()  # where it is a link, the folder that it leads to is replaced
    settings = {"version": VERSION, "python": sys.version.split()[0], "megabytes": megabytes, "seed": seed}
    if is_valid(out, settings):
        return False
    try:
        if out.exists():
            _require_ours(out)
        with scratch_folder(out.with_name(f".{out.name}.tmp")) as scratch:
            (scratch / "new").mkdir()
            _write_files(scratch / "new", settings)
            fsync_tree(scratch / "new")
            if out.exists():
                _require_ours(out)  # still: the writing may have taken minutes
                out.rename(scratch / "old")
            (scratch / "new").rename(out)
            fsync_folder(out.parent)
    except OSError as error:
        raise UserError(f"the sample corpus cannot be written to {out}: {error.strerror or error}") from None
    return True


def is_valid(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` holds a complete, undamaged corpus that was made with `settings`."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"].items()
        return manifest["settings"] == settings and all(sha256_of(out / name) == file["sha256"] for name, file in files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_ours(out: Path) -> None:
    """Raises UserError unless `out` is a folder that holds nothing but what this module wrote: that may be deleted."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        ours = {MANIFEST, *manifest["files"]} if manifest.keys() == {"settings", "files"} else set()
    except (OSError, ValueError, TypeError, AttributeError):
        ours = set()
    names = (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    other = next((name for name in names if name not in ours), "")
    if other or not out.is_dir():
        what = f"holds {other}, which" if other else "exists and"
        raise UserError(f"{out} {what} is no sample corpus; give --out another folder, or remove it")


def _write_files(folder: Path, settings: dict[str, Any]) -> None:
    seed, wanted = settings["seed"], int(settings["megabytes"] * 1e6)
    seen: set[str] = set()
    docs_bytes = int(wanted * DOCS_SHARE)
    with tqdm(total=wanted, unit="B", unit_scale=True, desc="sample corpus") as bar:
        subsets = {"docs": list(_up_to(docs_bytes, _new(prose_documents(seed), seen), bar))}
        code_bytes = wanted - sum(document.n_bytes for document in subsets["docs"])
        subsets["github"] = list(_up_to(code_bytes, _new(code_documents(seed), seen), bar))
    heldout: list[Document] = []
    files: dict[str, dict[str, Any]] = {}
    for name, documents in sorted(subsets.items()):
        held = choose_heldout(documents, min(HELDOUT_BYTES, wanted // 10) * _n_bytes(documents) // wanted, seed)
        heldout += held
        held_hashes = {document.content_hash for document in held}
        training = [document for document in documents if document.content_hash not in held_hashes]
        training.sort(key=lambda document: shuffle_key(seed, "order", document.content_hash))
        for i in range(SHARDS[name]):
            path = f"{name}/{name}_{i:02d}.jsonl.zst"
            files[path] = _write_shard(folder / path, training[i :: SHARDS[name]])
    # In random order: an evaluation that reads only the beginning still sees both kinds.
    heldout.sort(key=lambda document: shuffle_key(seed, "heldout", document.content_hash))
    files[HELDOUT] = _write_shard(folder / HELDOUT, heldout)
    manifest = {"settings": settings, "files": files}
    write_json(folder / MANIFEST, manifest)


def _new(documents: Iterable[Document], seen: set[str]) -> Iterator[Document]:
    """Each content once."""
    for document in documents:
        if document.content_hash not in seen:
            seen.add(document.content_hash)
            yield document


def _up_to(n_bytes: int, documents: Iterable[Document], bar: tqdm[Any]) -> Iterator[Document]:
    """Documents until they hold `n_bytes` of text."""
    for document in documents:
        if n_bytes <= 0:
            return
        n_bytes -= document.n_bytes
        bar.update(document.n_bytes)
        yield document


def choose_heldout(documents: Sequence[Document], n_bytes: int, seed: int) -> list[Document]:
    """Documents with about `n_bytes` of text in all, drawn by a seeded hash of their content."""
    candidates = sorted(
        (document for document in documents if document.n_bytes <= HELDOUT_MAX_DOCUMENT),
        key=lambda document: shuffle_key(seed, "heldout", document.content_hash),
    )
    ends = itertools.accumulate(document.n_bytes for document in candidates)
    return [document for document, end in zip(candidates, ends, strict=True) if end - document.n_bytes < n_bytes]


def _n_bytes(documents: Iterable[Document]) -> int:
    return sum(document.n_bytes for document in documents)


def _write_shard(path: Path, documents: Sequence[Document]) -> dict[str, Any]:
    lines = b"".join(orjson.dumps({"text": document.text, "meta": document.meta}) + b"\n" for document in documents)
    data = zstandard.ZstdCompressor(level=9, write_checksum=True).compress(lines)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return {
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "documents": len(documents),
        "text_bytes": _n_bytes(documents),
    }


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="fbitrain data sample", description=__doc__.splitlines()[0])
    found.add_argument(
        "--out", type=Path, required=True, help="folder to write; replaced if it holds another sample corpus"
    )
    found.add_argument("--megabytes", type=float, default=12.0, help="text to collect, before compression")
    found.add_argument("--seed", type=int, default=0, help="chooses, orders and holds out documents")
    return found


def main(options: argparse.Namespace) -> None:
    written = write_sample(options.out, options.megabytes, options.seed)
    files = json.loads((options.out / MANIFEST).read_text(encoding="utf-8"))["files"].values()
    n_documents, text_bytes = (sum(file[key] for file in files) for key in ("documents", "text_bytes"))
    what = "wrote" if written else "kept the valid sample corpus in"
    print(f"{what} {options.out}: {n_documents} documents, {text_bytes / 1e6:.1f} MB of text, {len(files)} files")
