"""The fingerprint of a source: names and sizes of its shards, which must not change while a run lasts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.data.sources.shards import Shard

ShardList = dict[str, dict[str, int]]  # source -> shard name -> bytes (-1: a remote shard whose size nobody has asked)


def fingerprint(shards: Sequence[Shard]) -> dict[str, Any]:
    """What a checkpoint's data state remembers of a source: the number of its shards, and a hash of names and sizes."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name}\0{shard.size}\n".encode())
    return {"shards": len(shards), "sha256": digest.hexdigest()}


def shard_list(sources: Mapping[str, Sequence[Shard]]) -> ShardList:
    """What a checkpoint keeps beside the data states, to name the shard that changed."""
    return {name: {shard.name: shard.size for shard in shards} for name, shards in sources.items()}


def require_same_shards(
    source: str, saved: Mapping[str, Any], now: Sequence[Shard], saved_list: Mapping[str, int] | None
) -> None:
    """Raises UserError, naming the first shard that differs if the checkpoint's list is there to tell."""
    if saved == fingerprint(now):
        return
    what = f"there were {saved['shards']} of them and there are {len(now)}, or their sizes differ"
    if saved_list is not None:
        what = _first_difference(saved_list, {shard.name: shard.size for shard in now})
    raise UserError(
        f"the shards of source {source!r} are not those of the checkpoint: {what}; restore them, or start a new run"
    )


def _first_difference(saved: Mapping[str, int], now: Mapping[str, int]) -> str:
    vanished = sorted(saved.keys() - now.keys())
    appeared = sorted(now.keys() - saved.keys())
    changed = sorted(name for name in saved.keys() & now.keys() if saved[name] != now[name])
    if vanished:
        what = f"{vanished[0]} has vanished"
    elif appeared:
        what = f"{appeared[0]} has appeared"
    elif changed and -1 in (saved[changed[0]], now[changed[0]]):
        # Who reads which shard was planned by the sizes that were known, so another plan would repeat documents.
        known = "not known then and is now" if saved[changed[0]] == -1 else "known then and is not now"
        return f"the size of {changed[0]} was {known}, as they are read from another kind of place"
    elif changed:
        what = f"{changed[0]} had {saved[changed[0]]} bytes and has {now[changed[0]]}"
    else:
        return "they are in another order"
    others = len(vanished) + len(appeared) + len(changed) - 1
    return what + (f" (and {others} more differ)" if others else "")
