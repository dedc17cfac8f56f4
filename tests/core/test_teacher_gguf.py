"""Teachers from GGUF files: their own logits, and their export to a plain folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from fbitrain.base.errors import UserError
from fbitrain.base.files import sha256_of
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.loading import gguf_export
from fbitrain.loading.gguf_export import export_gguf, is_export_of
from fbitrain.loading.language_model import vocab_size_of
from fbitrain.teacher import load_teacher
from tests.core.tiny_teacher import V, load, tiny_llama, token_ids, write_gguf


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

    def full_disk(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "write_tokenizer", full_disk)
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
