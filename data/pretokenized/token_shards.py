"""Shards that were tokenized beforehand (`fbitrain data pretokenize`), as the same blocks that their text would give.

A folder of them holds, for a shard NAME of a source:

    index.json              all sources and shards, written last: without it the folder is not finished
    settings.json           what all shards share: version, tokenizer, dtype of the ids
    SOURCE/NAME.tokens      little-endian ids of all documents, one after another, without BOS and EOS
    SOURCE/NAME.records     one RECORD per record of the original, bad ones included, in its order
    SOURCE/NAME.json        a ShardReport, written after the other two: without it they are not believed
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import orjson

from fbitrain.base.errors import UserError
from fbitrain.data.config import SourceConfig
from fbitrain.data.reading.documents import BadRecord, Block, BlockLimits, Document, Position
from fbitrain.data.sources.shards import Shard

VERSION = 1
INDEX = "index.json"
TOKENS, RECORDS, REPORT = ".tokens", ".records", ".json"
RECORD = np.dtype(
    [
        ("line", "<i8"),  # in the original, counted from 0
        ("offset", "<i8"),  # of the line, and of the place where the next begins
        ("after_offset", "<i8"),
        ("size", "<i8"),  # bytes undecoded, which the limit of a block counts
        ("first_token", "<i8"),  # in .tokens
        ("n_tokens", "<i8"),
        ("n_bytes", "<i8"),  # of the text in UTF-8
        ("content_hash", "<u8"),
        ("n_replaced", "<u4"),
        ("flags", "<u4"),
    ]
)
BAD, BORDERED = 1, 2  # flags: the record holds no document; BOS and EOS go around it
CHUNK_RECORDS = 1 << 12  # looked through at a time; every open unit holds so many
REDO = "run `fbitrain data pretokenize` again, which makes it anew"

Records = npt.NDArray[np.void]  # of dtype RECORD
TokenIds = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class FileReport:
    """What tells a damaged file from a whole one."""

    size: int = 0  # bytes
    sha256: str = ""


@dataclass(frozen=True)
class ShardReport:
    """What was made of one shard. `name` and `size` are the original's, as data.shards lists it."""

    name: str
    size: int
    path: str  # the original's place, which messages about bad records name
    kind: str  # SourceConfig.kind
    key: str  # the field or column that was read
    dtype: str  # of the ids, in numpy's words: <u2 or <u4
    tokens: FileReport = FileReport()
    records: FileReport = FileReport()
    n_records: int = 0
    n_documents: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)  # line -> reason
    lost: tuple[int, str] | None = None  # the line from which on nothing could be read, and why

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))

    def summary(self) -> dict[str, Any]:
        """What the index keeps: all but the reasons, of which there may be many."""
        return asdict(replace(self, bad={}))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> ShardReport:
        """The inverse of `asdict` after a turn through JSON. Raises KeyError or TypeError for anything else."""
        files = {name: FileReport(**values[name]) for name in ("tokens", "records")}
        lost = values["lost"]
        return cls(**{**values, **files, "lost": tuple(lost) if lost else None})


def source_folder(folder: Path, source: str) -> Path:
    """Where the shards of `source` are: a name that may hold any character, as the name of one folder."""
    return folder / quote(source, safe=" ").replace(".", "%2E").replace("/", "%2F")


def with_ending(shard: Path, ending: str) -> Path:
    return shard.with_name(shard.name + ending)


