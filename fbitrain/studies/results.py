"""What came of a study's runs: an outcome per variant, which of the expected orderings hold, all of it as JSON."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fbitrain.base.errors import UserError
from fbitrain.base.files import write_text
from fbitrain.config import Config
from fbitrain.model.size import count_parameters
from fbitrain.studies.runs import (
    BITS_PER_BYTE,
    Run,
    best_setting,
    finished_of_grid,
    has_failed,
    is_finished,
    last_of,
    metrics_of,
    or_infinite,
    require_same_settings,
    runs_of,
    seconds_of,
)
from fbitrain.studies.study_file import Setting, Study

DIGITS = 6  # after the point, of what is kept


@dataclass(frozen=True)
class Trial:
    """One setting of a variant's grid and what its finished runs came to; `failed` if none of them finished."""

    setting: str
    bits_per_byte: tuple[float, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Outcome:
    """A variant's results, per seed where there are several; where it has a grid, those of its best setting."""

    name: str
    seeds: tuple[int, ...]
    bits_per_byte: tuple[float, ...]
    perplexities: tuple[float, ...]
    bits_per_weight: float
    tokens: int
    weights: int  # that are binary, or would be without binarize.enabled=false; 0 where only the model can tell
    flops: float  # of all steps, as speed/mfu counts them; NaN if the run did not write them
    seconds: float  # the median over seeds, start to end; NaN if a run was not timed
    grid_key: str = ""
    setting: str = ""  # the best of the grid
    trials: tuple[Trial, ...] = ()  # in the grid's order

    @property
    def median(self) -> float:
        return statistics.median(map(or_infinite, self.bits_per_byte))

    @property
    def at_edge(self) -> bool:
        """Whether the best setting is the grid's first or last, beyond which a better one may lie."""
        return len(self.trials) > 1 and self.setting in (self.trials[0].setting, self.trials[-1].setting)


def outcomes(study: Study, folder: Path) -> list[Outcome]:
    """The results of the variants that have a finished run, in the order of the study, by their finished runs.

    Raises UserError for a run with other settings than the study has now.
    """
    found = []
    for variant in study.variants:
        of_variant = runs_of(study, folder, variant.name)
        finished = [run for run in of_variant if is_finished(run)]
        configs = [require_same_settings(study, run) for run in finished]
        if not finished:
            continue
        if not variant.grid:
            found.append(_outcome(finished, configs[0]))
            continue
        by_setting = finished_of_grid(study, folder, variant.name)
        best = best_setting(by_setting)
        chosen = _outcome(by_setting[best], configs[finished.index(by_setting[best][0])])
        trials = tuple(_trial(setting, of_variant) for setting in variant.grid)
        found.append(replace(chosen, grid_key=variant.grid_key, setting=best.name, trials=trials))
    return found


def verdicts(study: Study, results: Sequence[Outcome]) -> Iterator[tuple[str, str, str]]:
    """(lower, higher, verdict) of each expected ordering.

    It holds if every seed of the one is below every seed of the other, and fails if every seed is above; else it is
    undecided. A figure that is not finite is above all that are.
    """
    by_name = {outcome.name: [or_infinite(value) for value in outcome.bits_per_byte] for outcome in results}
    for low, high in study.expected:
        if low not in by_name or high not in by_name:
            yield low, high, "not run"
            continue
        lows, highs = by_name[low], by_name[high]
        runs = sorted((len(lows), len(highs)))
        alone = "" if runs[0] > 1 else " (one run each)" if runs[1] == 1 else " (one run against several)"
        if max(lows) < min(highs):
            yield low, high, "holds" + alone
        elif min(lows) > max(highs):
            yield low, high, "does not hold" + alone
        else:
            yield low, high, "undecided"


def write_results(study: Study, results: Sequence[Outcome], path: Path) -> None:
    """All outcomes as JSON, a line per variant, so that a table can be drawn again without the runs."""
    lines = [json.dumps(_kept(asdict(outcome)), ensure_ascii=False, separators=(",", ":")) for outcome in results]
    text = ",\n".join(lines)
    write_text(path, f'{{"base": {json.dumps(study.base)}, "outcomes": [\n{text}\n]}}\n')


def read_results(study: Study, path: Path) -> list[Outcome]:
    """What `write_results` wrote, in the order of the study. Raises UserError if `path` holds something else."""
    try:
        found = [_restored(item) for item in json.loads(path.read_text(encoding="utf-8"))["outcomes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the results {path} cannot be read: {type(error).__name__}: {error}") from None
    order = [variant.name for variant in study.variants]
    if strangers := [outcome.name for outcome in found if outcome.name not in order]:
        raise UserError(f"the results {path} have variants that the study has not: {', '.join(strangers)}")
    return sorted(found, key=lambda outcome: order.index(outcome.name))


def _outcome(finished: Sequence[Run], config: Config) -> Outcome:
    tokens = max(int(last_of(run, "tokens")) for run in finished)
    flops = (line["model/flops_per_token"] for line in metrics_of(finished[0]) if "model/flops_per_token" in line)
    weights = 0  # of a pretrained model, only the model itself can say which of its weights are binary
    if not config.model.pretrained:
        weights = count_parameters(config.model, replace(config.binarize, enabled=True)).binary
    return Outcome(
        name=finished[0].variant.name,
        seeds=tuple(run.seed for run in finished),
        bits_per_byte=tuple(last_of(run, BITS_PER_BYTE) for run in finished),
        perplexities=tuple(last_of(run, "heldout/perplexity") for run in finished),
        bits_per_weight=last_of(finished[0], "model/bits_per_weight"),
        tokens=tokens,
        weights=weights,
        flops=next(flops, math.nan) * tokens,
        seconds=statistics.median(map(seconds_of, finished)),
    )


def _trial(setting: Setting, of_variant: Sequence[Run]) -> Trial:
    mine = [run for run in of_variant if run.setting == setting]
    figures = tuple(last_of(run, BITS_PER_BYTE) for run in mine if is_finished(run))
    return Trial(setting.name, figures, failed=not figures and any(map(has_failed, mine)))


def _kept(value: Any) -> Any:
    """`value` as JSON has it: numbers rounded, null where they are not finite."""
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return [_kept(item) for item in value] if isinstance(value, list | tuple) else value


def _restored(item: dict[str, Any]) -> Outcome:
    def numbers(values: Sequence[float | None]) -> tuple[float, ...]:
        return tuple(math.nan if value is None else value for value in values)

    trials = (Trial(t["setting"], numbers(t["bits_per_byte"]), t["failed"]) for t in item["trials"])
    single = {key: math.nan if item[key] is None else item[key] for key in ("flops", "seconds")}
    several = {key: numbers(item[key]) for key in ("bits_per_byte", "perplexities")}
    return Outcome(**{**item, **single, **several, "seeds": tuple(item["seeds"]), "trials": tuple(trials)})
