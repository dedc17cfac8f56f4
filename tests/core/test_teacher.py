"""Teachers from folders: their own logits, and what is refused."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

from fbitrain import teacher as teacher_module
from fbitrain.base.errors import UserError
from fbitrain.build import check_vocabularies
from fbitrain.config import load_config
from fbitrain.loading import language_model
from fbitrain.loading.language_model import load_language_model, positions_of, vocab_size_of
from fbitrain.teacher import load_teacher
from fbitrain.train import suspects
from tests.core.tiny_teacher import FF, D, V, load, tiny_llama, token_ids


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LlamaForCausalLM, Path]:
    model = tiny_llama(tied=request.param)
    model.save_pretrained(tmp_path / "teacher")
    return model, tmp_path / "teacher"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tied=False).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_folder_gives_the_models_own_logits(saved: tuple[LlamaForCausalLM, Path]) -> None:
    model, path = saved
    teacher = load(path)
    ids = token_ids()
    with torch.no_grad():
        assert torch.equal(teacher.hidden(ids), model.model(ids).last_hidden_state)
        assert torch.allclose(teacher.logits(ids), model(ids).logits, rtol=1e-5, atol=1e-5)
    assert teacher.hidden(ids).shape == (2, 9, D)
    assert torch.equal(teacher.head_weight, model.lm_head.weight)
    assert teacher.vocab_size == vocab_size_of(path) == V
    assert teacher.n_parameters == sum(p.numel() for p in model.parameters())


def test_the_teacher_is_frozen_and_no_part_of_anything(folder: Path) -> None:
    student = nn.Module()
    student.teacher = teacher = load(folder)  # the mistake that must stay harmless
    body = teacher.body
    assert isinstance(body, nn.Module)
    assert not list(student.parameters())
    assert not student.state_dict()
    assert not any(module.training for module in body.modules())
    assert not any(p.requires_grad for p in body.parameters())
    assert not teacher.head_weight.requires_grad
    assert not teacher.hidden(token_ids()).requires_grad
    student.train()
    assert not any(module.training for module in body.modules())


def test_bf16_rounds_the_weights_but_not_the_rotary_frequencies(folder: Path) -> None:
    teacher = load_teacher(folder, dtype=torch.bfloat16, device="cpu")
    assert isinstance(teacher.body, nn.Module)
    assert {p.dtype for p in teacher.body.parameters()} == {torch.bfloat16}
    assert teacher.head_weight.dtype == torch.bfloat16
    frequencies = {name: b.dtype for name, b in teacher.body.named_buffers() if "inv_freq" in name}
    assert frequencies
    assert set(frequencies.values()) == {torch.float32}


def test_sharding_takes_the_body_and_leaves_a_whole_head(saved: tuple[LlamaForCausalLM, Path]) -> None:
    """A stand-in for ZeRO-3: empties the body's parameters, and fills them only while it is called."""
    _, path = saved

    def shard(body: nn.Module) -> Any:
        whole = copy.deepcopy(body)
        for parameter in body.parameters():
            parameter.data = torch.empty(0)
        return whole

    sharded, replicated = load(path, shard=shard), load(path)
    assert torch.equal(sharded.logits(token_ids()), replicated.logits(token_ids()))
    assert (sharded.vocab_size, sharded.n_parameters) == (V, replicated.n_parameters)


def test_partitioned_parameters_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def partitioned(*args: object, **options: object) -> LlamaForCausalLM:
        model = tiny_llama(tied=False)
        model.lm_head.weight.ds_id = 0  # what ZeRO-3 leaves on a parameter
        return model

    monkeypatch.setattr(teacher_module, "load_language_model", partitioned)
    with pytest.raises(RuntimeError, match="inside a ZeRO-3 context"):
        load(folder)


def test_models_whose_logits_are_more_than_a_product_are_refused(tmp_path: Path) -> None:
    from transformers import GraniteConfig, GraniteForCausalLM, PhiConfig, PhiForCausalLM

    sizes = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": FF,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    biased = PhiForCausalLM(PhiConfig(**sizes, initializer_range=0.3))
    assert not biased.lm_head.bias.any()  # it adds nothing yet, but training would leave it behind
    scaled = GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=8.0))
    for name, model, said in (
        ("biased", biased, "whose output head has a bias"),
        ("scaled", scaled, "which scales, caps or shifts its logits"),
    ):
        model.save_pretrained(tmp_path / name)
        with pytest.raises(UserError, match=f"{said}; it must be a causal language model"):
            load(tmp_path / name)


def test_a_cap_that_two_tokens_do_not_reach_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    for name, cap in (("capped", 1e3), ("plain", None)):  # attention is capped in both
        Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=cap)).save_pretrained(tmp_path / name)
    load(tmp_path / "plain")
    assert vocab_size_of(tmp_path / "plain") == V
    with pytest.raises(UserError, match=r"caps its logits \(final_logit_softcapping in its config.json\)"):
        vocab_size_of(tmp_path / "capped")
    with pytest.raises(UserError, match="caps its logits"):
        load(tmp_path / "capped")
    monkeypatch.setattr(language_model, "soft_cap", lambda _: "")  # a cap under a name that nobody knows
    with pytest.raises(UserError, match="which scales, caps or shifts its logits"):
        load(tmp_path / "capped")


