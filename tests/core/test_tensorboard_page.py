"""What TensorBoard itself says of a run's event files, over its HTTP API: names, order, tabs, and runs that resume."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch

from fbitrain.config import Config, RunConfig
from fbitrain.tensorboard_page import TensorBoardPage, charts_of, histograms_of, layout

Board = Callable[[Path], Callable[..., Any]]
LOSS = "1 overview/1 loss"


PARTS = (*(f"self_attn.{part}_proj" for part in "qkvo"), *(f"mlp.{part}_proj" for part in ("gate", "up", "down")))


def layers(n_blocks: int) -> list[str]:
    return [f"layers.{i}.{part}" for i in range(n_blocks) for part in PARTS]


def scalars_at(step: int, n_blocks: int = 2) -> dict[str, float]:
    """The kinds of keys that a log line has."""
    keys = (
        *("train/loss", "train/label_ce", "train/kd", "teacher/entropy", "optim/lr", "optim/grad_norm"),
        *("lr/matrices", "lr/scales", "update_ratio/matrices", "signs/flipped", "signs/near_zero", "scales/negative"),
        *("slowest_rank/working_s", "slowest_rank/waiting_s", "fastest_rank/working_s", "slowest_rank/number"),
        *("speed/tokens_per_s", "speed/mfu", "memory/resident_gib", "data/tokens/web", "data/bad_records"),
        *("phase/binary_share", "router/entropy", "model/bits_per_weight", "unheard/of"),
    )
    shares = {f"signs_flipped/{layer}": i / 100 for i, layer in enumerate(layers(n_blocks))}
    return {key: float(step) for key in keys} | shares


def train(config: Config, steps: range, n_blocks: int = 2, ends: bool = True) -> None:
    """Writes the page of a run that takes these steps; a run that does not end is killed after its last."""
    page = TensorBoardPage(config, steps.start - 1)
    for step in steps:
        page.scalars(step, scalars_at(step, n_blocks))
        page.scalars(step, {"heldout/bits_per_byte": 1 / step, "heldout/perplexity": 10 / step})
        named = {f"model.{layer}.{leaf}": torch.rand(8) for layer in layers(n_blocks) for leaf in ("alpha", "beta")}
        page.histograms(step, named)  # flushes
        page.texts(step, {"sample/0": "def main("})
    if ends:
        page.close()


def config_of(folder: Path, name: str = "good_name") -> Config:
    return replace(Config(), run=RunConfig(name=name, dir=str(folder)))


@pytest.fixture
def board() -> Iterator[Board]:
    """Starts TensorBoard on a folder; what it returns asks TensorBoard for a path with parameters, parsed from JSON."""
    started: list[subprocess.Popen[bytes]] = []

    def start(logdir: Path) -> Callable[..., Any]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        tensorboard = Path(sys.executable).parent / "tensorboard"
        options = ["--logdir", str(logdir), "--host", "127.0.0.1", "--port", str(port)]
        log = subprocess.DEVNULL
        started.append(subprocess.Popen([tensorboard, *options], stdout=log, stderr=log, start_new_session=True))

        def ask(path: str, **parameters: str) -> Any:
            url = f"http://127.0.0.1:{port}/data/{path}?{urlencode(parameters)}"
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if ask("runs"):
                    return ask
            except OSError:
                pass
            time.sleep(0.2)
        pytest.fail("tensorboard showed no run within 60 s")

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def groups_of(tags: Any) -> list[str]:
    """In the order of the page; all begin with a digit, so sorting is what the page does."""
    return sorted({tag.split("/", 1)[0] for tag in tags})


def test_the_page_opens_on_what_matters(tmp_path: Path, board: Board) -> None:
    train(config_of(tmp_path), range(1, 4))
    ask = board(tmp_path / "good_name" / "tensorboard")
    assert ask("runs") == ["good_name"]
    tags = ask("plugin/scalars/tags")["good_name"]
    histograms = ask("plugin/histograms/tags")["good_name"]
    groups = groups_of([*tags, *histograms])
    assert [group[0] for group in groups] == [*"12345567899"]
    assert groups[4:6] == ["5 speed and memory", "5 step of the slowest and fastest rank"]
    assert sorted(tag for tag in tags if tag.startswith(groups[0])) == [
        *(LOSS, "1 overview/2 bits per byte", "1 overview/3 tokens per s"),
        *("1 overview/4 learning rate", "1 overview/5 signs flipped", "1 overview/6 gradient norm"),
    ]
    assert "2 losses/heldout/perplexity" in tags
    assert "3 optimizer/lr/scales" in tags
    assert "7 other/unheard/of" in tags
    assert "5 step of the slowest and fastest rank/slowest_rank/waiting_s" in tags
    assert groups[-3:] == ["8 signs flipped by layer", "9 alpha by layer", "9 beta by layer"]
    assert "9 alpha by layer/layers.0.self_attn.q_proj" in histograms
    assert "4 signs and scales/alpha of all layers" in histograms


def test_many_layers_are_summed_up_and_a_few_blocks_shown(tmp_path: Path, board: Board) -> None:
    """A 7B model has 32 blocks."""
    train(config_of(tmp_path), range(1, 2), n_blocks=32)
    ask = board(tmp_path)
    ((tags,), (histograms,)) = (ask(f"plugin/{plugin}/tags").values() for plugin in ("scalars", "histograms"))
    shares = {tag for tag in tags if tag.startswith("8 ")}
    assert len(shares) == 56
    assert {f"8 signs flipped by layer/layers.{i}.mlp.down_proj" for i in (0, 4, 9, 13, 18, 22, 27, 31)} < shares
    assert len([tag for tag in histograms if tag.startswith("9 ")]) == 112
    charts = charts_of(scalars_at(1, 32))
    assert charts["4 signs and scales/signs/flipped_lowest_layer"] == 0
    assert charts["4 signs and scales/signs/flipped_highest_layer"] == 2.23
    shown = histograms_of({f"{layer}.alpha": torch.rand(3) for layer in [*layers(32), "lm_head"]})
    assert shown["4 signs and scales/alpha of all layers"].numel() == 3 * 225
    assert "9 alpha by layer/lm_head" in shown


def test_custom_scalars_draw_curves_together(tmp_path: Path, board: Board) -> None:
    for name in ("one", "two"):
        train(config_of(tmp_path, name), range(1, 3))
    ask = board(tmp_path)
    found = ask("plugin/custom_scalars/layout")["category"]
    assert {category["title"]: [chart["title"] for chart in category["chart"]] for category in found} == {
        title: [*charts] for title, charts in layout().items()
    }
    run = "one/tensorboard/one"
    (chart,) = (chart for chart in found[0]["chart"] if chart["title"] == "learning rates")
    (pattern,) = chart["multiline"]["tag"]
    drawn = ask("plugin/custom_scalars/scalars", run=run, tag=pattern)["tag_to_events"]
    assert sorted(drawn) == ["3 optimizer/lr/matrices", "3 optimizer/lr/scales"]
    (chart,) = (chart for chart in found[0]["chart"] if "margin" in chart)
    tags = ask("plugin/scalars/tags")[run]
    assert {*chart["margin"]["series"][0].values()} < {*tags}


def test_hparams_hold_configuration_and_last_figures(tmp_path: Path, board: Board) -> None:
    one, two = config_of(tmp_path, "one"), config_of(tmp_path, "two")
    train(one, range(1, 4))
    train(replace(two, optim=replace(two.optim, lr=0.25)), range(1, 3))
    ask = board(tmp_path)
    experiment = ask("plugin/hparams/experiment", request=json.dumps({"experimentName": ""}))
    names = [info["name"] for info in experiment["hparamInfos"]]
    assert names[0] == "optim.lr", "what differs between the runs comes first"
    assert {"binarize.method", "model.n_layers", "train.total_steps", "data.sources"} < {*names}
    assert not any(name.startswith("run.") for name in names)
    assert experiment["metricInfos"][0]["name"]["tag"] == LOSS
    trials = trials_of(ask)
    assert {trial["name"]: trial["hparams"]["optim.lr"] for trial in trials} == {"one": one.optim.lr, "two": 0.25}
    last = {
        trial["name"]: [value["value"] for value in trial["metricValues"] if value["name"]["tag"] == LOSS]
        for trial in trials
    }
    assert last == {"one": [3.0], "two": [2.0]}


def trials_of(ask: Callable[..., Any]) -> list[dict[str, Any]]:
    """The rows of the HPARAMS tab."""
    statuses = [f"STATUS_{status}" for status in ("UNKNOWN", "SUCCESS", "FAILURE", "RUNNING")]
    request = {"startIndex": 0, "sliceSize": 9, "allowedStatuses": statuses}
    rows: list[dict[str, Any]] = ask("plugin/hparams/session_groups", request=json.dumps(request))["sessionGroups"]
    return rows


def steps_of(ask: Callable[..., Any], run: str, tag: str) -> list[int]:
    return [step for _, step, _ in ask("plugin/scalars/scalars", run=run, tag=tag)]


def test_a_resumed_run_appears_once_with_every_step_once(tmp_path: Path, board: Board) -> None:
    config = config_of(tmp_path)
    train(config, range(1, 6), ends=False)
    train(replace(config, optim=replace(config.optim, lr=0.25)), range(4, 8))
    ask = board(tmp_path / "good_name" / "tensorboard")
    assert ask("runs") == ["good_name"]
    assert steps_of(ask, "good_name", LOSS) == list(range(1, 8))
    histograms = ask("plugin/histograms/histograms", run="good_name", tag="4 signs and scales/alpha of all layers")
    assert [step for _, step, *_ in histograms] == list(range(1, 8))
    charts = [len(category["chart"]) for category in ask("plugin/custom_scalars/layout")["category"]]
    assert charts == [len(category) for category in layout().values()]
    assert [trial["hparams"]["optim.lr"] for trial in trials_of(ask)] == [config.optim.lr]


def test_a_run_that_begins_anew_shows_nothing_of_before(tmp_path: Path, board: Board) -> None:
    config = config_of(tmp_path)
    train(config, range(1, 6))
    train(config, range(1, 3))
    ask = board(tmp_path / "good_name" / "tensorboard")
    assert steps_of(ask, "good_name", LOSS) == [1, 2]


def test_a_renamed_run_goes_on_under_its_new_name(tmp_path: Path, board: Board) -> None:
    train(config_of(tmp_path), range(1, 4))
    shutil.copytree(tmp_path / "good_name", tmp_path / "copy")
    train(config_of(tmp_path, "copy"), range(4, 6))
    ask = board(tmp_path / "copy")
    assert ask("runs") == ["tensorboard/copy"]
    assert steps_of(ask, "tensorboard/copy", LOSS) == [1, 2, 3, 4, 5]
