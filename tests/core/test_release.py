"""From a run to folders that load elsewhere: contents, replacement, refusals, tokenizers, the model card."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.commands import release as command
from fbitrain.commands.verbs import call
from fbitrain.config import CalibrationConfig, Config, load_config, to_yaml
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.loading.model_folder import load_lm, open_model
from fbitrain.loading.pretrained_shape import kept_tokenizer
from fbitrain.loading.tokenizer_folder import PROBES, keep_tokenizer, write_tokenizer
from fbitrain.model.build import build_student, llama_config
from fbitrain.model.config import BinarizeConfig, SalientConfig
from fbitrain.model.hf import ReleasedModel
from fbitrain.releasing import release as release_module
from fbitrain.releasing.model_card import Storage, Training, heldout_metrics, model_card
from fbitrain.releasing.release import UNLABELED, release, replacing_release
from tests.checkpoints import complete

LLAMA_TOKENIZER = Path(__file__).parents[2].parent / "shared" / "data" / "tokenizer" / "llama.model"


@pytest.fixture(scope="module")
def config(workspace: Any) -> Config:
    loaded = load_config(workspace.config)
    return replace(loaded, model=replace(loaded.model, rope_theta=5000.0))


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    """As after training: every sign and scale differs from the start."""
    student, _ = build_student(config.model, config.binarize, seed=1)
    generator = torch.Generator().manual_seed(2)
    return {
        name: tensor + 0.02 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in student.state_dict().items()
    }


@pytest.fixture
def run_dir(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one checkpoint at step 4 whose weights come from memory."""
    return make_run(tmp_path / "run", config, weights_of(config), monkeypatch)


def make_run(run: Path, config: Config, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    checkpoint = run / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text(to_yaml(config))
    (checkpoint / "trainer.json").write_text(json.dumps({"step": 4, "tokens": 768, "world_size": 2}))
    complete(checkpoint)
    lines = [{"step": 0, "heldout/perplexity": 999.0}, {"step": 3, "train/loss": 5.0}]
    lines += [{"step": s, "heldout/perplexity": 100.0 - s, "heldout/bits_per_byte": 2.0} for s in (3, 6)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "hel')
    monkeypatch.setattr(release_module, "load_weights", lambda folder: dict(weights))
    return run


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(2, 26).view(2, 12)).logits


def test_a_release_computes_what_was_trained(run_dir: Path, tmp_path: Path, config: Config) -> None:
    assert release(run_dir, tmp_path / "out").name == "step_00000004"
    student, _ = build_student(config.model, config.binarize, seed=0)
    student.load_state_dict(weights_of(config))
    dense, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "dense", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    packed = load_lm(tmp_path / "out" / "packed", torch.float32)
    torch.testing.assert_close(logits(dense), logits(student), atol=5e-3, rtol=0)
    torch.testing.assert_close(logits(packed), logits(dense), atol=1e-4, rtol=0)


def test_what_lies_in_the_folders(run_dir: Path, tmp_path: Path, workspace: Any) -> None:
    out = tmp_path / "deep" / "out"
    release(run_dir, out)
    code = ["remote_code.py", "remote_layers.py"]
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "dense", "packed", *code]
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    dense, packed = (json.loads((out / name / "config.json").read_text()) for name in ("dense", "packed"))
    assert dense["architectures"] == ["LlamaForCausalLM"]
    assert dense["dtype"] == packed["dtype"] == "float16"
    assert "auto_map" not in dense
    assert packed["model_type"] == "fbitrain_llama"
    assert packed["auto_map"]["AutoModelForCausalLM"] == "remote_code.BinaryLlamaForCausalLM"
    for values in (dense, packed):
        assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 5000.0
    kinds = {name.rpartition(".")[2]: t.dtype for name, t in load_file(out / "packed" / "model.safetensors").items()}
    assert kinds == {"weight": torch.float16, "weight_bits": torch.int32, "alpha": torch.float32, "beta": torch.float32}
    assert all(t.dtype == torch.float16 for t in load_file(out / "dense" / "model.safetensors").values())
    for name in ("dense", "packed"):
        assert (out / name / "model.safetensors").stat().st_mode & 0o777 == 0o644
        tokenizer = AutoTokenizer.from_pretrained(out / name)
        text = "the model learns  one bit\n"
        assert tokenizer(text, add_special_tokens=False).input_ids == load_tokenizer(workspace.teacher).encode(text)
        assert tokenizer(text).input_ids == [0, *tokenizer(text, add_special_tokens=False).input_ids]
        generation = GenerationConfig.from_pretrained(out / name)
        assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)