def write_config(folder: Path, **values: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("read", [load, vocab_size_of], ids=["load", "vocab_size"])
def test_wrong_paths_are_one_sentence(read: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "nowhere", "does not exist; name a Hugging Face folder, a hub id or a .gguf file"),
        ("nowhere.gguf", "does not exist"),
        (tmp_path / "notes.txt", "is neither a folder nor a .gguf file"),
        (tmp_path / "empty", "has no config.json"),
        (tmp_path / "broken.gguf", "is damaged, or not a GGUF file"),
        ("nobody/no-such-model", "neither a folder nor a .gguf file here, and cannot be had from the Hugging Face hub"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            read(path)
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_the_vocabulary_is_read_without_running_a_models_code(tmp_path: Path) -> None:
    remote = write_config(tmp_path / "remote", model_type="own", auto_map={"AutoConfig": "own.Own"}, vocab_size=77)
    assert vocab_size_of(remote) == 77
    assert vocab_size_of(write_config(tmp_path / "nested", text_config={"vocab_size": 78})) == 78
    with pytest.raises(UserError, match="has no vocab_size in its config"):
        vocab_size_of(write_config(tmp_path / "nameless", model_type="llama"))


def test_unsuitable_folders_are_one_sentence(folder: Path, tmp_path: Path) -> None:
    remote = write_config(tmp_path / "remote", model_type="own", auto_map={"AutoConfig": "own.Own"})
    for path, message in (
        (
            write_config(tmp_path / "t5", model_type="t5"),
            "unsupported architecture; it must be a causal language model",
        ),
        (write_config(tmp_path / "unknown", model_type="zork"), "unsupported architecture"),
        (remote, "brings its own code; set distill.trust_remote_code=true"),
        (write_config(tmp_path / "weightless", model_type="llama", vocab_size=9), "cannot be loaded"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            load(path)
        assert "\n" not in str(raised.value)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its tensors, among them model.layers.1.mlp.up_proj.weight"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"not a safetensors file at all")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)


def test_positions_are_read_from_any_architectures_config(tmp_path: Path) -> None:
    from tests.core.tiny_teacher import write_gguf

    for i, (values, positions) in enumerate(
        (
            ({"model_type": "llama", "max_position_embeddings": 96}, 96),
            ({"model_type": "llama"}, 2048),  # the architecture's default
            ({"model_type": "gpt2", "n_positions": 32}, 32),
            ({"model_type": "gpt2"}, 1024),
            ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 40}}, 40),
            ({"model_type": "mamba"}, None),
            ({"model_type": "own", "max_position_embeddings": 7}, 7),
        )
    ):
        assert positions_of(write_config(tmp_path / str(i), **values)) == positions, values
    write_gguf(tmp_path / "model.gguf", tiny_llama(tied=True))
    assert positions_of(tmp_path / "model.gguf") == 64


@pytest.mark.parametrize("key", ["distill.teacher", "model.pretrained"])
def test_sequences_beyond_a_models_positions_are_refused(tmp_path: Path, workspace: Any, key: str) -> None:
    """Before anything is loaded; GPT-2 and OPT would end in an IndexError, a Llama be trained out of its range."""
    text = workspace.config.read_text()
    if key == "model.pretrained":
        text = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(("model:", "distill:")))
    (tmp_path / "run.yaml").write_text(text)
    shutil.copytree(workspace.teacher, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    for positions, said in ((16, "data.seq_len=24 is (more|longer) than"), (24, "")):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**values, "max_position_embeddings": positions}))
        try:
            check_vocabularies(load_config(tmp_path / "run.yaml", [f"{key}={tmp_path}/model"]), None)
            message = ""
        except UserError as error:
            message = str(error)
        assert re.search(said, message) if said else not message
    values = {name: value for name, value in values.items() if name != "max_position_embeddings"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(values))
    longer = ["data.seq_len=4096", "train.global_batch_tokens=4096", "eval.max_tokens=4096", "model.max_seq_len=8192"]
    longer = longer if key == "distill.teacher" else longer[:-1]
    with pytest.raises(UserError, match=r"data.seq_len=4096 is more than the 2048 positions of .*model"):
        check_vocabularies(load_config(tmp_path / "run.yaml", [f"{key}={tmp_path}/model", *longer]), None)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(folder: Path, name: str, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name].view(-1)[-1] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"teacher .* has a weight in {name} that is not finite in float32; get it"):
        load(folder)
    with pytest.raises(UserError, match=rf"^model.pretrained .* {name} that is not finite"):
        load_language_model(folder, torch.float32, role="model.pretrained")


def test_what_overflows_in_the_runs_precision_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] = torch.finfo(torch.float32).max
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    load_language_model(folder, torch.float32)
    with pytest.raises(UserError, match=r"lm_head.weight that is not finite in bfloat16"):
        load_teacher(folder, dtype=torch.bfloat16, device="cpu")


def test_at_the_first_step_the_learning_rate_is_no_suspect(workspace: Any) -> None:
    config = load_config(workspace.config)
    first = suspects(config, 1)
    assert f"the teacher {workspace.teacher}" in first
    assert "model.init_std" in first
    assert "optim.lr" not in first
    assert suspects(config, 2).startswith("lower optim.lr or check the data")
    alone = load_config(workspace.config, ["distill.kd_weight=0", "distill.ce_weight=1"])
    assert "teacher" not in suspects(alone, 1)
