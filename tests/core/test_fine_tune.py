"""What fine-tuning starts from and what its checkpoints become: architectures, own runs, calibration, releases."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from fbitrain import build
from fbitrain.base.errors import UserError
from fbitrain.calibration.text import calibration_ids, needs_text
from fbitrain.checkpoint import write_named
from fbitrain.checkpoint_marker import FIXED, LM_CONFIG
from fbitrain.config import (
    CalibrationConfig,
    Config,
    ConfigError,
    DistillConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    load_config,
    to_yaml,
)
from fbitrain.data.config import DataConfig, SourceConfig
from fbitrain.data.loader import TokenLoader
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.fine_tune import fine_tuned_student, with_known_sizes
from fbitrain.loading.language_model import load_language_model
from fbitrain.loading.model_folder import load_lm
from fbitrain.loading.pretrained_shape import origins, read_shape
from fbitrain.model.config import BinarizeConfig, ModelConfig, SalientConfig
from fbitrain.model.mixture import MixtureOfScalesLinear
from fbitrain.planning.preflight_data import look_at_data
from fbitrain.releasing.release import release
from tests.checkpoints import complete
from tests.core.test_student import V, batch, gpt2, llama, neox, opt
from tests.core.tiny_teacher import tiny_llama, write_gguf

CPU = torch.device("cpu")
PARTIAL = BinarizeConfig(method="partial", scale="row", beta=False, salient=SalientConfig(fraction=0.2))

BASE = Config(
    data=DataConfig(sources=[SourceConfig(name="a", paths=["a.jsonl"])], seq_len=8),
    distill=DistillConfig(teacher="a/teacher"),
    optim=OptimConfig(warmup_steps=0),
    train=TrainConfig(micro_batch_size=1, global_batch_tokens=8),
)


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    return saved(llama, tmp_path / "llama")


def saved(make: Any, folder: Path) -> Path:
    torch.manual_seed(4)
    make().save_pretrained(folder)
    return folder


def config_for(pretrained: Path, binarize: BinarizeConfig | None = None) -> Config:
    model = ModelConfig(pretrained=str(pretrained))
    return replace(BASE, model=model, binarize=binarize or BinarizeConfig())


def start(config: Config) -> PreTrainedModel:
    return fine_tuned_student(config, None, None, CPU)[0].eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    result: Tensor = model.eval()(input_ids=batch(2)).logits
    return result


def write_checkpoint(run: Path, lm: PreTrainedModel, config: Config) -> Path:
    """The folder that one rank writes, by the format's description and not by the engine."""
    folder = run / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    parameters = {name: parameter.detach() for name, parameter in lm.named_parameters()}
    persistent = lm.state_dict().keys()
    buffers = {name: buffer for name, buffer in lm.named_buffers() if name in persistent}
    write_named(
        folder / "shard_rank00000.safetensors", [(f"weight|{n}|0", p.reshape(-1)) for n, p in parameters.items()]
    )
    if buffers:
        write_named(folder / FIXED, sorted(buffers.items(), key=lambda named: -named[1].element_size()))
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    trainer = {"step": 3, "tokens": 9, "world_size": 1, "shapes": shapes}
    (folder / "trainer.json").write_text(json.dumps(trainer))
    (folder / LM_CONFIG).write_text(lm.config.to_json_string(use_diff=False))
    for place in (folder, run):
        (place / "config.yaml").write_text(to_yaml(config))
    complete(folder)
    return folder


# What it starts from


@pytest.mark.parametrize("make", [llama, gpt2, neox, opt])
def test_any_architecture_of_linears_becomes_binary(make: Any, tmp_path: Path) -> None:
    lm, report = fine_tuned_student(config_for(saved(make, tmp_path / "model")), None, None, CPU)
    assert lm.training
    assert "lm_head" not in report.binarized
    assert len(report.binarized) >= 8
    with torch.no_grad():
        assert not torch.equal(logits(lm), AutoModelForCausalLM.from_pretrained(tmp_path / "model")(batch(2)).logits)
    assert not any(module.p for module in lm.modules() if isinstance(module, torch.nn.Dropout))
    if lm.config.tie_word_embeddings:
        assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=24, state_size=4, num_hidden_layers=2))


