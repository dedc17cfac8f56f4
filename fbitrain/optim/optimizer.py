"""The optimizer that DeepSpeed is given: AdamW for all kinds of parameters, or Muon for the matrices and AdamW for the
rest. A parameter group is a kind of parameter, with its own learning rate and weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fbitrain.base.errors import UserError
from fbitrain.config import Config
from fbitrain.optim.muon import MatrixForm, MuonSettings, Plan, muon_step, plan_updates
from fbitrain.optim.partition import Placement
from fbitrain.optim.schedules import decay_shape, lr_at, lr_shape
from fbitrain.parameters import is_transposed, parameter_kinds, whole_shape
from fbitrain.ranks import on_all_ranks

ADAM_STATE = ("exp_avg", "exp_avg_sq")
MUON_STATE = ("momentum",)
CHUNK_ELEMENTS = 2**24  # of a buffer that is looked at piece by piece


class MuonAdamW(torch.optim.AdamW):
    """AdamW whose groups with `muon` set are updated by Muon instead.

    DeepSpeed hands the groups flat partitions; `place` says which matrices lie in them, and comes before any step.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: MuonSettings, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._settings = settings
        self._plans: dict[int, Plan] = {}  # by the id of the flat tensor, which the plan keeps alive

    def place(self, placed: Iterable[Placement], forms: Mapping[int, MatrixForm], world_size: int) -> None:
        """`placed`: all matrices of the Muon groups; forms: of each parameter, by its id."""
        by_flat: dict[int, list[Placement]] = {}
        for placement in placed:
            by_flat.setdefault(id(placement.flat), []).append(placement)
        for flat, some in by_flat.items():
            self._plans[flat] = plan_updates(some, [forms[id(placement.parameter)] for placement in some], world_size)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Updates every group; DeepSpeed calls it once for each, with the others taken out."""
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    plan, state = self._plans[id(flat)], ensure_state(self, group, flat)
                    muon_step(flat, state, plan, group["lr"], group["weight_decay"], self._settings)


def build_optimizer(config: Config, student: nn.Module, dtype: torch.dtype, device: torch.device) -> torch.optim.AdamW:
    """The optimizer of all parameters that are trained; dtype and device are of Muon's iteration."""
    optim = config.optim
    adamw: dict[str, Any] = {"betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps, "fused": True}
    # Nothing moves before `set_rates`: torch's defaults are a rate and a decay of its own.
    groups = [{**group, "lr": 0.0, "weight_decay": 0.0} for group in param_groups(config, student)]
    if optim.optimizer == "adamw":
        return torch.optim.AdamW(groups, **adamw)
    muon = optim.muon
    settings = MuonSettings(muon.momentum, muon.ns_steps, muon.update_size, dtype, device)
    return MuonAdamW(groups, settings, **adamw)


def param_groups(config: Config, student: nn.Module) -> list[dict[str, Any]]:
    """A group for each kind of parameter that is trained: `kind`, `params`, and whether it is Muon's."""
    kinds = parameter_kinds(student)
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(kinds[name], []).append(parameter)
    muon = {"matrices"} if config.optim.optimizer == "muon" else set()
    return [{"kind": kind, "muon": kind in muon, "params": parameters} for kind, parameters in groups.items()]


def set_rates(groups: Sequence[dict[str, Any]], config: Config, step: int) -> None:
    """Gives each group the learning rate and weight decay of 1-based `step`."""
    decay = decay_shape(config.optim, config.train.total_steps, step)
    for group in groups:
        group["lr"] = rate_at(config, group["kind"], group["muon"], step)
        group["weight_decay"] = decay * _weight_decay(config, group["kind"], group["muon"])


def rate_at(config: Config, kind: str, muon: bool, step: int) -> float:
    """Learning rate of a kind of parameter in 1-based `step`."""
    optim = config.optim
    if muon:
        return optim.muon.lr * lr_shape(optim, config.train.total_steps, step)
    return lr_at(config, step) * float(getattr(optim.lr_factor, kind))


def _weight_decay(config: Config, kind: str, muon: bool) -> float:
    optim = config.optim
    return optim.muon.weight_decay if muon else optim.weight_decay * float(getattr(optim.decay_factor, kind))


def matrix_forms(config: Config, student: nn.Module) -> dict[int, MatrixForm]:
    """Parameter's id -> how it holds its matrices (optim.muon.fused), for every parameter of the kind `matrices`.

    Raises UserError for a name that is no Linear's, and for rows whose sum is not the Linear's.
    """
    parameters = dict(student.named_parameters())
    names = [name for name, kind in parameter_kinds(student).items() if kind == "matrices"]
    forms = {name: MatrixForm(transposed=is_transposed(student, name)) for name in names}
    problems = []
    for fused in config.optim.muon.fused:
        found = [name for name in names if _is_called(name.removesuffix(".weight"), fused.name)]
        if not found:
            problems.append(f"optim.muon.fused names {fused.name!r}, and no Linear is called so")
        for name in found:
            n_rows = whole_shape(parameters[name])[1 if forms[name].transposed else 0]
            if sum(fused.rows) != n_rows:
                problems.append(
                    f"optim.muon.fused gives {fused.name} rows of {sum(fused.rows)} in all, and {name} has {n_rows}"
                )
            forms[name] = replace(forms[name], rows=tuple(fused.rows))
    if problems:
        raise on_all_ranks(UserError("config error: " + "; ".join(problems)))
    return {id(parameters[name]): form for name, form in forms.items()}


def _is_called(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def ensure_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], flat: Tensor) -> dict[str, Tensor]:
    """The optimizer's state of `flat`, made if there is none: a first step would, and a checkpoint may come before."""
    state: dict[str, Tensor] = optimizer.state[flat]
    for name in MUON_STATE if group["muon"] else ADAM_STATE:
        if name not in state:
            state[name] = torch.zeros_like(flat, requires_grad=False)
    if not group["muon"] and "step" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
    return state


@torch.no_grad()
def update_squares(group: Mapping[str, Any], state: Mapping[str, Any], flat: Tensor) -> Tensor:
    """Sum of squares of what the last step added to `flat`, weight decay left out; fp32 scalar."""
    squares = flat.new_zeros(())
    if group["muon"]:
        known: Tensor = state.get("update_squares", squares)
        return known
    step, (first, second) = state["step"].item(), group["betas"]
    if not step:
        return squares
    # In pieces, so that no second copy of the optimizer's state is made.
    for mean, square in zip(*(state[name].view(-1).split(CHUNK_ELEMENTS) for name in ADAM_STATE), strict=True):
        deviation = (square / (1 - second**step)).sqrt_().add_(group["eps"])
        squares += (mean / (1 - first**step)).div_(deviation).square_().sum()
    return squares.mul_(float(group["lr"]) ** 2)
