"""This rank's flat slices of the fp32 weights and of the optimizer's state, however ZeRO lays parameters out.

Besides engine.py and optim/partition.py the only file that knows DeepSpeed's buffers: checkpoints, trackers and phases
see fragments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fbitrain.optim.optimizer import ADAM_STATE, MUON_STATE, ensure_state, update_squares
from fbitrain.optim.partition import Placement, placements
from fbitrain.parameters import whole_shape
from fbitrain.process import device
from fbitrain.student import Student

PREFIX = "lm."  # of parameter names inside Student; checkpoints use the language model's own names


@dataclass(frozen=True)
class Fragment:
    """Elements [start, stop) of the flattened parameter `name`, as this rank holds them: views to read or overwrite."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int
    stop: int
    weight: Tensor  # fp32 [stop-start]
    state: Mapping[str, Tensor]  # the optimizer's, fp32 [stop-start] each: AdamW's two moments, or Muon's momentum


class Shards:
    """The slices of a Student under DeepSpeed's `zero` optimizer at `stage`, which `optimizer` updates."""

    def __init__(
        self, student: Student, kinds: Mapping[str, str], zero: Any, optimizer: torch.optim.Optimizer, stage: int
    ) -> None:
        self.student, self.stage = student, stage
        self._kinds, self._zero, self._optimizer = kinds, zero, optimizer
        self._names = {id(p): name.removeprefix(PREFIX) for name, p in student.named_parameters()}
        # Kind -> step after which the optimizer's state of it began; 0 where it is not named. Checkpoints keep it.
        self.state_starts: dict[str, int] = {}

    def name(self, parameter: nn.Parameter) -> str:
        """The parameter's name in the language model."""
        return self._names[id(parameter)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of every parameter that is trained, as ZeRO-3 partitions hide it."""
        return {self.name(p): whole_shape(p) for p in self.student.parameters() if p.requires_grad}

    def fragments(self, *, everything_local: bool = False) -> Iterator[Fragment]:
        """This rank's share of every parameter; over all ranks each element comes exactly once.

        Stage 0 keeps all on every rank: rank 0 speaks for it unless `everything_local` (to restore a checkpoint).
        """
        states = self._states()
        rank = dist.get_rank()
        if self.stage == 0 and rank and not everything_local:
            return
        for placement in self.placements():
            if share := placement.share_of(rank):
                state = states[id(placement.flat)]
                yield Fragment(
                    self.name(placement.parameter),
                    placement.shape,
                    share.start,
                    share.stop,
                    placement.view(placement.flat, share),
                    {name: placement.view(state[name], share) for name in (*ADAM_STATE, *MUON_STATE) if name in state},
                )

    def kind(self, name: str) -> str:
        """The kind of the parameter `name`, one of config_optim.KINDS."""
        return self._kinds[PREFIX + name]

    def begin_state_anew(self, names: Iterable[str], step: int) -> None:
        """Notes that the optimizer has no state of these parameters before `step`: whole kinds, never parts of one."""
        self.state_starts |= {self.kind(name): step for name in names}

    def state_kinds(self) -> dict[str, tuple[str, ...]]:
        """Name of every parameter that is trained -> what the optimizer keeps of it; the same on every rank."""
        muon = {id(flat) for group, flat in self.flats() if group["muon"]}
        return {
            self.name(placed.parameter): MUON_STATE if id(placed.flat) in muon else ADAM_STATE
            for placed in self.placements()
        }

    def changed(self, step: int) -> None:
        """After fragments were overwritten: refreshes the compute copies and sets Adam's step count. Collective."""
        self.count_steps(step)
        zero, stage = self._zero, self.stage
        if stage in (1, 2):
            zero.update_lp_params()
        elif stage == 3:
            for flat, low in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
                low.data.copy_(flat.data)
            persistent = zero.persistent_parameters  # small parameters that stay gathered between steps
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def count_steps(self, step: int) -> None:
        """Sets Adam's step count to what it is after `step` steps, those that were left out among them."""
        states = self._states()
        for group, flat in self.flats():
            if "step" in states[id(flat)]:
                states[id(flat)]["step"].fill_(float(step - self.state_starts.get(group["kind"], 0)))

    def update_ratios(self) -> dict[str, float]:
        """Kind -> ‖what the last step added‖ / ‖parameters‖, weight decay left out. Collective."""
        kinds = sorted({group["kind"] for group in self._optimizer.param_groups})
        sums = torch.zeros(2, len(kinds), dtype=torch.float64, device=device())
        states = self._states()
        for group, flat in self.flats():
            sums[0, kinds.index(group["kind"])] += update_squares(group, states[id(flat)], flat)
        for placement in self.placements():  # not whole buffers: DeepSpeed leaves their padding uninitialised
            if share := placement.share_of(dist.get_rank()):
                kind = kinds.index(self.kind(self.name(placement.parameter)))
                sums[1, kind] += placement.view(placement.flat, share).square().sum()
        if self.stage > 0:  # stage 0 has everything on every rank
            dist.all_reduce(sums)
        update, parameters = sums.sqrt().cpu()
        return dict(zip(kinds, (update / parameters.clamp_min(1e-30)).tolist(), strict=True))

    def whole_weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 values) of the parameters `names`, one whole parameter at a time, on every rank. Collective."""
        mine: dict[str, list[Fragment]] = {name: [] for name in names}
        for fragment in self.fragments():
            if fragment.name in mine:
                mine[fragment.name].append(fragment)
        shapes = self.shapes()
        for name in names:
            whole = torch.zeros(math.prod(shapes[name]), dtype=torch.float32, device=device())
            for fragment in mine[name]:
                whole[fragment.start : fragment.stop] = fragment.weight
            dist.all_reduce(whole)  # every element is one rank's, and 0 on the others
            yield name, whole.view(shapes[name])

    def overwrite(self, values: Mapping[str, Tensor], step: int) -> None:
        """Puts whole tensors into the place of the parameters `values` names, after `step` steps. Collective.

        Master weights and compute copies get them; the optimizer's moments stay, and are to be zero.
        """
        if self.stage == 3:  # an evaluation may have left parameters gathered
            self._zero.parameter_offload.partition_all_parameters()
        for fragment in self.fragments(everything_local=True):
            if fragment.name in values:
                fragment.weight.copy_(values[fragment.name].flatten()[fragment.start : fragment.stop])
        self.changed(step)

    def placements(self) -> Iterator[Placement]:
        return placements(self._zero, self.stage)

    def flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """(group, tensor) of what the optimizer really updates: flat fp32 partitions, at stage 0 the parameters."""
        zero, groups, stage = self._zero, self._optimizer.param_groups, self.stage
        if stage == 0:
            yield from ((group, p) for group in groups for p in group["params"])
        elif stage == 3:
            of_flats = (groups[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups)))
            yield from zip(of_flats, zero.fp32_partitioned_groups_flat, strict=True)
        else:
            yield from zip(groups, zero.single_partition_of_fp32_groups, strict=True)

    def _states(self) -> dict[int, dict[str, Tensor]]:
        """Id of each tensor of `_flats` -> the optimizer's state of it."""
        return {id(flat): ensure_state(self._optimizer, group, flat) for group, flat in self.flats()}
