"""DeepSpeed, and only here: one place derives its config from ours and knows how ZeRO lays parameters out.

Everything above this file sees an `Engine`: forward, backward, step, and its `shards`, this rank's flat slices of the
fp32 weights and of the optimizer's state.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fbitrain.base.errors import UserError
from fbitrain.collectives import COLLECTIVES, Waiting, timed_collective
from fbitrain.config import COMMUNICATION_BUCKET, Config
from fbitrain.hangs import record_collectives
from fbitrain.optim.muon import MatrixForm
from fbitrain.optim.optimizer import MuonAdamW, build_optimizer, matrix_forms, set_rates
from fbitrain.parameters import parameter_kinds, whole_shape
from fbitrain.process import device, keep_freed_memory, on_gpu, resolve_precision, set_threads, set_timeouts
from fbitrain.ranks import on_all_ranks
from fbitrain.shards import PREFIX, Shards
from fbitrain.slurm import adopt_ranks
from fbitrain.student import Student

if "DS_ACCELERATOR" not in os.environ and not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # else DeepSpeed probes for one and warns in every process
import deepspeed


def init_distributed(config: Config) -> tuple[int, int]:
    """Joins the process group; returns (rank, world_size). Without a launcher or srun it is a world of one."""
    adopt_ranks()
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
        record_collectives(config.run_dir)
    deepspeed.init_distributed(verbose=False, timeout=timeout)
    set_threads(config)
    if not on_gpu():
        keep_freed_memory()
    return dist.get_rank(), dist.get_world_size()


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


def compile_blocks(model: Any) -> None:
    """torch.compile for each decoder block of a transformers model, so that blocks of one kind are compiled once."""
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):  # what transformers makes decoder blocks of
            block.compile()


class Engine:
    """A DeepSpeed engine around a Student: train.py drives it, checkpoint.py saves, resume.py restores its shards."""

    def __init__(self, config: Config, student: Student) -> None:
        self.config = config
        self.world_size = dist.get_world_size()
        if config.train.activation_checkpointing:
            _checkpoint_activations(student.lm)
        if config.train.compile:
            compile_blocks(student.lm)
        self.device = device()
        self._kinds = parameter_kinds(student)
        forms = matrix_forms(config, student) if config.optim.optimizer == "muon" else {}
        optimizer = build_optimizer(config, student, resolve_precision(config.engine.precision), self.device)
        # As they came: DeepSpeed rounds the module's own, in bf16. Rank 0 saves them.
        fixed = {n.removeprefix(PREFIX): p for n, p in student.named_parameters() if not p.requires_grad}
        self._frozen = {n: p.detach().to("cpu", copy=True) for n, p in fixed.items() if dist.get_rank() == 0}
        self._deepspeed, *_ = deepspeed.initialize(
            model=student, optimizer=optimizer, config=deepspeed_config(config, self.world_size)
        )
        self.student = student
        self._optimizer: torch.optim.Optimizer = getattr(
            self._deepspeed.optimizer, "optimizer", self._deepspeed.optimizer
        )
        self.shards = Shards(student, self._kinds, self._deepspeed.optimizer, self._optimizer, config.engine.zero_stage)
        self._place_matrices(forms)
        self._grad_norm: Tensor | float | None = None
        self._fault: str | None = None  # of the step that is going on; None until it is judged
        self._fault_of_gradient: Callable[[float], str] = lambda norm: ""
        self._guard_updates()
        for _, buffer in self._buffers():  # DeepSpeed gives all ranks the parameters of rank 0, but not its buffers
            dist.broadcast(buffer, 0)
        set_timeouts(config.engine.comm_timeout_s)

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

    def end_micro_batch(self) -> None:
        """Ends a micro-batch that is not its step's last."""
        self._deepspeed.step()

    def end_step(self, step: int, fault: str, fault_of_gradient: Callable[[float], str]) -> str:
        """Ends the last micro-batch of 1-based `step`: clips the gradient and updates, unless there is a fault.

        fault_of_gradient: of the norm of the whole gradient before clipping. Returns the fault; with one, weights and
        moments are as before the step, and only Adam's count goes on.
        """
        set_rates(self._optimizer.param_groups, self.config, step)
        if self.config.engine.zero_stage == 0:  # DeepSpeed reports no norm here
            self._grad_norm = nn.utils.get_total_norm([p.grad for p in self.student.parameters() if p.grad is not None])
        self._fault, self._fault_of_gradient = fault or None, fault_of_gradient
        if fault:
            self.shards.count_steps(step - 1)  # DeepSpeed looks for a state that the first update would make
        self._deepspeed.step()
        if self._fault is None:  # DeepSpeed found a number that is not finite, and updated nothing
            self._fault = fault_of_gradient(math.inf)
        if self._fault:
            self.shards.count_steps(step)
        return self._fault

    def _guard_updates(self) -> None:
        """Lets the optimizer update only where the step has no fault; DeepSpeed calls it once or for each group."""
        update = self._optimizer.step

        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._fault is None:  # first call of the step: by now the norm is known
                if self.config.engine.zero_stage > 0:
                    self._grad_norm = self._deepspeed.optimizer._global_grad_norm
                self._fault = self._fault_of_gradient(float(self.grad_norm()))
            return None if self._fault else update(*args, **kwargs)

        self._optimizer.step = guarded  # type: ignore[method-assign]

    def grad_norm(self) -> Tensor:
        """2-norm of the last step's whole gradient before clipping, over all ranks; a device scalar."""
        return torch.as_tensor(self._grad_norm, dtype=torch.float32, device=self.device)

    def time_collectives(self, waiting: Waiting) -> None:
        """Puts `waiting(name)` around each collective that DeepSpeed asks for, and around the wait for one."""
        backend = deepspeed.comm.comm.cdb
        for name in COLLECTIVES:
            setattr(backend, name, timed_collective(name, getattr(backend, name), waiting))

    def train(self, mode: bool = True) -> None:
        self._deepspeed.train(mode)

    def rates(self) -> dict[str, float]:
        """Kind -> learning rate of the last step."""
        return {group["kind"]: float(group["lr"]) for group in self._optimizer.param_groups}

    def matrix_weights(self) -> int:
        """Weights that every token is multiplied with: all matrices but the embedding tables; a tied head counts."""
        head = self.student.head.weight
        parameters = dict(self.student.named_parameters())
        matrices = {n: p for n, p in parameters.items() if self._kinds[n] == "matrices" or p is head}
        return sum(math.prod(whole_shape(p)) for p in matrices.values())

    def fixed_tensors(self) -> list[tuple[str, Tensor]]:
        """What training never changes and a checkpoint must hold: persistent buffers and frozen parameters.

        On rank 0, and empty on the others; tensors of larger numbers come first.
        """
        if dist.get_rank() != 0:
            return []
        found = [(name.removeprefix(PREFIX), buffer) for name, buffer in self._buffers()]
        return sorted([*found, *self._frozen.items()], key=lambda named: -named[1].element_size())

    def _buffers(self) -> list[tuple[str, Tensor]]:
        """The student's persistent buffers; every rank holds them whole under any stage."""
        persistent = self.student.state_dict().keys()
        return [(name, buffer) for name, buffer in self.student.named_buffers() if name in persistent]

    def _place_matrices(self, forms: Mapping[int, MatrixForm]) -> None:
        """Tells Muon which matrices lie in which buffers."""
        if isinstance(self._optimizer, MuonAdamW):
            muon = {id(flat) for group, flat in self.shards.flats() if group["muon"]}
            placed = [placement for placement in self.shards.placements() if id(placement.flat) in muon]
            if not placed:
                reason = "optim.optimizer=muon updates matrices, and this model trains none"
                raise on_all_ranks(UserError(f"{reason}; set optim.optimizer=adamw"))
            self._optimizer.place(placed, forms, self.world_size)


def _checkpoint_activations(lm: PreTrainedModel) -> None:
    if not lm.supports_gradient_checkpointing:
        kind = type(lm).__name__
        raise UserError(f"{kind} cannot recompute its activations; set train.activation_checkpointing=false")
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
