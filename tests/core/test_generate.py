"""Streaming text: the same tokens as transformers' generate, sampling by the rules, whole characters."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel

from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.benches import decoding
from fbitrain.benches.decoding import write_random_packed
from fbitrain.commands import eval as eval_command
from fbitrain.commands import generate as command
from fbitrain.data.reading.heldout_text import HeldoutText
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.inference import generate
from fbitrain.inference.evaluate import perplexity
from fbitrain.inference.generate import Sampling, choose, stream_text, stream_tokens
from fbitrain.kernels import cpu
from fbitrain.loading.model_folder import load_lm, open_model
from fbitrain.model.compiled import PackedLlama, level_for
from fbitrain.model.config import BinarizeConfig, ModelConfig

needs_kernels = pytest.mark.skipif(bool(cpu.levels()["portable"]), reason="the compiled kernels do not run here")
PROMPT = [0, 40, 270, 3, 99]


@pytest.fixture
def model(workspace: Any) -> PreTrainedModel:
    return load_lm(workspace.teacher, torch.float32)


@pytest.fixture
def tokenizer(workspace: Any) -> Tokenizer:
    return load_tokenizer(workspace.teacher)


def test_greedy_tokens_are_those_of_transformers(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = None
    ours = list(stream_tokens(model, PROMPT, Sampling(max_new_tokens=30)))
    inputs = {"input_ids": torch.tensor([PROMPT]), "attention_mask": torch.ones(1, len(PROMPT), dtype=torch.int64)}
    theirs = model.generate(**inputs, max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert ours == theirs[0, len(PROMPT) :].tolist()
    assert len(ours) == 30


def test_a_recurrent_model_has_no_positions_to_run_out_of(
    tmp_path: Path, workspace: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=301, hidden_size=16, num_hidden_layers=2, state_size=4, initializer_range=1.0)
    mamba = MambaForCausalLM(config).eval()
    mamba.generation_config.eos_token_id = None
    mamba.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(workspace.teacher / name, tmp_path)
    ids = list(PROMPT)
    for _ in range(8):
        ids.append(int(mamba(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    found = list(stream_tokens(mamba, PROMPT, Sampling(max_new_tokens=8)))
    assert found == ids[len(PROMPT) :]
    assert len(set(found)) > 2
    assert run(command.main, command.parser(), [str(tmp_path), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    text = f"held={workspace.path / 'heldout.jsonl'}"
    arguments = [str(tmp_path), "--ppl", text, "--max-tokens", "100", "--seq-len", "50"]
    assert run(eval_command.main, eval_command.parser(), arguments) == 0
    assert run(eval_command.main, eval_command.parser(), [str(tmp_path), "--ppl", text, "--max-tokens", "100"]) == 1
    assert "100 tokens of text do not fill a window of seq_len=2048" in capsys.readouterr().err


def test_a_damaged_gguf_is_no_teacher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    assert run(command.main, command.parser(), [str(tmp_path / "a.gguf"), "--prompt", "the"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"fbitrain generate: model {tmp_path}/a.gguf ")
    assert "teacher" not in error


def test_it_ends_before_eos(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = None
    free = list(stream_tokens(model, PROMPT, Sampling(max_new_tokens=12)))
    for eos in (free[6], [9999, free[6]]):
        model.generation_config.eos_token_id = eos
        assert list(stream_tokens(model, PROMPT, Sampling(max_new_tokens=12))) == free[: free.index(free[6])]


def test_it_ends_where_the_positions_do(model: PreTrainedModel) -> None:
    model.generation_config.eos_token_id = None
    model.config.max_position_embeddings = 8
    assert len(list(stream_tokens(model, PROMPT, Sampling(max_new_tokens=100)))) == 3
    with pytest.raises(UserError, match="8 tokens and fills the model's 8 positions"):
        list(stream_tokens(model, [*PROMPT, 1, 2, 3], Sampling()))


def test_the_seed_decides_a_sample(model: PreTrainedModel) -> None:
    def sample(seed: int) -> list[int]:
        return list(stream_tokens(model, PROMPT, Sampling(max_new_tokens=20, temperature=2.0, seed=seed)))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def draws(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """How often each token was chosen in 2000 draws."""
    generator = torch.Generator().manual_seed(3)
    chosen = torch.tensor([choose(logits, sampling, generator) for _ in range(2000)])
    return torch.bincount(chosen, minlength=len(logits)) / 2000


def test_sampling_follows_the_softmax_of_what_is_kept() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probabilities.log()
    torch.testing.assert_close(draws(logits, Sampling(temperature=1.0)), probabilities, atol=0.04, rtol=0)
    cooled = (logits / 0.5).softmax(0)
    torch.testing.assert_close(draws(logits, Sampling(temperature=0.5)), cooled, atol=0.04, rtol=0)
    two = torch.tensor([0, 4 / 7, 0, 3 / 7])
    torch.testing.assert_close(draws(logits, Sampling(temperature=1.0, top_k=2)), two, atol=0.04, rtol=0)
    # 0.4 is not yet 0.6 of the probability, 0.4 + 0.3 is.
    torch.testing.assert_close(draws(logits, Sampling(temperature=1.0, top_p=0.6)), two, atol=0.04, rtol=0)
    assert draws(logits, Sampling(temperature=1.0, top_p=0.01)).tolist() == [0, 1, 0, 0]
    assert draws(logits, Sampling(temperature=0.0, top_k=3)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    "settings",
    [
        *({"max_new_tokens": 0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_p": math.nan}),
        *({"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}),
        *({"seed": 123456789012345678901}, {"seed": -1}),
    ],
)
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))}="):
        Sampling(**settings)


def test_the_extremes_of_sampling_sample(model: PreTrainedModel) -> None:
    greedy = list(stream_tokens(model, PROMPT, Sampling(max_new_tokens=5)))
    for temperature in (1e-40, 1e-320, 1e-6):
        cold = Sampling(max_new_tokens=5, temperature=temperature, seed=2**64 - 1)
        assert list(stream_tokens(model, PROMPT, cold)) == greedy
    hot = Sampling(max_new_tokens=5, temperature=1e300, top_k=10**30)
    assert len(list(stream_tokens(model, PROMPT, hot))) <= 5


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_one_sentence(value: float, temperature: float) -> None:
    logits = torch.tensor([0.0, value, 1.0])
    with pytest.raises(UserError, match="logits are not finite"):
        choose(logits, Sampling(temperature=temperature), torch.Generator())


def test_pieces_are_whole_characters_and_add_up(
    model: PreTrainedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = " é漢 the model👩‍🔬"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # characters of several tokens
    seen: list[list[int]] = []

    def scripted(_: object, prompt_ids: list[int], __: object) -> Iterator[int]:
        seen.append(list(prompt_ids))
        yield from ids

    monkeypatch.setattr(generate, "stream_tokens", scripted)
    pieces = list(stream_text(model, tokenizer, [0], "the weight", Sampling()))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert seen == [[0, *tokenizer.encode("the weight")]]
    ids = ids[:-1]  # the last character stays incomplete and is shown at the end
    assert "".join(stream_text(model, tokenizer, [0], "the weight", Sampling())).endswith("\N{REPLACEMENT CHARACTER}")


def test_without_a_prompt_it_starts_at_the_models_bos(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    model.generation_config.bos_token_id = None
    with pytest.raises(UserError, match="prompt is empty"):
        list(stream_text(model, tokenizer, [], "", Sampling()))
    sampling = Sampling(max_new_tokens=3)
    from_start = list(stream_text(model, tokenizer, [0], "", sampling))
    model.generation_config.bos_token_id = 0
    assert list(stream_text(model, tokenizer, [], "", sampling)) == from_start != []


def test_the_command_streams_and_times(workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(workspace.teacher), "--prompt", "the model", "--max-new-tokens", "5", "--temperature", "1"]
    assert run(command.main, command.parser(), arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("the model")
    assert re.search(r"[1-6] tokens in ", printed.err)
    assert "tokens/s" in printed.err


@pytest.fixture
def packed(workspace: Any, tmp_path: Path) -> Path:
    """A packed folder of random weights with the teacher's tokenizer."""
    folder = tmp_path / "packed"
    vocab_size = json.loads((workspace.teacher / "config.json").read_text())["vocab_size"]
    shape = ModelConfig(
        vocab_size=vocab_size, n_layers=2, n_heads=4, n_kv_heads=2, d_model=64, d_ff=160, max_seq_len=64
    )
    write_random_packed(folder, shape, BinarizeConfig())
    for file in workspace.teacher.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@needs_kernels
