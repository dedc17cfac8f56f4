"""The config tree: round trips, every problem in one message, hints, and no torch before it is valid."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fbitrain.config import Config, ConfigError, differences, flatten, load_config, to_yaml
from fbitrain.config_optim import KindFactors, OptimConfig
from fbitrain.model.config import PRESETS, BinarizeConfig, ModelConfig

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "launch" / "configs").glob("*.yaml"))

MINIMAL = """
distill: {teacher: some/teacher}
optim: {warmup_steps: 0}
train: {micro_batch_size: 2, global_batch_tokens: 4096}
data:
  seq_len: 128
  sources: [{name: a, paths: [a.jsonl]}]
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def problems_of(path: Path, *overrides: str, world_size: int = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return caught.value.problems


# Shipped files


def test_there_are_shipped_configs() -> None:
    assert {path.stem for path in SHIPPED} >= {"fbi_130m", "fbi_1.3b", "fbi_7b"}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid_and_reads_back(path: Path, world_size: int, tmp_path: Path) -> None:
    config = load_config(path, world_size=world_size)
    tokens = config.train.micro_batch_size * config.data.seq_len * world_size * config.grad_accum_steps(world_size)
    assert tokens == config.train.global_batch_tokens
    saved = tmp_path / "resolved.yaml"
    saved.write_text(to_yaml(config))
    assert load_config(saved, world_size=world_size) == config


@pytest.mark.parametrize(("name", "world_size"), [("fbi_130m", 64), ("fbi_1.3b", 128), ("fbi_7b", 384)])
def test_the_recipes_spread_over_the_ranks_they_promise(name: str, world_size: int) -> None:
    path = ROOT / "launch" / "configs" / f"{name}.yaml"
    config = load_config(path, world_size=world_size)
    # One micro-batch each: the lanes, and so the sequences of a step, divide evenly over the ranks.
    assert config.sequences_in(1) == world_size * config.train.micro_batch_size
    assert config.grad_accum_steps(world_size) == 1
    assert any("n_lanes" in problem for problem in problems_of(path, world_size=config.data.n_lanes + 1))


@pytest.mark.parametrize(
    ("size", "steps", "tokens"),
    [("130m", 600_075, 2_097_152), ("1.3b", 533_430, 2_359_296), ("7b", 320_040, 3_932_160)],
)
def test_the_recipes_are_the_papers(size: str, steps: int, tokens: int) -> None:
    """Sizes and rates are the paper's (arXiv 2407.07093), updates and decay those of the scripts published with it."""
    config = load_config(ROOT / "launch" / "configs" / f"fbi_{size}.yaml")
    for name, value in PRESETS[size].items():
        assert getattr(config.model, name) == value
    assert (config.model.vocab_size, config.data.seq_len, config.optim.warmup_steps) == (32000, 2048, 2000)
    assert (config.optim.lr, config.optim.min_lr, config.optim.betas) == (3e-4, 3e-5, [0.9, 0.95])
    assert (config.optim.weight_decay, config.optim.max_grad_norm) == (0.1, 1.0)
    assert sum(source.weight for source in config.data.sources) == pytest.approx(1259.11)
    assert (config.train.total_steps, config.train.global_batch_tokens) == (steps, tokens)
    assert 0 <= 1_259_110_000_000 - steps * tokens < 1e9  # of the corpus
    factors = config.optim.decay_factor
    assert factors.matrices == factors.scales == factors.embeddings == factors.norms == factors.head == 1


# Reading


def test_overrides_win_over_the_file_and_the_file_over_the_preset(minimal: Path) -> None:
    minimal.write_text(MINIMAL + "model: {preset: tiny, n_layers: 3}\n")
    config = load_config(minimal, ["model.d_ff=640", "optim.lr=1e-3", "run.name=x", "train.compile=true"])
    assert (config.model.n_layers, config.model.d_ff, config.model.d_model) == (3, 640, PRESETS["tiny"]["d_model"])
    assert (config.optim.lr, config.run.name, config.train.compile) == (1e-3, "x", True)


def test_lists_can_be_overridden(minimal: Path) -> None:
    config = load_config(
        minimal, ["eval.prompts=[a, b]", "binarize.skip=[lm_head, down_proj]", "optim.betas=[0.8, 0.9]"]
    )
    assert config.eval.prompts == ["a", "b"]
    assert config.binarize.skip == ["lm_head", "down_proj"]
    assert config.optim.betas == [0.8, 0.9]


def test_an_override_can_reach_into_the_list_of_sources(minimal: Path) -> None:
    assert load_config(minimal, ["data.sources.0.weight=2.5"]).data.sources[0].weight == 2.5


def test_a_loaded_config_cannot_be_changed(minimal: Path) -> None:
    config = load_config(minimal)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optim.lr = 1.0  # type: ignore[misc]


def test_differences_name_exactly_the_changed_leaves(minimal: Path) -> None:
    old = load_config(minimal)
    new = load_config(minimal, ["optim.lr=1e-4", "eval.prompts=[x]"])
    assert differences(old, new) == {"optim.lr": (3e-4, 1e-4), "eval.prompts": (["def main("], ["x"])}
    assert differences(old, old) == {}
    assert flatten(old)["data.seq_len"] == 128


sizes = st.integers(1, 9)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    heads = draw(st.sampled_from([1, 2, 6]))
    return ModelConfig(
        vocab_size=draw(st.integers(1, 200_000)),
        n_layers=draw(sizes),
        n_heads=heads,
        n_kv_heads=draw(st.sampled_from([0, 1, heads])),
        d_model=2 * heads * draw(sizes),
        d_ff=draw(st.integers(1, 20_000)),
        rope_theta=draw(st.floats(1.0, 1e7)),
        norm_eps=draw(st.floats(1e-12, 1e-2)),
        tie_embeddings=draw(st.booleans()),
    )


text = st.text(st.characters(codec="utf-8", exclude_characters="$"), max_size=12)  # `${…}` is OmegaConf's own


@settings(max_examples=15, deadline=None)
@given(
    model=model_configs(),
    name=text,
    prompts=st.lists(text.filter(bool), max_size=3),
    lr=st.floats(1e-12, 1.0),
    eps=st.floats(1e-30, 1e-2),
    seed=st.integers(0, 2**63 - 1),
    beta=st.booleans(),
)
def test_to_yaml_reads_back_to_an_equal_config(
    tmp_path_factory: pytest.TempPathFactory,
    model: ModelConfig,
    name: str,
    prompts: list[str],
    lr: float,
    eps: float,
    seed: int,
    beta: bool,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "base.yaml").write_text(MINIMAL)
    base = load_config(folder / "base.yaml")
    config = dataclasses.replace(
        base,
        model=model,
        run=dataclasses.replace(base.run, name=name),
        eval=dataclasses.replace(base.eval, prompts=prompts),
        optim=dataclasses.replace(base.optim, lr=lr, min_lr=lr / 3, eps=eps),
        train=dataclasses.replace(base.train, seed=seed),
        binarize=BinarizeConfig(scale="row", beta=beta),
    )
    saved = folder / "saved.yaml"
    saved.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(saved) == config


# Problems


def test_every_problem_is_in_one_message(minimal: Path) -> None:
    wrong = {
        "optim.lr": "-1",
        "train.global_batch_tokens": "1000",
        "model.n_heads": "7",
        "engine.zero_stage": "5",
        "binarize.scale": "colum",
        "distill.temperature": "0",
    }
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [f"{key}={value}" for key, value in wrong.items()])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{len(caught.value.problems)} config errors in {minimal}:"
    assert lines[1:] == [f"  {problem}" for problem in caught.value.problems]
    for key in wrong:
        assert any(key in line for line in lines), key


