"""The data section of a YAML file: strict, with overrides, whatever else the file holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fbitrain.base.errors import UserError
from fbitrain.data.config_file import read_data_config

ROOT = Path(__file__).parents[2]
YAML = """
optim: {lr: 1e-3, whatever: [1]}
distill: {teacher: some/model}
data:
  sources:
    - {name: a, paths: ["${distill.teacher}/x.jsonl"], weight: 1e-1}
    - {name: b, paths: [b], kind: token_ids}
  phases:
    - {from_step: 10, weights: {a: 2}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(YAML)
    return tmp_path / "config.yaml"


def test_the_data_section_is_read_and_overridden(file: Path) -> None:
    data, tokenizer = read_data_config(file, ["data.seed=3", "data.sources.1.weight=5"])
    assert tokenizer == "some/model"
    assert (data.seed, data.seq_len) == (3, 2048)
    assert [(source.name, source.weight, source.kind) for source in data.sources] == [
        ("a", 0.1, "text"),
        ("b", 5.0, "token_ids"),
    ]
    assert data.sources[0].paths == ["some/model/x.jsonl"]
    assert data.phases[0].weights == {"a": 2.0}


def test_the_tokenizer_may_be_named_or_absent(file: Path) -> None:
    assert read_data_config(file, ["data.tokenizer=other.model"])[1] == "other.model"
    assert read_data_config(file, ["distill.teacher="])[1] == ""


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_read(path: Path) -> None:
    data, tokenizer = read_data_config(path)
    assert data.sources
    assert tokenizer


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sed=1", r"data.sed is not a field of DataConfig; did you mean data.seed\?"),
        ("data.sources.0.wieght=1", r"data.sources\[0\].wieght is not a field of SourceConfig; did you mean weight\?"),
        ("data.qqqqqqqq=1", r"data.qqqqqqqq is not a field of DataConfig; its fields are add_bos,"),
        ("data.seed=x", r"data.seed='x' is not of type int"),
        ("data.heldout=x", r"data.heldout='x' is not of type list\[str\]"),
        ("data.sources=[3]", r"data.sources must be a list of sections"),
        ("data.sources.0.weight=-1", r"data.sources\[0\].weight=-1.0 must be positive"),
        ("data.sources=[]", "data.sources is empty"),
        ("optim.lr=1", "override 'optim.lr=1' must be of the form data.key=value"),
        ("data.seed", "must be of the form"),
        ("data.sources.9.weight=1", "cannot be applied"),
        ("data.seed=${nowhere}", "cannot be applied"),
    ],
)
def test_what_does_not_fit_is_named(file: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_data_config(file, [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: 3", "data is a section, but it is given as 3"),
        ("- a", "must hold sections"),
        ("data: {seed: [", "cannot be read as YAML"),
        ("data: {seed: '${nowhere}'}", "an interpolation cannot be resolved"),
        ("model: {}", "data.sources is empty"),
    ],
)
def test_what_cannot_be_read_is_said(file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        read_data_config(file)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: there is no such file"):
        read_data_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["data.tokenizer=~/x", "distill.teacher=~/x"])
def test_a_tilde_is_the_home_folder(file: Path, override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    data, tokenizer = read_data_config(file, [override, "data.duplicates=~/list.npz"])
    assert (data.duplicates, tokenizer) == ("/home/me/list.npz", "/home/me/x")