def test_a_packed_folder_generates_the_same_tokens_either_way(packed: Path) -> None:
    settings = [Sampling(max_new_tokens=40), Sampling(max_new_tokens=40, temperature=1.0, top_k=20, seed=3)]
    with open_model(packed) as compiled, open_model(packed, transformers_only=True) as transformers:
        assert isinstance(compiled.lm, PackedLlama)
        assert compiled.runs_on == f"compiled decoder ({level_for(compiled.lm.config)}, float activations)"
        assert transformers.runs_on == "transformers (transformers is asked for)"
        for sampling in settings:
            found = list(stream_tokens(compiled.lm, PROMPT, sampling))
            assert found == list(stream_tokens(transformers.lm, PROMPT, sampling))
            assert len(found) == 40
        eos = next(iter(stream_tokens(compiled.lm, PROMPT, settings[0])))
        compiled.lm.generation_config.eos_token_id = eos
        assert list(stream_tokens(compiled.lm, PROMPT, settings[0])) == []
        assert len(list(stream_tokens(compiled.lm, [1] * 61, settings[1]))) == 3  # of 64 positions
        with pytest.raises(UserError, match="64 tokens and fills the model's 64 positions"):
            list(stream_tokens(compiled.lm, [1] * 64, settings[0]))


@needs_kernels
def test_perplexity_is_the_same_either_way(packed: Path) -> None:
    text = HeldoutText(torch.randint(3, 200, (200,)), torch.ones(200, dtype=torch.int64), n_documents=1)
    with open_model(packed) as compiled, open_model(packed, transformers_only=True) as transformers:
        expected = perplexity(transformers.lm, text, 48)
        assert perplexity(compiled.lm, text, 48, batch_size=3).ppl == pytest.approx(expected.ppl, rel=1e-5)