def test_a_weight_that_its_surroundings_read_must_be_skipped(tmp_path: Path) -> None:
    """Mamba multiplies with dt_proj.weight itself."""
    folder = saved(mamba, tmp_path / "mamba")
    said = r"the weight of backbone.layers.0.mixer.dt_proj is read by the module around it.*add 'dt_proj' to binarize"
    with pytest.raises(UserError, match=said):
        start(config_for(folder))
    lm, report = fine_tuned_student(config_for(folder, BinarizeConfig(skip=["lm_head", "dt_proj"])), None, None, CPU)
    assert {name.rpartition(".")[2] for name in report.binarized} == {"in_proj", "x_proj", "out_proj"}
    assert lm.training


def test_routers_are_drawn_by_the_seed_and_nothing_else(llama_folder: Path) -> None:
    config = config_for(llama_folder, BinarizeConfig(method="mixture_of_scales", n_experts=2))
    first = start(config)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = start(config)
    assert torch.equal(torch.get_rng_state(), state)
    routers = [[m.router for m in lm.modules() if isinstance(m, MixtureOfScalesLinear)] for lm in (first, again)]
    assert len(routers[0]) == 3 * 7
    assert all(torch.equal(a, b) for a, b in zip(*routers, strict=True))


def test_a_binary_run_of_ours_goes_on_as_it_was(llama_folder: Path, tmp_path: Path) -> None:
    for how in (BinarizeConfig(), PARTIAL):
        config = config_for(llama_folder, how)
        lm = start(config)
        with torch.no_grad():
            lm.model.layers[0].mlp.up_proj.weight.neg_()
        run = tmp_path / how.method
        write_checkpoint(run, lm, config)
        wanted = logits(lm)
        for name in (run, run / "checkpoints" / "step_00000003"):
            assert torch.equal(logits(start(config_for(name, how))), wanted)
        said = f"is binary already .binarize.method={how.method}. and is continued .* binarize.method is '{how.method}'"
        with pytest.raises(UserError, match=said):
            start(config_for(run, BinarizeConfig(method="onebit")))


def test_only_settings_that_the_method_reads_must_be_those_of_the_run(llama_folder: Path, tmp_path: Path) -> None:
    for how in (BinarizeConfig(), PARTIAL):
        config = config_for(llama_folder, how)
        run = tmp_path / how.method
        write_checkpoint(run, start(config), config)
        start(config_for(run, replace(how, n_experts=7, group_size=64)))
        with pytest.raises(UserError, match=r"binarize\.ste is 'identity' there and 'clip' here"):
            start(config_for(run, replace(how, ste="clip")))
        by_hessian = replace(how, salient=replace(how.salient, criterion="hessian"))
        if how is PARTIAL:
            with pytest.raises(UserError, match=r"salient\.criterion is 'magnitude' there and 'hessian' here"):
                start(config_for(run, by_hessian))
        else:
            start(config_for(run, by_hessian))


def test_a_full_precision_run_of_ours_is_binarized(llama_folder: Path, tmp_path: Path) -> None:
    twin = config_for(llama_folder, BinarizeConfig(enabled=False))
    lm = start(twin)
    write_checkpoint(tmp_path / "twin", lm, twin)
    assert torch.equal(logits(start(config_for(tmp_path / "twin"))), logits(start(config_for(llama_folder))))