def test_unknown_keys_and_wrong_types_are_reported_together(minimal: Path) -> None:
    problems = problems_of(minimal, "optim.lrr=1", "train.total_steps=many", "modle.n_heads=2", "model=3", "nonsense")
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("optim.warmup_step=1", "did you mean optim.warmup_steps?"),
        ("modle.n_heads=2", "did you mean model?"),
        ("train.lr=1", "did you mean optim.lr?"),  # a right key in the wrong section
        ("data.sources.0.wieght=1", "did you mean"),
        ("debug.zzz=1", "its fields are deterministic, log_batches"),
    ],
)
def test_an_unknown_key_names_the_nearest(minimal: Path, override: str, hint: str) -> None:
    (problem,) = problems_of(minimal, override)
    assert hint in problem


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.preset=3b", ["'3b'", "tiny, 130m, 1.3b, 7b"]),
        ("train.total_steps=1.5", ["train.total_steps=1.5", "int"]),
        ("train.compile=perhaps", ["train.compile='perhaps'", "bool"]),
        ("optim.betas=[0.9]", ["optim.betas=[0.9]", "two numbers"]),
        ("optim.betas=0.9", ["optim.betas=0.9", "list"]),
        ("optim.no_decay=[scale]", ["optim.no_decay is not a field of OptimConfig"]),
        ("optim.optimizer=lion", ["optim.optimizer='lion' is unknown", "adamw, muon"]),
        ("optim.schedule=step", ["optim.schedule='step' is unknown", "cosine, linear, wsd, two_stage"]),
        ("optim.lr_factor.scale=0.1", ["optim.lr_factor.scale is not a field", "did you mean optim.lr_factor.scales?"]),
        ("optim.lr_factor.scales=-1", ["optim.lr_factor.scales=-1", "must not be negative"]),
        ("optim.cooldown_steps=5", ["optim.cooldown_steps=5 is for optim.schedule=wsd, not cosine"]),
        ("optim.stage2_lr=1e-4", ["optim.stage2_lr=0.0001 is for optim.schedule=two_stage, not cosine"]),
        ("optim.muon.update_size=big", ["optim.muon.update_size='big' is unknown", "spectral, rms"]),
        ("optim.muon.ns_steps=0", ["optim.muon.ns_steps=0 must be at least 1"]),
        ("optim.muon.momentum=1", ["optim.muon.momentum=1", "[0, 1)"]),
        ("optim.muon.fused=[{name: qkv, rows: [8]}]", ["optim.muon.fused[0]", "at least two matrices"]),
        ("optim.muon.weight_decay=50", ["optim.muon.weight_decay=50", "less than 1/optim.muon.lr"]),
        ("optim.eps=0", ["optim.eps=0.0 must be positive"]),
        ("optim.on_change=ignore", ["optim.on_change='ignore' is unknown", "refuse, restart"]),
        ("optim.min_lr=1", ["optim.min_lr=1", "optim.lr="]),
        ("optim.warmup_steps=2000000", ["optim.warmup_steps", "train.total_steps"]),
        ("engine.zero_stage=0", ["precision=fp32"]),
        ("engine.precision=fp16", ["'fp16'", "auto, bf16, fp32"]),
        ("binarize.scale=group", ["binarize.beta=false"]),
        ("data.seq_len=4096", ["max_seq_len=2048"]),
        ("data.sources=[]", ["data.sources is empty"]),
        ("data.sources=x", ["data.sources", "list of sections"]),
        ("distill.teacher=''", ["distill.teacher is empty", "kd_weight=0"]),
        ("distill.kd_weight=0", ["one of them must be positive"]),
        ("distill.host=zero2", ["replicated or zero3"]),
        ("eval.max_tokens=5", ["eval.max_tokens=5", "data.seq_len=128"]),
        ("model.d_model=100", ["d_model=100", "n_heads=12"]),
        ("model.n_kv_heads=5", ["n_kv_heads=5"]),
        ("train.micro_batch_size=0", ["train.micro_batch_size=0 must be at least 1"]),
        ("train.collective_timeout_s=0", ["train.collective_timeout_s=0.0 must be at least 1"]),
        ("debug.profile_steps=[3]", ["debug.profile_steps=[3] must be the first and the last step to profile"]),
        ("debug.profile_steps=[5,4]", ["debug.profile_steps=[5, 4] must be the first and the last step"]),
        ("debug.profile_steps=[1,100000]", ["from 1 to train.total_steps=1000"]),
        ("debug.profile_steps=5", ["debug.profile_steps", "list"]),
        ("train.total_steps=", ["train.total_steps=''"]),
        ("=3", ["section.key=value"]),
        ("optim.lr=[", ["cannot be applied"]),
    ],
)
def test_a_wrong_value_says_what_and_how_to_mend_it(minimal: Path, override: str, words: list[str]) -> None:
    text = "\n".join(problems_of(minimal, override))
    for word in words:
        assert word in text


