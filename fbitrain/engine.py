"""DeepSpeed, and only here: one place derives its config from ours and knows how ZeRO lays parameters out.

Everything above this file sees an `Engine`: forward, backward, step, and this rank's flat slices of the fp32 weights.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fbitrain.base.errors import UserError
from fbitrain.config import Config
from fbitrain.optim.muon import MatrixForm
from fbitrain.optim.optimizer import (
    ADAM_STATE,
    MUON_STATE,
    MuonAdamW,
    build_optimizer,
    ensure_state,
    matrix_forms,
    set_rates,
    update_squares,
)
from fbitrain.optim.partition import Placement, placements
from fbitrain.parameters import parameter_kinds, whole_shape
from fbitrain.ranks import on_all_ranks
from fbitrain.student import Student

if "DS_ACCELERATOR" not in os.environ and not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed probes for one and warns in every process
import deepspeed
from deepspeed.accelerator import get_accelerator

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from glibc's malloc.h
COMMUNICATION_BUCKET = 2**24  # elements exchanged at a time: 32 MiB in bf16, enough to fill a network
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


def init_distributed(config: Config) -> tuple[int, int]:
    """Joins the process group; returns (rank, world_size). Without a launcher it is a world of one."""
    for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")
    # DeepSpeed would compile an operator here that only inference uses; without it no compiler is needed to train.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # MuonAdamW is not on DeepSpeed's list of optimizers; tests/launch/test_muon.py runs it under every stage.
    deepspeed.utils.logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    timeout = timedelta(seconds=config.engine.comm_timeout_s)
    if on_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(verbose=False, timeout=timeout)
    _set_threads(config)
    if not on_gpu():
        _keep_freed_memory()
    return dist.get_rank(), dist.get_world_size()


def on_gpu() -> bool:
    """Whether ranks compute on GPUs; DS_ACCELERATOR=cpu says no on a machine that has some."""
    return bool(get_accelerator().device_name() == "cuda")


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device(get_accelerator().current_device_name())


def resolve_precision(precision: str) -> torch.dtype:
    """The compute dtype: `auto` is bf16 where the device multiplies it natively, else fp32."""
    if precision == "auto":
        precision = "bf16" if native_bf16() else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def native_bf16() -> bool:
    """Whether bf16 matrix products run in hardware; emulated, they are some 60 times slower than fp32 (docs/log.md)."""
    if on_gpu():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON, derived from ours; nobody writes it by hand."""
    engine, train = config.engine, config.train
    zero: dict[str, Any] = {
        "stage": engine.zero_stage,
        # DeepSpeed's default of 5e8 elements allocates and touches gigabytes in every step, whatever the model's size.
        "reduce_bucket_size": COMMUNICATION_BUCKET,
        "allgather_bucket_size": COMMUNICATION_BUCKET,
    }
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu()}
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": config.grad_accum_steps(world_size),
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW also serves offloaded state; DeepSpeed's own is as fast, but compiled at start-up.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": resolve_precision(engine.precision) is torch.bfloat16},
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
    }


def shard_teacher(config: Config) -> Callable[[nn.Module], Callable[..., Any]]:
    """distill.host=zero3: what cuts a frozen module over all ranks and returns what is called instead of it."""

    def shard(module: nn.Module) -> Callable[..., Any]:
        settings = {
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": resolve_precision(config.engine.precision) is torch.bfloat16},
        }
        engine, *_ = deepspeed.initialize(model=module, config=settings)
        return cast(Callable[..., Any], engine)

    return shard