def test_what_cannot_be_started_from_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "config.json").write_text('{"model_type": "fbitrain_llama"}')
    (tmp_path / "several" / "dense").mkdir(parents=True)
    (tmp_path / "several" / "dense" / "config.json").write_text("{}")
    (tmp_path / "untrained" / "checkpoints").mkdir(parents=True)
    (tmp_path / "untrained" / "config.yaml").write_text("model: {}")
    (tmp_path / "broken.gguf").write_bytes(b"nothing")
    for name, sentence in (
        ("empty", "holds no model: it has neither a config.json nor checkpoints"),
        ("packed", "is a packed release, which holds signs and no latent weights"),
        ("several", "holds several forms of a model; name .*several/dense"),
        ("broken.gguf", "is damaged, or not a GGUF file"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            read_shape(str(tmp_path / name))
    with pytest.raises(UserError, match="is a run without a complete checkpoint"):
        start(config_for(tmp_path / "untrained"))


def test_sizes_are_read_before_a_model_is_loaded(tmp_path: Path, llama_folder: Path, workspace: Any) -> None:
    sizes = {"vocab_size": V, "n_heads": 2, "d_model": 24}
    assert read_shape(str(llama_folder)).items() >= {**sizes, "n_layers": 3, "d_ff": 20}.items()
    assert read_shape(str(saved(gpt2, tmp_path / "gpt2"))).items() >= {**sizes, "max_seq_len": 16, "d_ff": 96}.items()
    write_gguf(tmp_path / "tiny.gguf", tiny_llama(tied=True))
    shape = {"vocab_size": 300, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "d_model": 32, "d_ff": 48}
    assert read_shape(str(tmp_path / "tiny.gguf")) == {**shape, "max_seq_len": 64}
    assert read_shape("somebody/some-model") == {}
    text = workspace.config.read_text().replace("model: {", f"model: {{pretrained: {tmp_path / 'gpt2'}, ")
    (tmp_path / "contradiction.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"model.d_model=60 contradicts model.pretrained=.*, whose d_model is 24"):
        load_config(tmp_path / "contradiction.yaml")


def test_sizes_that_were_unknown_are_filled_in_and_checked(llama_folder: Path) -> None:
    unknown = ModelConfig(pretrained=str(llama_folder), vocab_size=0, n_layers=0, d_model=0, max_seq_len=0)
    config = with_known_sizes(replace(config_for(llama_folder), model=unknown), 1)
    assert (config.model.vocab_size, config.model.n_layers) == (V, 3)
    with pytest.raises(ConfigError, match=r"data.seq_len=4096 is longer than model.max_seq_len=2048"):
        with_known_sizes(replace(config, model=unknown, data=replace(config.data, seq_len=4096)), 1)


# Calibration


def test_calibration_is_drawn_from_the_sources_or_read_from_a_file(workspace: Any, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(workspace.teacher)
    config = load_config(workspace.config)
    config = replace(config, calibration=CalibrationConfig(n_sequences=3, seq_len=8))
    ids = calibration_ids(config, load_tokenizer(workspace.teacher))
    assert (ids.shape, ids.dtype) == ((3, 8), torch.int64)
    with TokenLoader(replace(config.data, seq_len=8, n_lanes=1), load_tokenizer(workspace.teacher), 0, 1, 3) as loader:
        assert torch.equal(ids, next(loader)[:, :-1])
    long = replace(config, calibration=CalibrationConfig(n_sequences=10_000, seq_len=60))
    with pytest.raises(UserError, match=r"asks for 10000 sequences of 60 tokens, but source '.*' ends in sequence"):
        calibration_ids(long, load_tokenizer(workspace.teacher))
    text = "the model learns one bit per weight " * 9
    (tmp_path / "text.txt").write_text(text)
    config = replace(config, calibration=replace(config.calibration, path=str(tmp_path / "text.txt")))
    for add_bos, before in ((True, [0]), (False, [])):
        config = replace(config, data=replace(config.data, add_bos=add_bos))
        ids = calibration_ids(config, load_tokenizer(workspace.teacher))
        assert ids.shape == (3, 8)
        assert ids.flatten().tolist() == [*before, *tokenizer.encode(text)][:24]


def test_text_is_needed_where_it_decides_something(llama_folder: Path) -> None:
    def needed(criterion: str, **calibration: bool) -> bool:
        binarize = replace(PARTIAL, salient=replace(PARTIAL.salient, criterion=criterion))
        return needs_text(replace(config_for(llama_folder, binarize), calibration=CalibrationConfig(**calibration)))

    assert needed("hessian")
    assert needed("fisher", ptq=True, feedback=False)
    assert needed("magnitude", ptq=True)
    assert not needed("magnitude")
    assert not needed("magnitude", ptq=True, feedback=False)


def test_ptq_without_feedback_asks_for_no_text(llama_folder: Path) -> None:
    config = replace(config_for(llama_folder, PARTIAL), calibration=CalibrationConfig(ptq=True, feedback=False))
    lm, report = fine_tuned_student(config, None, None, CPU)
    assert len(report.binarized) == 3 * 7
    assert not torch.equal(logits(lm), logits(start(replace(config, binarize=BinarizeConfig(enabled=False)))))


def test_calibration_text_is_looked_for_before_a_model_is_loaded(
    workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binarize = replace(PARTIAL, salient=replace(PARTIAL.salient, criterion="hessian"))
    config = replace(load_config(workspace.config), binarize=binarize)
    config = replace(config, model=replace(config.model, pretrained=str(workspace.teacher)))
    (tmp_path / "short.txt").write_text("too short")
    monkeypatch.setattr(build, "agreed", lambda work: work())
    monkeypatch.setattr(build, "choose_checkpoint", lambda _: None)
    monkeypatch.setattr(build, "build_teacher", lambda _: pytest.fail("the teacher was loaded first"))
    for name, said in (
        ("nowhere.txt", "nowhere.txt"),
        ("short.txt", "128 sequences of 24 tokens, but .*short"),
    ):
        run = RunConfig(name=f"with {name}", dir=str(tmp_path))
        wrong = replace(config, calibration=CalibrationConfig(path=str(tmp_path / name)), run=run)
        with pytest.raises(UserError, match=said):
            build.build(wrong, 0, 1)
        _, problems = look_at_data(wrong, load_tokenizer(workspace.teacher), world_size=1, ranks_here=1)
        assert re.search(said, "".join(problems))


# Releases


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_a_fine_tuned_run_is_released_in_its_own_architecture(make: Any, tmp_path: Path, workspace: Any) -> None:
    config = config_for(saved(make, tmp_path / "model"), PARTIAL)
    config = replace(config, distill=DistillConfig(teacher=str(workspace.teacher)))
    lm = start(config)
    write_checkpoint(tmp_path / "run", lm, config)
    release(tmp_path / "run", tmp_path / "out", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense")
    assert type(dense) is type(lm)
    packed = load_lm(tmp_path / "out" / "packed", torch.float32)
    for model in (dense, packed):
        torch.testing.assert_close(logits(model), logits(lm), rtol=1e-4, atol=1e-5)
    assert "PB-LLM" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("binarize", "reason"),
    [
        (BinarizeConfig(method="mixture_of_scales"), "mixes its scales anew for every token"),
        (BinarizeConfig(method="onebit", output_norm=True), "norms every product"),
    ],
)
def test_what_has_no_fixed_weights_is_released_packed_only(
    workspace: Any, tmp_path: Path, binarize: BinarizeConfig, reason: str
) -> None:
    config = config_for(workspace.teacher, binarize)
    config = replace(config, distill=DistillConfig(teacher=str(workspace.teacher)))
    lm = start(config)
    write_checkpoint(tmp_path / "run", lm, config)
    with pytest.raises(UserError, match=rf"{reason} .* release it as packed only"):
        release(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    release(tmp_path / "run", tmp_path / "out", ["packed"], dtype="float32")
    torch.testing.assert_close(
        logits(load_lm(tmp_path / "out" / "packed", torch.float32)), logits(lm), rtol=1e-4, atol=1e-5
    )


def test_a_loaded_model_has_no_dropout(tmp_path: Path) -> None:
    loaded = load_language_model(saved(gpt2, tmp_path / "gpt2"), torch.float32).train()
    ids = batch(2)
    assert torch.equal(loaded(ids).logits, loaded(ids).logits)


def test_a_checkpoint_that_is_named_from_within_its_run_has_the_runs_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run" / "tokenizer").mkdir()
    (checkpoint / "COMPLETE.json").write_text("{}")
    (checkpoint / "config.yaml").write_text("distill: {teacher: t}\ndata: {tokenizer: gone}\n")
    monkeypatch.chdir(checkpoint.parent)
    assert origins("step_00000004") == ("t", str(tmp_path / "run" / "tokenizer"))