def read_report(shard: Path) -> ShardReport | None:
    """The report of the shard whose files begin with `shard`; None where there is none that can be believed."""
    try:
        return ShardReport.from_values(orjson.loads(with_ending(shard, REPORT).read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def sizes_differ(shard: Path, report: ShardReport) -> str:
    """What is wrong with the sizes of a shard's files, or nothing."""
    for ending, file in ((TOKENS, report.tokens), (RECORDS, report.records)):
        if wrong := size_differs(with_ending(shard, ending), file):
            return wrong
    return ""


def size_differs(path: Path, file: FileReport) -> str:
    """What is wrong with the size of the file `path`, of which `file` was reported; or nothing."""
    size = path.stat().st_size if path.exists() else -1
    if size == file.size:
        return ""
    return f"{path} has {size} bytes where {file.size} were written" if size >= 0 else f"{path} is missing"


class TokenIndex:
    """A finished folder of pretokenized shards. Raises UserError where there is none."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            index = orjson.loads(path.read_bytes())
            if index["version"] != VERSION:
                raise UserError(f"{path} is of version {index['version']}, not {VERSION}; make the folder anew")
            self._fingerprint: str = index["tokenizer"]
            self.sources = {
                name: [ShardReport.from_values(values) for values in index["sources"][name]]
                for name in index["sources"]
            }
        except FileNotFoundError:
            raise UserError(
                f"{self.folder} holds no finished pretokenized shards (no {INDEX}); run "
                "`fbitrain data pretokenize`, or correct data.pretokenized"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}); {REDO}") from None

    def shards(self, source: str) -> list[Shard]:
        """The shards of `source`: name and size of the originals, path of their tokens. Looks at all files' sizes."""
        found = []
        for report in self._reports(source):
            shard = source_folder(self.folder, source) / report.name
            if wrong := sizes_differ(shard, report):
                raise UserError(f"{wrong}; {REDO}")
            found.append(Shard(str(with_ending(shard, TOKENS).absolute()), report.name, report.size))
        return found

    def originals(self, source: str) -> list[str]:
        """The paths or URLs of what the shards of `source` were made of, in the order of `shards`."""
        return [report.path for report in self._reports(source)]

    def require_source(self, source: SourceConfig, shards: Sequence[Shard] | None) -> None:
        """Raises UserError unless `source` was tokenized as the configuration has it, kind and field.

        With `shards`, what find_shards gives for it today, also unless the index holds exactly these, by name.
        """
        key = source.text_key if source.kind == "text" else source.ids_key
        reports = self._reports(source.name)
        for report in reports:
            if (report.kind, report.key) != (source.kind, key):
                raise UserError(
                    f"source {source.name!r} was tokenized in {self.folder} as {report.kind} from field "
                    f"{report.key!r}, and the configuration says {source.kind} from field {key!r}; correct the source, "
                    "or tokenize it into another folder"
                )
        if shards is None:
            return
        indexed, wanted = {report.name for report in reports}, {shard.name for shard in shards}
        for names, how in (
            (wanted - indexed, f"is not in {self.folder}; run `fbitrain data pretokenize` again, which adds it"),
            (
                indexed - wanted,
                f"was tokenized in {self.folder} and is no shard of it now; tokenize into another folder",
            ),
        ):
            if names:
                more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
                raise UserError(f"{min(names)}{more} of source {source.name!r} {how}, or correct data.sources")

    def require_tokenizer(self, fingerprint: str) -> None:
        """Raises UserError unless the tokens were made by the tokenizer with this `fingerprint`."""
        if fingerprint != self._fingerprint:
            raise UserError(
                f"{self.folder} was made with another tokenizer than the one of this configuration; give that one as "
                "data.tokenizer, or tokenize the corpus anew"
            )

    def _reports(self, source: str) -> list[ShardReport]:
        if source not in self.sources:
            raise UserError(
                f"source {source!r} is not in {self.folder}, which holds {', '.join(map(repr, self.sources))}; "
                "run `fbitrain data pretokenize` for it, or correct data.pretokenized"
            )
        return self.sources[source]


class TokenUnit:
    """Lines `part`, `part + n_parts`, … of the pretokenized shard whose .tokens file is `path`. Raises UserError."""

    def __init__(self, path: str, part: int, n_parts: int, limits: BlockLimits) -> None:
        self._part, self._n_parts, self._limits = part, n_parts, limits
        shard = Path(path.removesuffix(TOKENS))
        report = read_report(shard)
        if report is None:
            raise UserError(f"{with_ending(shard, REPORT)} is missing or damaged; {REDO}")
        if wrong := sizes_differ(shard, report):
            raise UserError(f"{wrong}; {REDO}")
        self._report = report
        self._records, self._tokens = map_shard(shard, report)

    def blocks(self, start: Position) -> Iterator[Block | BadRecord]:
        """The blocks from `start`, which is a block's border, to the end; a BadRecord where the rest was lost."""
        lines = self._records["line"]
        first = bisect.bisect_left(range(len(lines)), start.line, key=lambda i: int(lines[i]))
        behind = self._records[:0]
        for at in range(first, len(lines), CHUNK_RECORDS):
            chunk = np.array(self._records[at : at + CHUNK_RECORDS])
            own = chunk[chunk["line"] % self._n_parts == self._part]
            whole, behind = _cut(np.concatenate([behind, own]), self._limits)
            for records in whole:
                yield TokenBlock(records, self._tokens, self._report)
        if len(behind):
            yield TokenBlock(behind, self._tokens, self._report)
        lost = self._report.lost
        if lost and lost[0] % self._n_parts == self._part:
            yield BadRecord(self._report.path, *lost)


class TokenBlock:
    """Consecutive records of a unit; the tokens of a document are a slice of the mapped file."""

    def __init__(self, records: Records, tokens: TokenIds, report: ShardReport) -> None:
        self.start = Position(int(records[0]["line"]), int(records[0]["offset"]))
        self.after = Position(int(records[-1]["line"]) + 1, int(records[-1]["after_offset"]))
        self._tokens, self._report = tokens, report
        # As Python's lists, because to read one item of a numpy record takes longer than all else in __getitem__.
        self._lines: list[int] = records["line"].tolist()
        self._firsts: list[int] = records["first_token"].tolist()
        self._ends: list[int] = (records["first_token"] + records["n_tokens"]).tolist()
        self._n_bytes: list[int] = records["n_bytes"].tolist()
        self._n_replaced: list[int] = records["n_replaced"].tolist()
        self._hashes: list[int] = records["content_hash"].tolist()
        self._flags: list[int] = records["flags"].tolist()

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, i: int) -> Document | BadRecord:
        flags = self._flags[i]
        if flags & BAD:
            return BadRecord(self._report.path, self._lines[i], self._report.bad[str(self._lines[i])])
        return Document(
            "",
            self._tokens[self._firsts[i] : self._ends[i]],
            bool(flags & BORDERED),
            self._n_bytes[i],
            self._n_replaced[i],
            self._hashes[i],
        )

    def line(self, i: int) -> int:
        return self._lines[i]


def map_shard(shard: Path, report: ShardReport) -> tuple[Records, TokenIds]:
    """The two files of a shard as arrays: its records [n_records], its tokens [n_tokens]."""
    return _mapped(with_ending(shard, RECORDS), RECORD), _mapped(with_ending(shard, TOKENS), np.dtype(report.dtype))


def _mapped(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The file as an array that is read from disk where it is looked at."""
    if not path.stat().st_size:
        return np.empty(0, dtype)
    # A plain view: slices of np.memmap itself take ten times as long.
    return np.asarray(np.memmap(path, dtype, mode="r"))


def _cut(records: Records, limits: BlockLimits) -> tuple[list[Records], Records]:
    """The blocks that end within `records`, and the records behind them."""
    ends = np.cumsum(records["size"])
    whole: list[Records] = []
    first, n_bytes_before = 0, 0
    while True:
        by_bytes = int(np.searchsorted(ends, n_bytes_before + limits.max_bytes)) + 1
        end = min(first + limits.max_documents, by_bytes)
        if end > len(records):
            return whole, records[first:]
        whole.append(records[first:end])
        first, n_bytes_before = end, int(ends[end - 1])