class Engine:
    """A DeepSpeed engine around a Student: train.py drives it, checkpoint.py reads and fills its fragments."""

    def __init__(self, config: Config, student: Student) -> None:
        self.config = config
        self.world_size = dist.get_world_size()
        if config.train.activation_checkpointing:
            _checkpoint_activations(student.lm)
        if config.train.compile:
            for block in student.lm.modules():
                if isinstance(block, GradientCheckpointingLayer):  # what transformers makes decoder blocks of
                    block.compile()
        self.device = device()
        self._kinds = parameter_kinds(student)
        forms = matrix_forms(config, student) if config.optim.optimizer == "muon" else {}
        optimizer = build_optimizer(config, student, resolve_precision(config.engine.precision), self.device)
        self._deepspeed, *_ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=deepspeed_config(config, self.world_size)
        )
        self.student = student
        self._names = {id(p): name.removeprefix(PREFIX) for name, p in student.named_parameters()}
        self._optimizer: torch.optim.Optimizer = getattr(
            self._deepspeed.optimizer, "optimizer", self._deepspeed.optimizer
        )
        self._place_matrices(forms)
        # Kind -> step after which the optimizer's state of it began; 0 where it is not named. Checkpoints keep it.
        self.state_starts: dict[str, int] = {}
        self._grad_norm: Tensor | float | None = None
        for _, buffer in self._buffers():  # DeepSpeed gives all ranks the parameters of rank 0, but not its buffers
            dist.broadcast(buffer, 0)
        _set_timeouts(config.engine.comm_timeout_s)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Student.forward under DeepSpeed's hooks."""
        return self._deepspeed(*args, **kwargs)

    def set_grad_accum_steps(self, n: int) -> None:
        """Makes a step of `n` micro-batches; called before its first one, when the last step has ended."""
        engine = self._deepspeed
        if n == engine.gradient_accumulation_steps():
            return
        engine.set_train_batch_size(n * engine.train_micro_batch_size_per_gpu() * self.world_size)
        engine.micro_steps = 0  # a step ends where the micro-batches since the start are a multiple of n
        if hasattr(engine.optimizer, "gradient_accumulation_steps"):  # ZeRO's own copy of the number
            engine.optimizer.gradient_accumulation_steps = n

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of one micro-batch's mean loss; DeepSpeed averages over micro-batches and ranks."""
        self._deepspeed.backward(loss)

    def end_micro_batch(self, step: int) -> None:
        """Ends a micro-batch of 1-based `step`; after the step's last one this clips the gradient and updates."""
        boundary = self._deepspeed.is_gradient_accumulation_boundary()
        if boundary:
            set_rates(self._optimizer.param_groups, self.config, step)
            if self.config.engine.zero_stage == 0:  # DeepSpeed reports no norm here
                self._grad_norm = nn.utils.get_total_norm(
                    [p.grad for p in self.student.parameters() if p.grad is not None]
                )
                if not torch.isfinite(self._grad_norm):  # the other stages skip such an update by themselves
                    raise on_all_ranks(UserError("the gradient is not finite; stopped before the update"))
        self._deepspeed.step()
        if boundary and self.config.engine.zero_stage > 0:
            self._grad_norm = self._deepspeed.get_global_grad_norm()

    def grad_norm(self) -> Tensor:
        """2-norm of the last step's whole gradient before clipping, over all ranks; a device scalar."""
        return torch.as_tensor(self._grad_norm, dtype=torch.float32, device=self.device)

    def train(self, mode: bool = True) -> None:
        self._deepspeed.train(mode)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> whole shape of every parameter that is trained, as ZeRO-3 partitions hide it."""
        return {self._names[id(p)]: whole_shape(p) for p in self.student.parameters() if p.requires_grad}

    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all matrices but the embedding tables; a tied head counts."""
        head = self.student.head.weight
        parameters = dict(self.student.named_parameters())
        matrices = {n: p for n, p in parameters.items() if self._kinds[n] == "matrices" or p is head}
        return sum(math.prod(whole_shape(p)) for p in matrices.values())

    def fixed_tensors(self) -> dict[str, Tensor]:
        """What training never changes and a checkpoint must hold: persistent buffers and frozen parameters, whole.

        On rank 0; empty on the others. Collective.
        """
        frozen = [p for p in self.student.parameters() if not p.requires_grad]
        found = [(name.removeprefix(PREFIX), buffer) for name, buffer in self._buffers()]
        with deepspeed.zero.GatheredParameters(frozen, enabled=self.config.engine.zero_stage == 3):
            if dist.get_rank() != 0:
                return {}
            found += [(self._names[id(p)], p.detach()) for p in frozen]
            return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in found}

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The student's persistent buffers; every rank holds them whole under any stage."""
        persistent = self.student.state_dict().keys()
        return [(name, buffer) for name, buffer in self.student.named_buffers() if name in persistent]

    # -- this rank's slices of weights and optimizer state ------------------------------------------------------------

    def fragments(self, *, everything_local: bool = False) -> Iterator[Fragment]:
        """This rank's share of every parameter; over all ranks each element comes exactly once.

        Stage 0 keeps all on every rank: rank 0 speaks for it unless `everything_local` (to fill a checkpoint in).
        """
        states = self._states()
        rank = dist.get_rank()
        if self.config.engine.zero_stage == 0 and rank and not everything_local:
            return
        for placement in self._placements():
            if share := placement.share_of(rank):
                state = states[id(placement.flat)]
                yield Fragment(
                    self._names[id(placement.parameter)],
                    placement.shape,
                    share.start,
                    share.stop,
                    placement.view(placement.flat, share),
                    {name: placement.view(state[name], share) for name in (*ADAM_STATE, *MUON_STATE) if name in state},
                )

    def kind(self, parameter: nn.Parameter) -> str:
        """The parameter's kind, one of config_optim.KINDS."""
        return self._kinds[PREFIX + self._names[id(parameter)]]

    def begin_state_anew(self, names: Iterable[str], step: int) -> None:
        """Notes that the optimizer has no state of these parameters before `step`: whole kinds, never parts of one."""
        self.state_starts |= {self._kinds[PREFIX + name]: step for name in names}

    def state_kinds(self) -> dict[str, tuple[str, ...]]:
        """Name of every parameter that is trained -> what the optimizer keeps of it; the same on every rank."""
        muon = {id(flat) for group, flat in self._flats() if group["muon"]}
        return {
            self._names[id(placed.parameter)]: MUON_STATE if id(placed.flat) in muon else ADAM_STATE
            for placed in self._placements()
        }

    def fragments_changed(self, step: int) -> None:
        """After fragments were overwritten: refreshes the compute copies and sets Adam's step count. Collective."""
        states = self._states()
        for group, flat in self._flats():
            if "step" in states[id(flat)]:
                states[id(flat)]["step"].fill_(float(step - self.state_starts.get(group["kind"], 0)))
        zero = self._deepspeed.optimizer
        stage = self.config.engine.zero_stage
        if stage in (1, 2):
            zero.update_lp_params()
        elif stage == 3:
            for flat, low in zip(zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat, strict=True):
                low.data.copy_(flat.data)
            persistent = zero.persistent_parameters  # small parameters that stay gathered between steps
            if persistent:
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)

    def update_ratios(self) -> dict[str, float]:
        """Kind -> ‖what the last step added‖ / ‖parameters‖, weight decay left out. Collective."""
        kinds = sorted({group["kind"] for group in self._optimizer.param_groups})
        sums = torch.zeros(2, len(kinds), dtype=torch.float64, device=self.device)
        states = self._states()
        for group, flat in self._flats():
            sums[0, kinds.index(group["kind"])] += update_squares(group, states[id(flat)], flat)
        for placement in self._placements():  # not whole buffers: DeepSpeed leaves their padding uninitialised
            if share := placement.share_of(dist.get_rank()):
                kind = kinds.index(self.kind(placement.parameter))
                sums[1, kind] += placement.view(placement.flat, share).square().sum()
        if self.config.engine.zero_stage > 0:  # stage 0 has everything on every rank
            dist.all_reduce(sums)
        update, parameters = sums.sqrt().cpu()
        return dict(zip(kinds, (update / parameters.clamp_min(1e-30)).tolist(), strict=True))

    def rates(self) -> dict[str, float]:
        """Kind -> learning rate of the last step."""
        return {group["kind"]: float(group["lr"]) for group in self._optimizer.param_groups}

    def whole_weights(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 values) of the parameters `names`, one whole parameter at a time, on every rank. Collective."""
        mine: dict[str, list[Fragment]] = {name: [] for name in names}
        for fragment in self.fragments():
            if fragment.name in mine:
                mine[fragment.name].append(fragment)
        shapes = self.shapes()
        for name in names:
            whole = torch.zeros(math.prod(shapes[name]), dtype=torch.float32, device=self.device)
            for fragment in mine[name]:
                whole[fragment.start : fragment.stop] = fragment.weight
            dist.all_reduce(whole)  # every element is one rank's, and 0 on the others
            yield name, whole.view(shapes[name])

    def overwrite(self, values: Mapping[str, Tensor], step: int) -> None:
        """Puts whole tensors into the place of the parameters `values` names, after `step` steps. Collective.

        Master weights and compute copies get them; the optimizer's moments stay, and are to be zero.
        """
        if self.config.engine.zero_stage == 3:  # an evaluation may have left parameters gathered
            self._deepspeed.optimizer.parameter_offload.partition_all_parameters()
        for fragment in self.fragments(everything_local=True):
            if fragment.name in values:
                fragment.weight.copy_(values[fragment.name].flatten()[fragment.start : fragment.stop])
        self.fragments_changed(step)

    def _placements(self) -> Iterator[Placement]:
        return placements(self._deepspeed.optimizer, self.config.engine.zero_stage)

    def _place_matrices(self, forms: Mapping[int, MatrixForm]) -> None:
        """Tells Muon which matrices lie in which buffers."""
        if isinstance(self._optimizer, MuonAdamW):
            muon = {id(flat) for group, flat in self._flats() if group["muon"]}
            placed = [placement for placement in self._placements() if id(placement.flat) in muon]
            if not placed:
                reason = "optim.optimizer=muon updates matrices, and this model trains none"
                raise on_all_ranks(UserError(f"{reason}; set optim.optimizer=adamw"))
            self._optimizer.place(placed, forms, self.world_size)

    def _flats(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        """(group, tensor) of what the optimizer really updates: flat fp32 partitions, at stage 0 the parameters."""
        zero, groups = self._deepspeed.optimizer, self._optimizer.param_groups
        stage = self.config.engine.zero_stage
        if stage == 0:
            yield from ((group, p) for group in groups for p in group["params"])
        elif stage == 3:
            of_flats = (groups[zero.sub_group_to_group_id[i]] for i in range(len(zero.fp16_groups)))
            yield from zip(of_flats, zero.fp32_partitioned_groups_flat, strict=True)
        else:
            yield from zip(groups, zero.single_partition_of_fp32_groups, strict=True)

    def _states(self) -> dict[int, dict[str, Tensor]]:
        """Id of each tensor of `_flats` -> the optimizer's state of it."""
        return {id(flat): ensure_state(self._optimizer, group, flat) for group, flat in self._flats()}


def _checkpoint_activations(lm: PreTrainedModel) -> None:
    if not lm.supports_gradient_checkpointing:
        kind = type(lm).__name__
        raise UserError(f"{kind} cannot recompute its activations; set train.activation_checkpointing=false")
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _set_threads(config: Config) -> None:
    """The launcher sets no thread count, and ranks that each use every core trample on one another."""
    threads = config.engine.threads_per_rank
    if not threads:
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_SIZE", "1")))
    torch.set_num_threads(threads)


def _keep_freed_memory() -> None:
    """glibc returns large blocks at once and faults them in again for the next tensor: a tenth of a CPU step."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _set_timeouts(seconds: int) -> None:
    """DeepSpeed's cloned process groups keep a timeout of 30 minutes whatever init_distributed was told."""
    groups = dist.distributed_c10d._world.pg_map
    for group in list(groups):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
