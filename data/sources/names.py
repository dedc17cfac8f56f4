"""Names of shards: unique within a source, unchanged when the corpus moves, and safe as paths."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from fbitrain.data.sources.patterns import file_part, is_url
from fbitrain.data.sources.transport import protocol_of

LOCAL = "local"
NOT_IN_NAMES = (".", "..")  # tokenized shards are written under these names, below one folder


def name_shards(paths: Iterable[str], problems: list[str]) -> dict[str, str]:
    """name -> path, sorted by name, for absolute paths and URLs. What cannot be named is added to `problems`.

    A name is what is left of a path without the folder that all have in common. Where shards lie in several places
    (this machine, hosts, buckets) that is the common folder of their place, and the place comes first in the name:
    the host or bucket, or `local`. A name is relative and has neither empty parts nor `.` nor `..`; no two are equal.
    """
    places: dict[tuple[str, str], dict[str, list[str]]] = {}
    for path in paths:
        place, parts = _split(path)
        places.setdefault(place, {})[path] = parts
    named: dict[str, str] = {}
    for (protocol, host), split in places.items():
        n_common = _n_common([parts[:-1] for parts in split.values()])
        front = [host or protocol] if len(places) > 1 else []
        for path, parts in split.items():
            name_parts = front + parts[n_common:]
            name = "/".join(name_parts)
            if wrong := [part for part in name_parts if part in NOT_IN_NAMES or "\0" in part]:
                problems.append(f"{path!r} cannot be named after its address because of {wrong[0]!r}, write it without")
            elif name in named:
                problems.append(f"{named[name]} and {path} have the same name {name!r}, make them two sources")
            else:
                named[name] = path
    return dict(sorted(named.items()))


def _split(path: str) -> tuple[tuple[str, str], list[str]]:
    """The place, as (protocol, host), and the folders and the file below it."""
    host, below = "", path
    if is_url(path):
        host, _, below = file_part(path).partition("://")[2].partition("/")
    protocol = protocol_of(path) if is_url(path) else LOCAL
    # Before the @ there may be a password, which is no part of a name.
    return (protocol, host.rpartition("@")[2]), [part for part in below.split("/") if part]


def _n_common(folders: Sequence[list[str]]) -> int:
    """How many parts all of them begin with."""
    # What the first and the last in order have in common, all have.
    ends = zip(min(folders), max(folders), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], ends))
