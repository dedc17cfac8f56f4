"""The doctor: what it prints, and that its exit code tells whether a run can work here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import psutil
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from fbitrain import environment
from fbitrain.base.command import run
from fbitrain.commands import doctor
from fbitrain.config import load_config
from fbitrain.model.size import count_parameters
from fbitrain.planning import preflight
from tests.checkpoints import complete

ROOT = Path(__file__).parents[2]
CONFIG = """
run: {{dir: {folder}/runs, name: tiny}}
model: {{vocab_size: 16, n_layers: 2, n_heads: 2, d_model: 8, d_ff: 12, max_seq_len: 64}}
distill: {{teacher: {folder}/teacher}}
data:
  seq_len: 16
  sources: [{{name: code, paths: [{folder}/code]}}]
  heldout: [{folder}/heldout.txt]
optim: {{warmup_steps: 0}}
train: {{micro_batch_size: 2, global_batch_tokens: 256, total_steps: 10}}
eval: {{max_tokens: 64}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's inputs, whole: a config, a tiny teacher with its tokenizer, one shard, held-out text."""
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 16, "hidden_size": 4}
    (teacher / "config.json").write_text(json.dumps(config))
    save_file({"model.embed_tokens.weight": torch.zeros(16, 4)}, teacher / "model.safetensors")
    vocabulary = {character: i for i, character in enumerate("abcdefghijklmn")} | {"<s>": 14, "</s>": 15}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(teacher / "tokenizer.json"))
    (teacher / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "00.jsonl").write_text('{"text": "abc"}\n')
    (tmp_path / "heldout.txt").write_text("abc" * 40)
    (tmp_path / "tiny.yaml").write_text(CONFIG.format(folder=tmp_path))
    return tmp_path


def examine(folder: Path, *arguments: str) -> int:
    return run(doctor.main, doctor.parser(), ["--config", str(folder / "tiny.yaml"), *arguments])


def test_without_a_config_it_describes_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(doctor.main, doctor.parser(), []) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert environment.processor() in out
    for op in ("pack_signs", "unpack_signs", "xnor_gemm", "binary_linear"):
        assert f"{op}: " in out
    for label in ("versions", "devices", "compilers", "kernels", "memory", "disk"):
        assert any(line.startswith(label) for line in out.splitlines()), label


@pytest.mark.parametrize("known", [True, False])
def test_fine_tuning_is_added_up_from_the_pretrained_model(
    folder: Path, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 64}
    teacher_config = json.loads((folder / "teacher" / "config.json").read_text())
    (folder / "teacher" / "config.json").write_text(json.dumps(teacher_config | (sizes if known else {})))
    text = (folder / "tiny.yaml").read_text().splitlines()
    text = [f"model: {{pretrained: {folder}/teacher}}" if line.startswith("model:") else line for line in text]
    (folder / "tiny.yaml").write_text("\n".join(text))
    overrides = ("binarize.method=onebit", "distill.kd_weight=0", "distill.ce_weight=1", "train.frozen=[norms]")
    assert examine(folder, *overrides) == 0
    out = capsys.readouterr().out
    width = teacher_config["hidden_size"]
    assert (f"{min(64, 5 * width)} of them frozen (norms)" in out) == known
    assert f"{folder}/teacher, binarize.method=onebit" in out
    assert "64 parameters" in out
    assert ("per rank" in out) == known


def test_continuing_a_run_is_added_up_from_its_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = folder / "earlier" / "checkpoints" / "step_00000003"
    checkpoint.mkdir(parents=True)
    for place in (checkpoint, folder / "earlier"):
        (place / "config.yaml").write_text((folder / "tiny.yaml").read_text())
    text = (folder / "tiny.yaml").read_text().splitlines()
    text = [f"model: {{pretrained: {folder}/earlier}}" if line.startswith("model:") else line for line in text]
    (folder / "tiny.yaml").write_text("\n".join(text))
    assert examine(folder) == 1
    assert "is a run without a complete checkpoint; train it first" in capsys.readouterr().err
    (checkpoint / "trainer.json").write_text(json.dumps({"shapes": {"a": [3, 5], "b": [7]}}))
    complete(checkpoint)
    examine(folder)
    assert "22 parameters" in capsys.readouterr().out
    for damaged in ('{"shapes": {"a": [3,', '{"step": 3}', "[]"):
        (checkpoint / "trainer.json").write_text(damaged)
        assert examine(folder) == 1
        assert f"{checkpoint} is damaged: trainer.json " in capsys.readouterr().err