def test_held_out_windows_have_a_token_to_predict(minimal: Path) -> None:
    (problem,) = problems_of(minimal, "data.seq_len=1", "data.heldout=[held.txt]")
    assert "data.seq_len=1 leaves no token of a held-out window to predict; set it to 2 or more" in problem
    for unmeasured in (["eval.every=0"], ["data.heldout=[]"]):
        load_config(minimal, ["data.seq_len=1", "data.heldout=[held.txt]", *unmeasured])


def test_schedules_must_fit_the_run(minimal: Path) -> None:
    run = ("train.total_steps=100", "optim.warmup_steps=10")
    (problem,) = problems_of(minimal, *run, "optim.schedule=wsd", "optim.cooldown_steps=91")
    assert "optim.cooldown_steps=91 must lie in 0 to train.total_steps=100 less optim.warmup_steps=10" in problem
    stages = ("optim.schedule=two_stage", "optim.lr=1e-3", "optim.min_lr=0", "optim.stage2_step=101")
    found = problems_of(minimal, *run, *stages, "optim.stage2_lr=2e-3")
    assert len(found) == 2
    assert "optim.stage2_step=101 must lie between optim.warmup_steps=10 and train.total_steps=100" in found[0]
    assert "optim.stage2_lr=0.002 must lie between optim.min_lr=0.0 and optim.lr=0.001" in found[1]
    late = (
        "optim.schedule=two_stage",
        "optim.lr=1e-3",
        "optim.min_lr=0",
        "optim.stage2_step=90",
        "optim.stage2_lr=5e-4",
    )
    (problem,) = problems_of(minimal, *run, *late)
    assert "optim.stage2_lr=0.0005 is above the 3.64e-05 that the first stage has reached" in problem


