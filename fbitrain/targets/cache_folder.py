"""A folder of a teacher's targets for pretokenized shards, written once and read by every student.

For a shard NAME of a source, as in a folder of pretokenized shards:

    settings.json           what all shards share: whose targets, of which tokenizer's tokens, drawn how
    SOURCE/NAME.frames      frames (fbitrain.targets.frames), document after document
    SOURCE/NAME.places      one PLACE per frame, in the order of lines and of tokens
    SOURCE/NAME.json        a CachedShard, written last: without it the shard is not covered

Of a document whose tokens, BOS and EOS among them, are t₀ … tₙ, there is a target for each of t₁ … tₙ.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from fbitrain.base.errors import UserError
from fbitrain.data.pretokenized.token_shards import FileReport, source_folder, with_ending

VERSION = 2  # of the settings and of frames
SETTINGS = "settings.json"
FRAMES, PLACES, REPORT = ".frames", ".places", ".json"
KINDS = ("sampled", "top")
PLACE = np.dtype(
    [
        ("line", "<i8"),  # of the document in its shard
        ("first", "<i8"),  # the document's token that the first target is of
        ("offset", "<i8"),  # of the frame in .frames
        ("size", "<i4"),  # its bytes
        ("n_tokens", "<i4"),
    ]
)
MAKE = "write it with `fbitrain cache-teacher`"


@dataclass(frozen=True)
class CacheSettings:
    """What decides what a target is. Two caches with equal settings may be continued by one another."""

    kind: str  # sampled: draws from the teacher's softmax; top: its likeliest words and their probabilities
    n: int  # draws, or words, per token
    systematic: bool  # draws at even distances from one random start, instead of independent ones
    temperature: float  # of the distribution that is drawn from; other than 1, weights are importance weights
    seed: int
    context: int  # tokens that the teacher sees at a time
    overlap: int  # of them, those that it has seen already, in documents longer than that
    precision: str  # what the teacher computed in
    vocab_size: int
    add_bos: bool
    add_eos: bool
    teacher: str
    teacher_fingerprint: str
    tokenizer: str
    tokenizer_fingerprint: str
    version: int = VERSION

    @property
    def weight_dtype(self) -> np.dtype[np.generic]:
        """Of a word's weight in a frame: a count of draws, or where draws differ in weight a number."""
        return np.dtype("u1") if self.kind == "sampled" and self.temperature == 1 else np.dtype("<f2")

    def describe(self) -> str:
        """In a few words, for a log and a message."""
        if self.kind == "top":
            return f"the {self.n} likeliest words of {self.teacher}"
        how = "systematic" if self.systematic else "independent"
        tempered = "" if self.temperature == 1 else f" at temperature {self.temperature}"
        return f"{self.n} {how} draws{tempered} from {self.teacher}"


@dataclass(frozen=True)
class CachedShard:
    """What was written for one shard."""

    tokens_sha256: str  # of the pretokenized shard's .tokens
    n_tokens: int  # targets
    n_words: int
    frames: FileReport
    places: FileReport

    def to_json(self) -> bytes:
        return orjson.dumps(asdict(self))


def read_settings(folder: Path) -> CacheSettings:
    """Raises UserError where `folder` is no cache, or one of another version."""
    path = folder / SETTINGS
    try:
        values = orjson.loads(path.read_bytes())
        if values["version"] != VERSION:
            raise UserError(f"{path} is of version {values['version']}, not {VERSION}; write the cache anew")
        return CacheSettings(**values)
    except FileNotFoundError:
        raise UserError(f"{folder} is no cache of a teacher's targets (no {SETTINGS}); {MAKE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}); write the cache anew") from None


def read_cached(shard: Path) -> CachedShard | None:
    """The report of the shard whose files begin with `shard`; None where there is none that can be believed."""
    try:
        values = orjson.loads(with_ending(shard, REPORT).read_bytes())
        return CachedShard(
            **{**values, "frames": FileReport(**values["frames"]), "places": FileReport(**values["places"])}
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def shard_path(folder: Path, source: str, name: str) -> Path:
    """The beginning of the names of the files of shard `name`."""
    return source_folder(folder, source) / name


def map_places(path: Path) -> npt.NDArray[np.void]:
    """All PLACEs of a shard, read whole: 32 bytes per document."""
    return np.fromfile(path, PLACE)