def test_a_run_that_fits_is_added_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(folder, "--world-size", "4", "engine.precision=fp32") == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    config = load_config(folder / "tiny.yaml")
    count = count_parameters(config.model, config.binarize)
    assert f"{count.total:,} parameters: {count.binary:,} binary" in captured.out
    assert f"{count.bits_per_weight:.3f} bits per binary weight" in captured.out
    assert "256 per step = 4 ranks × 2 sequences × 16 tokens × 2 grad_accum_steps" in captured.out
    assert "2,560 in 10 steps" in captured.out
    assert "ZeRO stage 1 over 4 ranks, fp32" in captured.out
    assert "code: 1 shards" in captured.out
    assert "not counted" not in captured.out  # the teacher's size was found
    assert not (folder / "runs").exists()  # looking leaves nothing behind


def test_the_tokens_of_a_growing_batch(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = "train.batch_changes=[{from_step: 4, global_batch_tokens: 512}, {from_step: 9, global_batch_tokens: 128}]"
    assert examine(folder, "--world-size", "4", "engine.precision=fp32", changes) == 0
    out = capsys.readouterr().out
    assert "256 per step = 4 ranks × 2 sequences × 16 tokens × 2 grad_accum_steps" in out
    assert "512 per step from step 4 on = 4 ranks × 2 sequences × 16 tokens × 4 grad_accum_steps" in out
    assert "128 per step from step 9 on = 4 ranks × 2 sequences × 16 tokens × 1 grad_accum_steps" in out
    assert f"{3 * 256 + 5 * 512 + 2 * 128:,} in 10 steps" in out


SCHEDULED = (
    ("optim.schedule=cosine",),
    ("optim.schedule=linear", "optim.min_lr=0", "optim.weight_decay=0", "train.total_steps=1"),
    ("optim.schedule=wsd", "optim.cooldown_steps=3", "optim.optimizer=muon", "optim.muon.weight_decay=0.1"),
    (
        *("optim.schedule=two_stage", "optim.stage2_step=6", "optim.stage2_lr=1e-4", "optim.warmup_steps=2"),
        *("binarize.from_step=3", "binarize.anneal_steps=2", "data.phases=[{from_step: 4, weights: {code: 2}}]"),
        "train.batch_changes=[{from_step: 4, global_batch_tokens: 512}]",
    ),
)


@pytest.mark.parametrize("settings", SCHEDULED, ids=lambda settings: settings[0].partition("=")[2])
def test_the_schedules_are_drawn_on_request(
    folder: Path, settings: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    picture = folder / "schedules.img"
    assert examine(folder, "engine.precision=fp32", *settings) == 0
    assert "drawn in" not in capsys.readouterr().out
    before = set(folder.iterdir())
    assert examine(folder, "--picture", str(picture), "engine.precision=fp32", *settings) == 0
    assert f"schedules are drawn in {picture}" in capsys.readouterr().out
    assert set(folder.iterdir()) == {*before, picture}
    with picture.open("rb") as file:
        pixels = matplotlib.image.imread(file, format="png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05


def test_a_picture_that_cannot_be_drawn_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(folder, "--picture", str(folder / "nowhere" / "a.png"), "engine.precision=fp32") == 1
    assert "nowhere/a.png cannot be written (No such file or directory); name another place" in capsys.readouterr().err
    assert run(doctor.main, doctor.parser(), ["--picture", "a.png"]) == 1
    assert "name the run with --config" in capsys.readouterr().err


def test_nothing_is_allocated_for_a_large_model(capsys: pytest.CaptureFixture[str]) -> None:
    before = psutil.Process().memory_info().rss
    config = str(ROOT / "launch" / "configs" / "fbi_7b.yaml")
    nowhere = ["distill.teacher=/nowhere/llama", "data.sources=[{name: a, paths: [/nowhere/shards]}]"]
    arguments = ["--config", config, "--world-size", "64", *nowhere]
    assert run(doctor.main, doctor.parser(), arguments) == 1  # no teacher, no shards
    assert "6,740,692,992 parameters" in capsys.readouterr().out
    assert psutil.Process().memory_info().rss - before < 1e9


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["distill.teacher=/nowhere/teacher"], "/nowhere/teacher"),
        (["data.sources.0.paths=[/nowhere/*.jsonl]"], "/nowhere/*.jsonl"),
        (["data.heldout=[/nowhere/heldout.jsonl]"], "/nowhere/heldout.jsonl"),
        (["data.tokenizer=/nowhere/tokenizer.json"], "/nowhere/tokenizer.json"),
        (["model.vocab_size=17"], "vocab_size=16"),
        (
            ["data.seq_len=4096", "model.max_seq_len=4096", "train.global_batch_tokens=8192", "eval.max_tokens=4096"],
            "data.seq_len=4096 is more than the 2048 positions of the teacher",
        ),
        (["model.d_model=80000", "model.d_ff=400000", "model.n_layers=400"], "of memory and"),
        (["model.d_model=80000", "model.d_ff=400000", "model.n_layers=400"], "checkpoints need"),
    ],
)
def test_what_a_run_lacks_is_one_sentence_and_exit_code_1(
    folder: Path, overrides: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine(folder, *overrides) == 1
    problems = [line for line in capsys.readouterr().err.splitlines() if line]
    assert all(line.startswith("problem: ") for line in problems), problems
    assert sum(words in line for line in problems) == 1, problems


def test_all_problems_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(folder, "distill.teacher=/nowhere/t", "data.sources.0.paths=[/nowhere/s]") == 1
    assert len(capsys.readouterr().err.splitlines()) >= 2


def test_memory_counts_the_ranks_of_this_node(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU the ranks are on it")
    free = psutil.virtual_memory()._replace(available=1_500_000_000)  # room for two ranks, each 0.6 GB of libraries
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: free)
    assert examine(folder, "--world-size", "2") == 0
    assert examine(folder, "--world-size", "4") == 1
    assert "4 ranks on this node need" in capsys.readouterr().err
    assert examine(folder, "--world-size", "4", "--ranks-per-node", "2") == 0


def test_a_config_error_is_reported_before_anything_is_looked_at(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert examine(folder, "optim.lrr=1") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "did you mean optim.lr?" in captured.err


def test_a_backend_that_cannot_be_forced_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FBITRAIN_BACKEND", "abacus")
    assert run(doctor.main, doctor.parser(), []) == 1
    assert "FBITRAIN_BACKEND=abacus" in capsys.readouterr().err


def test_missing_and_outdated_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["torch>=999", "no-such-package-here>=1", "pytest>=1; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    assert run(doctor.main, doctor.parser(), []) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert f"torch {torch.__version__} is installed, but fbitrain is written for torch>=999" in first
    assert "no-such-package-here is not installed" in second


def test_world_size_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        doctor.parser().parse_args(["--world-size", "0"])
    assert "not at least 1" in capsys.readouterr().err


def test_as_a_command(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "doctor.py"), "--config", str(folder / "tiny.yaml")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert str(folder / "tiny.yaml") in done.stdout


def test_what_a_source_needs_is_looked_at(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = folder / "code"
    sources = (
        f"{{name: code, paths: [{shards}], text_key: content}}, {{name: web, paths: ['http://b.invalid/a.jsonl']}}"
    )
    overrides = [f"data.sources=[{sources}]", "data.duplicates=/nowhere.npz", "data.cache_gb=1e9"]
    assert examine(folder, *overrides) == 1
    captured = capsys.readouterr()
    assert "web: 1 shards, size not known yet" in captured.out
    for problem in ("records hold no document", "data.cache_gb=1e+09 is more than"):
        assert problem in captured.err
    assert examine(folder, "data.duplicates=/nowhere.npz") == 1
    assert "data.duplicates=/nowhere.npz does not exist" in capsys.readouterr().err