def test_the_rate_and_decay_of_muons_matrices_are_muons(minimal: Path) -> None:
    found = problems_of(
        minimal, "optim.optimizer=muon", "optim.lr_factor.matrices=0.5", "optim.decay_factor.matrices=0"
    )
    assert len(found) == 2
    assert "set optim.muon.lr instead" in found[0]
    assert "set optim.muon.weight_decay instead" in found[1]


def test_an_old_runs_list_of_kinds_without_decay_is_still_read(minimal: Path) -> None:
    config = load_config(minimal, ["optim.no_decay=[scales, norms]"])
    assert config.optim.decay_factor == KindFactors(scales=0, routers=0, norms=0)
    everything = load_config(minimal, ["optim.no_decay=[scales, norms, embeddings, biases]"])
    assert everything.optim.decay_factor == OptimConfig().decay_factor
    assert load_config(minimal, ["optim.no_decay=[]"]).optim.decay_factor.scales == 1
    both = load_config(minimal, ["optim.no_decay=[]", "optim.decay_factor.head=0"])
    assert (both.optim.decay_factor.head, both.optim.decay_factor.norms) == (0, 1)


def test_a_run_of_no_steps_needs_no_word_on_its_warm_up(minimal: Path, tmp_path: Path) -> None:
    (tmp_path / "origin").mkdir()
    (tmp_path / "origin" / "config.json").write_text("{}")
    fine_tuned = (f"model.pretrained={tmp_path / 'origin'}", "model.preset=", "optim.warmup_steps=30")
    assert load_config(minimal, [*fine_tuned, "train.total_steps=0"]).optim.warmup_steps == 30
    (problem,) = problems_of(minimal, *fine_tuned, "train.total_steps=29")
    assert "optim.warmup_steps=30 must lie in 0 to train.total_steps=29" in problem


def test_a_binary_run_is_not_calibrated_again(minimal: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    partial = ("binarize.method=partial", "binarize.scale=row", "binarize.beta=false", "calibration.n_sequences=9")
    fine_tuned = (f"model.pretrained={run}", "model.preset=", *partial)
    for enabled, n_problems in (("true", 1), ("false", 0)):
        (run / "config.yaml").write_text(f"binarize: {{enabled: {enabled}}}")
        load_config(minimal, fine_tuned)
        for setting in ("ptq=true", "path=text.txt"):
            problems = []
            try:
                load_config(minimal, [*fine_tuned, f"calibration.{setting}"])
            except ConfigError as error:
                problems = error.problems
            assert len(problems) == n_problems
            assert all(f"calibration.{setting.partition('=')[0]} has nothing to do" in said for said in problems)


def test_the_world_size_is_part_of_the_check(minimal: Path) -> None:
    assert load_config(minimal, world_size=16).grad_accum_steps(16) == 1
    # Its 16 lanes, of 2 sequences each in a step, are 6, 5 and 5 of 3 ranks: 12 sequences in micro-batches of 2.
    assert load_config(minimal, world_size=3).grad_accum_steps(3) == 6
    assert any("n_lanes=16" in problem for problem in problems_of(minimal, world_size=32))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "there is no such file"),
        ("- a\n- b\n", "not a list"),
        ("a: [1\n", "cannot be read as YAML"),
        ("a: 1\na: 2\n", "cannot be read as YAML"),
        ("train: 3\n", "train is a section"),
    ],
)
def test_an_unreadable_file_is_one_sentence(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"x\.yaml") as caught:
        load_config(path)
    assert words in str(caught.value)


def test_a_binary_file_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(path)


