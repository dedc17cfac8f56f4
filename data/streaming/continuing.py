"""Going on from the data states of a saved run: whether they fit, and each lane's state, on any number of ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.data.config import DataConfig
from fbitrain.data.sources.fingerprint import ShardList, require_same_shards
from fbitrain.data.sources.shards import Shard
from fbitrain.data.streaming.plan import LanePlan, record_format
from fbitrain.data.streaming.source_reader import SourceState
from fbitrain.data.streaming.steps import StepSizes
from fbitrain.data.tokenizer import Tokenizer

STATE_VERSION = 2


def identity(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What a run may not change without its positions losing their meaning."""
    return {
        "version": STATE_VERSION,
        "n_lanes": data.n_lanes,
        "seed": data.seed,
        "seq_len": data.seq_len,
        "add_bos": data.add_bos,
        "add_eos": data.add_eos,
        "shuffle_block": data.shuffle_block,
        "heldout_fraction": data.heldout_fraction,
        "tokenizer": tokenizer.fingerprint,
        "records": {source.name: [source.kind, record_format(source).key] for source in data.sources},
    }


def require_continuable(
    identity: Mapping[str, Any],
    states: Sequence[Mapping[str, Any]],
    sources: Mapping[str, Sequence[Shard]],
    saved_shards: ShardList | None,
) -> None:
    """Raises UserError naming the first thing in which `states` are not of this configuration."""
    for state in states:
        for key in identity.keys() - {"fingerprint", "records"}:
            if state.get(key) != identity[key]:
                raise UserError(
                    f"the checkpoint's data state has {key}={state.get(key)}, this run has {key}={identity[key]}; "
                    "resume with the same settings, or start a new run"
                )
        saved = state["fingerprint"]
        if saved.keys() != sources.keys():
            raise UserError(
                f"the checkpoint's sources are {', '.join(sorted(saved))}, this run's are "
                f"{', '.join(sorted(sources))}; resume with the same sources, or start a new run"
            )
        for name, shards in sources.items():
            (was, field), (now, now_field) = state["records"][name], identity["records"][name]
            if (was, field) != (now, now_field):
                raise UserError(
                    f"source {name!r} was read as {was} from field {field!r} by the checkpoint's run, and this one "
                    f"reads {now} from {now_field!r}; resume with the same settings, or start a new run"
                )
            require_same_shards(name, saved[name], shards, saved_shards[name] if saved_shards else None)


def continued(
    states: Sequence[Mapping[str, Any]], plans: Sequence[LanePlan], world_size: int, mixture: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], int]:
    """The states of the lanes of `plans` among those of all saved ranks, and the sequences drawn by all of them.

    Where the steps have other sizes than they had, as many steps are done, and phases begin as many steps from here.
    """
    before = states[0]
    every = _merge_lanes(states, before["n_lanes"])
    drawn = before["drawn"]
    was, now = (StepSizes.of(of["sequences_per_step"]) for of in (before["mixture"], mixture))
    if was.spans and now.spans and was != now:
        drawn = now.sequences_after(was.steps_within(drawn))
    lanes = {plan.lane: copy.deepcopy(every[str(plan.lane)]) for plan in plans}
    for lane, state in lanes.items():
        if before["mixture"]["phases"] != mixture["phases"]:
            for name, values in state["sources"].items():
                source = SourceState.from_list(values)
                source.phase_tokens = 0
                state["sources"][name] = source.to_list()
        if drawn != before["drawn"] or world_size != before["world_size"]:
            state["sequence"] = drawn + (lane - next_of_all(states)) % before["n_lanes"]
    return lanes, drawn


def _merge_lanes(states: Sequence[Mapping[str, Any]], n_lanes: int) -> dict[str, dict[str, Any]]:
    merged: dict[str, dict[str, Any]] = {}
    for state in states:
        merged |= state["lanes"]
    missing = [lane for lane in range(n_lanes) if str(lane) not in merged]
    if missing or len(states) != states[0]["world_size"] or sum(len(state["lanes"]) for state in states) != n_lanes:
        raise UserError(
            f"{len(states)} data states were given of a run on {states[0]['world_size']} ranks, and they miss lanes "
            f"{missing}; give the state of every rank, each once"
        )
    return merged


def next_of_all(states: Sequence[Mapping[str, Any]]) -> int:
    """The lane of the next sequence of the run; states of old name only the next lane of each rank."""
    world_size = states[0]["world_size"]
    of_rank_0 = next((state["next_lane"] for state in states if state["next_lane"] % world_size == 0), 0)
    return int(states[0].get("next_of_all", of_rank_0))


def next_of_rank(states: Sequence[Mapping[str, Any]], rank: int, world_size: int) -> int:
    """Where this rank left off, if the run goes on with as many ranks; else the lane of the run's next sequence."""
    if states[0]["world_size"] == world_size:
        for state in states:
            if state["next_lane"] % world_size == rank:
                return int(state["next_lane"])
    return next_of_all(states)


def in_turn(plans: Sequence[LanePlan], first: int) -> list[LanePlan]:
    """The lanes in the order of drawing: from lane `first` on, then around."""
    return sorted(plans, key=lambda plan: (plan.lane < first, plan.lane))