def test_the_levels_of_a_layer_are_two_in_fp16(run_dir: Path, tmp_path: Path) -> None:
    release(run_dir, tmp_path / "out", ["dense"])
    weight = load_file(tmp_path / "out" / "dense" / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert all(len(column.unique()) == 2 for column in weight.unbind(1))
    assert len(weight.unique()) > 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_dtypes(run_dir: Path, tmp_path: Path, dtype: str) -> None:
    release(run_dir, tmp_path / "out", dtype=dtype)
    packed = logits(load_lm(tmp_path / "out" / "packed", torch.float32))
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "dense")
    assert dense.dtype == getattr(torch, dtype)
    torch.testing.assert_close(packed, logits(dense.float()), atol=1e-4, rtol=0)


def test_tied_embeddings_are_stored_once(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = replace(config, model=replace(config.model, tie_embeddings=True))
    weights = weights_of(tied)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    release(make_run(tmp_path / "run", tied, weights, monkeypatch), tmp_path / "out")
    for name in ("dense", "packed"):
        assert "lm_head.weight" not in load_file(tmp_path / "out" / name / "model.safetensors")
        model = load_lm(tmp_path / "out" / name, torch.float32)
        assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"].half().float())


def test_a_full_precision_run_has_no_packed_form(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = replace(config, binarize=replace(config.binarize, enabled=False))
    run = make_run(tmp_path / "run", plain, weights_of(plain), monkeypatch)
    with pytest.raises(UserError, match="dense only"):
        release(run, tmp_path / "out")
    release(run, tmp_path / "out", ["dense"])
    assert "full-precision" in (tmp_path / "out" / "README.md").read_text()


def test_gguf_is_a_format_like_the_others(run_dir: Path, tmp_path: Path, config: Config) -> None:
    out = tmp_path / "out"
    release(run_dir, out, ["gguf"])
    release(run_dir, out, ["dense", "gguf"])
    assert sorted(path.name for path in (out / "gguf").iterdir()) == ["README.md", f"{config.run.name}-F16.gguf"]
    with open_model(out / "gguf" / f"{config.run.name}-F16.gguf") as model:
        torch.testing.assert_close(logits(model.lm), logits(load_lm(out / "dense", torch.float32)), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="float16, not float32"):
        release(run_dir, out, ["gguf"], "float32")


def test_requests_that_cannot_be_met(run_dir: Path, tmp_path: Path) -> None:
    for formats, dtype, words in (
        (["onnx"], "float16", "dense, packed"),
        (["dense"], "int8", "float16"),
        ([], "float16", "dense"),
    ):
        with pytest.raises(UserError, match=words):
            release(run_dir, tmp_path / "out", formats, dtype)
    with pytest.raises(UserError, match="no complete checkpoint"):
        release(tmp_path / "nowhere", tmp_path / "out")
    (run_dir / "checkpoints" / "step_00000004" / "COMPLETE.json").unlink()
    with pytest.raises(UserError, match="no complete checkpoint"):
        release(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_beyond_the_dtype_are_refused(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = weights_of(config)
    weights["model.layers.0.mlp.up_proj.alpha"][0, 3] = 1e5
    run = make_run(tmp_path / "run", config, weights, monkeypatch)
    with pytest.raises(UserError, match=r"up_proj.* not finite in float16; choose dtype float32"):
        release(run, tmp_path / "out")
    release(run, tmp_path / "out", dtype="bfloat16")


def test_an_older_release_is_replaced_and_other_files_are_kept(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    release(run_dir, out)
    (out / "eval.json").write_text("{}")
    release(run_dir / "checkpoints" / "step_00000004", out, ["dense"], "float32")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "dense", "eval.json"]
    assert json.loads((out / "dense" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("content", ["file", "notes", "folder"])
def test_what_is_not_a_release_is_not_touched(run_dir: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "out"
    if content == "file":
        out.write_text("mine")
    elif content == "notes":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    else:
        release(run_dir, out)
        (out / "papers").mkdir()
    with pytest.raises(UserError, match="not a release"):
        release(run_dir, out)
    assert out.is_file() or any(path.name in ("notes.txt", "papers") for path in out.iterdir())


def test_a_failure_leaves_the_older_release_and_nothing_else(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    release(run_dir, out, ["dense"])
    with pytest.raises(UserError, match="disk is full"), replacing_release(out):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ZeroDivisionError), replacing_release(out):
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]
    assert load_lm(out / "dense", torch.float32) is not None


def test_a_crash_between_the_renames_is_mended(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    release(run_dir, out, ["dense"])
    out.rename(tmp_path / ".out.old")
    with pytest.raises(ZeroDivisionError), replacing_release(out):
        raise ZeroDivisionError
    assert (out / "dense" / "config.json").is_file()


def test_storage_counts_the_bytes_that_are_stored(run_dir: Path, tmp_path: Path, config: Config) -> None:
    release(run_dir, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "packed" / "model.safetensors")
    weights = weights_of(config)
    storage = Storage.of(ReleasedModel.of(llama_config(config.model), config.binarize, weights, torch.float16))
    assert storage.binary_bits + storage.other_bits == 8 * sum(tensor.nbytes for tensor in stored.values())
    # Four 60 × 60, two 92 × 60 and one 60 × 92 matrices per layer, two layers; 60 bits take 2 words, 92 take 3.
    assert storage.binary_weights == 2 * (4 * 3600 + 3 * 5520)
    words = 2 * (4 * 60 * 2 + 2 * 92 * 2 + 60 * 3)
    scales = 2 * 2 * (4 * 60 + 2 * 60 + 92)
    assert storage.binary_bits == 32 * (words + scales)
    assert storage.parts == {"weight_bits": 32 * words, "alpha": 16 * scales, "beta": 16 * scales}
    listed = json.loads((tmp_path / "out" / "packed" / "config.json").read_text())["bits_per_weight"]
    assert listed == storage.bits_per_binary_weight


def test_the_model_card_tells_what_was_done(run_dir: Path, tmp_path: Path, workspace: Any) -> None:
    release(run_dir, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "\nlicense: unknown\nlanguage: [en]\n" in card
    for part in ("4 of 6, 768", str(workspace.teacher), "| perplexity | 97 |", "| bits_per_byte | 2 |", "per column"):
        assert part in card, part
    assert "trust_remote_code=True" in card


@pytest.mark.parametrize(
    ("binarize", "words"),
    [
        (
            BinarizeConfig(method="partial", scale="row"),
            "0.1 of the weights, by magnitude per layer, in int8",
        ),
        (BinarizeConfig(method="cherry", bits=3, scale="group"), "the rest 8 levels, one scale per group of 128"),
        (BinarizeConfig(method="mixture_of_scales"), "4 pairs of input and output scales"),
        (BinarizeConfig(method="recu"), "per row"),
        (BinarizeConfig(method="ternary"), "not the rounding of activations"),
    ],
    ids=lambda value: value.method if isinstance(value, BinarizeConfig) else "",
)
def test_the_card_describes_every_kind_of_method(config: Config, binarize: BinarizeConfig, words: str) -> None:
    storage = Storage(100, 150, 50, 800, {"weight_bits": 100, "alpha": 50})
    fine_tuned = replace(config, binarize=binarize, model=replace(config.model, pretrained="some/model"))
    files = {"dense": "dense", "packed": "packed", "gguf": "gguf/NAME-F16.gguf"}
    card = model_card(fine_tuned, Training(1, 2), storage, files, "float16", "gpt2", UNLABELED)
    for part in (words, binarize.traits.paper, "fine-tuned from some/model", 'register("gpt2")', "llama.cpp"):
        assert part in card, part
    assert "1.500 bits each, scales included\n(weight_bits 1.000, alpha 0.500)" in card


def test_the_card_claims_only_the_calibration_of_this_run(config: Config, tmp_path: Path) -> None:
    def row(pretrained: str, criterion: str = "hessian", **calibration: bool) -> str:
        how = BinarizeConfig(method="partial", scale="row", salient=SalientConfig(criterion=criterion))
        model, data = replace(config.model, pretrained=pretrained), replace(config.data, seq_len=24)
        looked_at = CalibrationConfig(n_sequences=7, **calibration)
        fine_tuned = replace(config, binarize=how, model=model, data=data, calibration=looked_at)
        card = model_card(fine_tuned, Training(1, 2), None, {"packed": "packed"}, "float16", "gpt2", UNLABELED)
        return "".join(line.removeprefix("| calibration ") for line in card.splitlines() if "| calibration " in line)

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("binarize: {enabled: true}")
    assert row(str(tmp_path)) == f"| none by this run; it has the salient weights that {tmp_path} was given |"
    assert row("some/model") == "| 7 sequences of 24 tokens |"
    assert row("some/model", ptq=True) == "| GPTQ-PB on 7 sequences of 24 tokens |"
    assert row("some/model", ptq=True, feedback=False) == "| GPTQ-PB without feedback on 7 sequences of 24 tokens |"
    assert row("some/model", "magnitude", ptq=True, feedback=False) == "| GPTQ-PB without feedback |"
    assert row("some/model", "magnitude") == ""


def test_heldout_figures_are_the_newest_up_to_the_step(run_dir: Path) -> None:
    assert heldout_metrics(run_dir, 2) == {"heldout/perplexity": 999.0}
    assert heldout_metrics(run_dir, 6) == {"heldout/perplexity": 94.0, "heldout/bits_per_byte": 2.0}
    assert heldout_metrics(run_dir / "absent", 6) == {}


def test_a_tokenizer_that_is_one_file_becomes_a_folder(tmp_path: Path, workspace: Any) -> None:
    (tmp_path / "bare").mkdir()
    original = tmp_path / "bare" / "tokenizer.json"
    original.write_bytes((workspace.teacher / "tokenizer.json").read_bytes())
    (tmp_path / "out").mkdir()
    trained = load_tokenizer(original)
    write_tokenizer(trained, tmp_path / "out", add_bos=True, max_length=64)
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert all(read.encode(text, add_special_tokens=False) == trained.encode(text) for text in PROBES)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("kind", ["a folder", "a bare file", "specials elsewhere", "a SentencePiece model"])
def test_a_run_keeps_its_tokenizer(kind: str, tmp_path: Path, workspace: Any) -> None:
    original = tmp_path / "original"
    shutil.copytree(workspace.teacher, original)
    if kind == "a bare file":
        original = original / "tokenizer.json"
    elif kind == "specials elsewhere":
        for name in ("tokenizer_config.json", "special_tokens_map.json"):
            (original / name).unlink(missing_ok=True)
        (original / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2}')
    elif kind == "a SentencePiece model":
        original = tmp_path / "small.model"
        texts = tmp_path / "text.jsonl"
        texts.write_text("\n".join(json.dumps({"text": f"kato misen {i} sola"}) for i in range(400)))
        assert call(["data", "train-tokenizer", "--vocab-size", "280", "--out", str(original), str(texts)]) == 0
    trained = load_tokenizer(original)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    assert kept_tokenizer(run_dir) == ""
    for _ in range(2):  # the second finds it there
        keep_tokenizer(trained, run_dir)
        kept = load_tokenizer(kept_tokenizer(run_dir))
        assert (kept.fingerprint, kept.bos_id, kept.eos_id) == (trained.fingerprint, trained.bos_id, trained.eos_id)
        assert [path.name for path in run_dir.iterdir()] == ["tokenizer"]
    for path in (run_dir / "tokenizer").iterdir():
        path.write_text("damaged")
    keep_tokenizer(trained, run_dir)
    assert load_tokenizer(kept_tokenizer(run_dir)).fingerprint == trained.fingerprint


@pytest.mark.skipif(not LLAMA_TOKENIZER.is_file(), reason=f"{LLAMA_TOKENIZER} is absent")
def test_a_sentencepiece_model_keeps_its_ids(tmp_path: Path) -> None:
    trained = load_tokenizer(LLAMA_TOKENIZER)
    write_tokenizer(trained, tmp_path, add_bos=True, max_length=64)
    read = AutoTokenizer.from_pretrained(tmp_path)
    texts = [" " * n + "x = 1" + "\n" * n + "  two  spaces" for n in range(40)]
    texts += ["<0x41> ▁ \t\tif", "naïve 漢字\u3000字 👩‍🔬", "1,234.5e-6"]
    for text in texts:
        assert read.encode(text, add_special_tokens=False) == trained.encode(text), text
        assert read.decode(trained.encode(text)) == trained.decode(trained.encode(text))
    assert (read.bos_token_id, read.eos_token_id) == (trained.bos_id, trained.eos_id) == (1, 2)


def test_the_command(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(command.main, command.parser(), [str(run_dir), "--format", "packed", "--out", str(out)]) == 0
    assert str(out / "packed") in capsys.readouterr().out
    arguments = [str(tmp_path / "none"), "--out", str(out)]
    assert run(command.main, command.parser(), arguments) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError):
        run(command.main, command.parser(), [*arguments, "--debug"])