def test_an_empty_file_is_the_defaults_and_their_problems(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("")
    assert any("data.sources is empty" in problem for problem in problems_of(path))


# Cost of loading


def test_torch_is_imported_neither_by_a_good_config_nor_by_a_bad_one(minimal: Path) -> None:
    code = (
        "import sys\n"
        "from fbitrain.config import ConfigError, load_config\n"
        f"load_config({str(minimal)!r})\n"
        "try:\n"
        f"    load_config({str(minimal)!r}, ['optim.lrr=1'])\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
        "print(sorted({'torch', 'deepspeed', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "did you mean optim.lr?" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_defaults_are_a_config() -> None:
    assert Config().grad_accum_steps(1) == 2**19 // (8 * 2048)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.lr=inf", "optim.lr=inf is not a finite number"),
        ("optim.weight_decay=nan", "optim.weight_decay=nan is not a finite number"),
        ("optim.betas=[0.9,nan]", "optim.betas=[0.9, nan] is not a finite number"),
        ("model.preset=[a]", "model.preset=['a'] is unknown"),
        ("eval.prompts=['${nothing}']", "an interpolation cannot be resolved"),
    ],
)
def test_values_that_nothing_can_be_computed_with(minimal: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [override])
    assert sentence in str(caught.value)


def test_unknown_keys_do_not_hide_impossible_values(minimal: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, ["optim.lrr=1", "optim.min_lr=7", "train.total_steps=abc"])
    said = str(caught.value)
    assert "did you mean optim.lr?" in said
    assert "optim.min_lr=7" in said
    assert "train.total_steps='abc' is not of type int" in said
    assert "optim.warmup_steps" not in said, "what follows from the default of an unread field is no news"


HOME_PATHS = [
    "run.dir",
    "model.pretrained",
    "distill.teacher",
    "data.tokenizer",
    "data.pretokenized",
    "data.duplicates",
    "data.cache_dir",
    "data.sources.0.url_lists.0",
    "data.sources.0.checksums.0",
    "train.resume",
]


@pytest.mark.parametrize("key", HOME_PATHS)
def test_a_tilde_is_the_home_folder_in_every_path(
    minimal: Path, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "config.json").write_text("{}")  # a model, where model.pretrained is meant
    more = ["data.sources.0.url_lists=[u]", "data.sources.0.checksums=[s]"]
    config = load_config(minimal, [*more, f"{key}=~/x"])
    found: object = config
    for name in key.split("."):
        found = found[int(name)] if isinstance(found, list) else getattr(found, name)
    assert found == str(tmp_path / "x")
    assert config.eval.prompts == ["def main("]


def test_a_tilde_that_is_no_path_stays(minimal: Path) -> None:
    config = load_config(minimal, ["eval.prompts=['~/x']", "data.sources.0.include=['~*']", "run.name='~'"])
    assert (config.eval.prompts, config.data.sources[0].include, config.run.name) == (["~/x"], ["~*"], "~")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: " + "[" * 20_000 + "]" * 20_000, "nested too deep"),
        ("a: " + "{a: " * 20_000 + "}" * 20_000, "nested too deep"),
        ("a: " + "[" * 300 + "]" * 300, "nested too deep"),
        ("optim: {lr: 1" + "0" * 5_000 + "}", "4300 digits"),
        ("optim: {lr: 0x1" + "0" * 5_000 + "}", "20,001 bits"),
        ("data: {seed: 0x1" + "0" * 5_000 + "}", "20,001 bits"),
    ],
)
def test_what_python_cannot_read_is_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content + "\n")
    with pytest.raises(ConfigError, match=words) as caught:
        load_config(path)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("value", ["[" * 20_000 + "]" * 20_000, "1" + "0" * 5_000, "0x1" + "0" * 5_000])
def test_what_python_cannot_read_in_an_override(minimal: Path, value: str) -> None:
    with pytest.raises(ConfigError, match=r"nested too deep|4300 digits|20,001 bits"):
        load_config(minimal, [f"data.seed={value}"])


def test_a_file_has_what_it_does_not_say_from_the_one_it_extends(minimal: Path, tmp_path: Path) -> None:
    (tmp_path / "middle.yaml").write_text(f"extends: {minimal.name}\noptim: {{lr: 0.5, min_lr: 0.1}}\n")
    last = tmp_path / "last.yaml"
    last.write_text("extends: middle.yaml\noptim: {min_lr: 0.2}\n")
    config, base = load_config(last, ["train.seed=7"]), load_config(minimal)
    assert (config.optim.lr, config.optim.min_lr, config.train.seed) == (0.5, 0.2, 7)
    assert (config.data, config.distill) == (base.data, base.distill)
    last.write_text("extends: fbi_130m\nmodel: {preset: 7b}\n")
    assert load_config(last).model.d_model == 4096
    for text, complaint in (
        ("extends: last.yaml\n", "it extends last.yaml, which extends it"),
        ("extends: nowhere\n", "nowhere: there is no such file"),
        ("extends: middle.yaml\noptim: 3\n", "optim is a section"),
    ):
        last.write_text(text)
        with pytest.raises(ConfigError, match=complaint):
            load_config(last)