@needs_kernels
def test_the_command_says_what_it_runs_on(packed: Path, workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "the", "--max-new-tokens", "2", "--activations", "int8"]
    assert run(command.main, command.parser(), [str(packed), *arguments]) == 0
    assert "int8 activations)" in capsys.readouterr().err
    assert run(command.main, command.parser(), [str(workspace.teacher), *arguments]) == 1
    assert "does not run" in (error := capsys.readouterr().err)
    assert "the model is not a packed Llama" in error
    assert run(command.main, command.parser(), []) == 1
    assert "no model is named" in capsys.readouterr().err


@needs_kernels
def test_the_benchmark_of_a_folder(
    packed: Path, workspace: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "PROMPT", 12)
    monkeypatch.setattr(decoding, "DECODED", 4)
    assert run(command.main, command.parser(), [str(packed), "--bench", "--rounds", "2", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rates = {line[:25].strip(): [float(number) for number in line[25:].split()] for line in lines[-5:]}
    packed_rows = {f"packed, {how}{what}" for how in ("int8", "float") for what in ("", ", all logits")}
    assert set(rates) == packed_rows | {"dense fp32 (transformers)"}
    assert all(rate > 0 for pair in rates.values() for rate in pair)
    assert sum("peak memory +" in line for line in lines) == 2
    assert run(command.main, command.parser(), [str(workspace.teacher), "--bench"]) == 1
    assert "the model is not a packed Llama" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["nowhere", "checkpoints", "formats", "empty", "damaged"])
def test_a_folder_without_a_model_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    folder = tmp_path / where
    words = {"nowhere": "does not exist", "checkpoints": "release it first", "formats": "name one of them: "}
    if where == "checkpoints":
        (folder / "checkpoints").mkdir(parents=True)
    elif where == "formats":
        (folder / "packed").mkdir(parents=True)
        (folder / "packed" / "config.json").write_text("{}")
    elif where in ("empty", "damaged"):
        folder.mkdir()
    if where == "damaged":
        (folder / "config.json").write_text('{"model_type": "no-such-type"}')
        (folder / "tokenizer.json").write_text("{}")
    assert run(command.main, command.parser(), [str(folder), "--prompt", "x"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words.get(where, str(folder)) in error


@pytest.mark.parametrize(("kind", "value"), [("bos", 128000), ("eos", [1, 128000])])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_special_the_model_has_no_embedding_for_is_one_sentence(
    workspace: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str, value: Any
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(workspace.teacher, folder)
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, f"{kind}_token_id": value}))
    assert run(command.main, command.parser(), [str(folder), "--prompt", "the"]) == 1
    error = capsys.readouterr().err
    assert f"{folder / name} names 128000 as the {kind.upper()} token" in error
    assert error.endswith("\n")
    assert "Traceback" not in error


def test_a_prompt_of_another_vocabulary_is_one_sentence(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    model.config.vocab_size = 20
    with pytest.raises(UserError, match="but the model's vocabulary has 20: the tokenizer is not the model's"):
        list(stream_text(model, tokenizer, [0], "the weight", Sampling()))


def test_ctrl_c_is_no_error_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    assert run(interrupted, command.parser(), ["model"]) == 130
    assert capsys.readouterr().err == "fbitrain generate: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, command.parser(), ["model", "--debug"])
