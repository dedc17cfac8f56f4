"""Documents that occur more than once: the list of those to leave out, as the stream reads it.

`fbitrain data duplicates config.yaml --out duplicates.npz` makes the list (data/commands/duplicates.py).

The file is an .npz: for each shard that has duplicates one sorted array of line numbers (counted from 0) named
`source/shard`, and `fingerprint`, the bytes of a JSON object that says for which shards the list was made.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fbitrain.base.errors import UserError
from fbitrain.base.files import replacing, sha256_of
from fbitrain.data.sources.fingerprint import ShardList, shard_list
from fbitrain.data.sources.shards import Shard

FINGERPRINT = "fingerprint"
VERSION = 1


class DuplicateList:
    """The lines that training leaves out. A shard's lines are read from the file when they are asked for.

    Raises UserError for a file that is missing, damaged or no such list. May be pickled: the copy opens the file anew.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._file = zipfile.ZipFile(path)
            self._entries = frozenset(self._file.namelist())
            stored = json.loads(self._array(f"{FINGERPRINT}.npy").tobytes())
            self._version, self.fingerprint = stored["version"], stored["sources"]
        except FileNotFoundError:
            raise UserError(f"data.duplicates={path} does not exist; make it with fbitrain data duplicates") from None
        except (OSError, zipfile.BadZipFile, zlib.error, ValueError, KeyError, TypeError) as error:
            raise self._damaged(error) from None
        if self._version != VERSION:
            raise UserError(
                f"data.duplicates={path} has version {self._version}, and version {VERSION} can be read; make it again "
                "with fbitrain data duplicates"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of the file: which documents a run leaves out."""
        return sha256_of(Path(self.path))

    def lines(self, source: str, shard_name: str) -> frozenset[int]:
        """The lines (counted from 0) of a shard whose text occurs before them in the corpus."""
        name = _entry(source, shard_name)
        if name not in self._entries:
            return frozenset()
        try:
            return frozenset(self._array(name).tolist())
        except (OSError, zipfile.BadZipFile, zlib.error, ValueError) as error:
            raise self._damaged(error) from None

    def require_shards(self, sources: Mapping[str, Sequence[Shard]]) -> None:
        """Raises UserError naming the first shard of `sources` that is not as it was when the list was made.

        A size that either side does not know (-1) is not compared.
        """
        now = shard_list(sources)
        if difference := _first_difference(self.fingerprint, now):
            raise UserError(
                f"data.duplicates={self.path} was made for other shards: {difference}; make it again with "
                "fbitrain data duplicates"
            )

    def close(self) -> None:
        self._file.close()

    def __reduce__(self) -> tuple[type[DuplicateList], tuple[str]]:
        return DuplicateList, (self.path,)

    def _array(self, name: str) -> npt.NDArray[Any]:
        with self._file.open(name) as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return array

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            f"data.duplicates={self.path} is damaged or no list of duplicates ({error}); make it again with "
            "fbitrain data duplicates"
        )


def _first_difference(then: ShardList, now: ShardList) -> str:
    """In words, or nothing."""
    if then.keys() != now.keys():
        return f"its sources were {', '.join(then)}, they are now {', '.join(now)}"
    for source, shards in now.items():
        before = then[source]
        for name in sorted(before.keys() | shards.keys()):
            if name not in shards:
                return f"{name} of source {source!r} has vanished"
            if name not in before:
                return f"{name} of source {source!r} has appeared"
            if before[name] != shards[name] and -1 not in (before[name], shards[name]):
                return f"{name} of source {source!r} had {before[name]} bytes and has {shards[name]}"
    return ""


def write_duplicates(
    path: Path, sources: Mapping[str, Sequence[Shard]], lines: Iterable[tuple[str, str, npt.NDArray[Any]]]
) -> None:
    """Writes a list made for the shards of `sources`, at once or not at all; `lines` are (source, shard name, lines).

    The same list gives the same bytes. Raises OSError, and UserError for two shards that cannot be told apart.
    """
    names = Counter(_entry(source, shard.name) for source, shards in sources.items() for shard in shards)
    if twice := [name for name, n in names.items() if n > 1]:
        raise UserError(f"two shards are called {twice[0]}; give one of the two sources another name")
    fingerprint = json.dumps({"version": VERSION, "sources": shard_list(sources)}).encode()
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write_array(archive, f"{FINGERPRINT}.npy", np.frombuffer(fingerprint, np.uint8))
        for source, shard_name, of_shard in lines:
            small = of_shard.astype(np.uint32 if of_shard[-1] < 1 << 32 else np.uint64)
            _write_array(archive, _entry(source, shard_name), small)


def _entry(source: str, shard_name: str) -> str:
    return f"{source}/{shard_name}.npy"


def _write_array(archive: zipfile.ZipFile, name: str, array: npt.NDArray[Any]) -> None:
    # A ZipInfo made by hand has a fixed date.
    with archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as file:
        np.lib.format.write_array(file, array, allow_pickle=False)
