"""Learning rate, weight decay and tokens per step, as functions of the step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest

from fbitrain.config import BatchChange, Config, TrainConfig
from fbitrain.config_optim import SCHEDULES, OptimConfig, optim_problems
from fbitrain.optim.schedules import batch_tokens_at, decay_shape, lr_at, lr_shape, tokens_after

LR, LEAST = 3e-4, 3e-5


def optim(schedule: str, **more: float) -> OptimConfig:
    """A schedule of 100 steps, 10 of them warm-up, unless `more` says otherwise."""
    fields = {"lr": LR, "min_lr": LEAST, "warmup_steps": 10}
    if schedule == "wsd":
        fields["cooldown_steps"] = 25
    if schedule == "two_stage":
        fields |= {"stage2_step": 51, "stage2_lr": 1e-4}
    return OptimConfig(schedule=schedule, **{**fields, **more})  # type: ignore[arg-type]


def rates(settings: OptimConfig, total: int = 100) -> list[float]:
    """The rates of steps 1 to `total`; that of step t is at t - 1."""
    config = Config(optim=settings, train=TrainConfig(total_steps=total))
    return [lr_at(config, step) for step in range(1, total + 1)]


def old_cosine(settings: OptimConfig, total: int, step: int) -> float:
    """The expression that runs before other schedules existed were trained with."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 17), (1, 1), (7, 7), (2000, 49_981), (13, 1009)])
@pytest.mark.parametrize("lr", [3e-4, 1.7e-3, 0.1])
def test_cosine_is_bit_for_bit_what_it_was(warmup: int, total: int, lr: float) -> None:
    settings = OptimConfig(lr=lr, min_lr=lr / 7, warmup_steps=warmup)
    config = Config(optim=settings, train=TrainConfig(total_steps=total))
    for step in (*range(1, total + 2, max(1, total // 500)), max(1, total - 1), total, total + 3):
        wanted = old_cosine(settings, total, step)
        assert lr_at(config, step) == wanted
        assert lr_shape(settings, total, step) == wanted / lr


def odd_settings() -> Iterator[tuple[OptimConfig, int]]:
    """Every schedule at lengths where off-by-one shows: no warm-up, one step, nothing between the parts."""
    for schedule in SCHEDULES:
        for total in (1, 2, 3, 10, 97):
            for warmup in {0, 1, total // 3, total}:
                for extra in {1, 2, total // 2, total}:
                    more: dict[str, float] = {"warmup_steps": warmup}
                    if schedule == "wsd":
                        more["cooldown_steps"] = extra
                    if schedule == "two_stage":
                        more |= {"stage2_step": extra, "stage2_lr": 5e-5}
                    settings = optim(schedule, **more)
                    if not list(optim_problems(settings, total)):
                        yield settings, total


def test_every_schedule_stays_between_its_ends() -> None:
    seen = set()
    for settings, total in odd_settings():
        seen.add(settings.schedule)
        found = rates(settings, total)
        warmup = settings.warmup_steps
        for step in range(1, warmup + 1):
            assert found[step - 1] == pytest.approx(LR * step / warmup)
        after = found[warmup:]
        assert all(LEAST <= rate <= LR for rate in after)
        # A second stage that begins late, where the first is nearly done, may begin above it.
        cut = settings.stage2_step - 1 - warmup if settings.schedule == "two_stage" else len(after)
        for part in (after[:cut], after[cut:]):
            assert part == sorted(part, reverse=True), f"{settings.schedule} rises after its warm-up"
        for step, rate in enumerate(found, 1):
            assert lr_shape(settings, total, step) == pytest.approx(rate / LR)
            assert 0 <= decay_shape(settings, total, step) <= 1
        last_part = {"wsd": settings.cooldown_steps, "two_stage": total - settings.stage2_step}
        if warmup < total and last_part.get(settings.schedule, 1):
            assert found[-1] == LEAST, f"{settings.schedule} ends elsewhere"
    assert seen == set(SCHEDULES)


def test_linear_is_a_straight_line() -> None:
    found = rates(optim("linear", min_lr=0.0))
    assert found[9] == LR
    assert found[54] == pytest.approx(LR / 2)
    assert found[99] == 0
    steps = [before - after for before, after in itertools.pairwise(found[9:])]
    assert steps == pytest.approx([LR / 90] * 90)


def test_wsd_is_flat_until_its_cooldown() -> None:
    found = rates(optim("wsd"))
    assert set(found[9:75]) == {LR}
    for step in range(75, 101):
        assert found[step - 1] == pytest.approx(LEAST + (LR - LEAST) * (100 - step) / 25)
    assert found[75] < LR
    assert found[99] == LEAST
    assert rates(optim("wsd", cooldown_steps=0))[-1] == LR


def test_two_stages() -> None:
    settings = optim("two_stage")
    found = rates(settings)
    assert found[:50] == rates(optim("cosine"))[:50]
    assert found[50] == 1e-4
    assert found[49] > 1.7 * found[50], "the drop at the second stage is not abrupt"
    for step in range(51, 101):
        wanted = LEAST + (1e-4 - LEAST) * math.cos(math.pi / 2 * (step - 51) / 49) ** 2
        assert found[step - 1] == pytest.approx(wanted)
    decay = [decay_shape(settings, 100, step) for step in range(1, 101)]
    assert decay[:50] == sorted(decay[:50])
    assert decay[24] == pytest.approx(0.5)
    assert decay[49] == 1
    assert decay[50:] == [0.0] * 50


def test_weight_decay_is_constant_elsewhere() -> None:
    for schedule in ("cosine", "linear", "wsd"):
        assert {decay_shape(optim(schedule), 100, step) for step in range(1, 101)} == {1.0}


@pytest.mark.parametrize(
    "changes", [[], [BatchChange(2, 200)], [BatchChange(4, 200), BatchChange(5, 50), BatchChange(20, 800)]]
)
def test_tokens_of_a_step_and_of_all_before_it(changes: list[BatchChange]) -> None:
    train = TrainConfig(total_steps=20, global_batch_tokens=100, batch_changes=changes)
    total = 0
    assert tokens_after(train, 0) == 0
    for step in range(1, 25):
        wanted = 100
        for change in changes:
            wanted = change.global_batch_tokens if step >= change.from_step else wanted
        assert batch_tokens_at(train, step) == wanted
        total += wanted
        assert tokens_after(train, step) == total


def test_another_peak_has_the_same_shape() -> None:
    """What Muon's rate is multiplied with does not depend on the scale of optim.lr."""
    for schedule in SCHEDULES:
        settings = optim(schedule)
        scaled = replace(settings, lr=LR * 64, min_lr=LEAST * 64, stage2_lr=settings.stage2_lr * 64)
        for step in (1, 9, 10, 11, 50, 51, 76, 100):
            assert lr_shape(scaled, 100, step) == pytest.approx(lr_shape(settings, 100, step))
