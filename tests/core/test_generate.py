"""Streaming text: the same tokens as transformers' generate, sampling by the rules, whole characters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fbitrain import generate
from fbitrain.data.tokenizer import Tokenizer, load_tokenizer
from fbitrain.errors import UserError
from fbitrain.generate import Sampling, choose, stream_text, stream_tokens
from fbitrain.launch import generate as command
from fbitrain.launch.cli import run
from fbitrain.pretrained import load_lm

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
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}]
)
def test_impossible_sampling_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(settings))}="):
        Sampling(**settings)


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
    pieces = list(stream_text(model, tokenizer, "the weight", Sampling()))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert seen == [[0, *tokenizer.encode("the weight")]]
    ids = ids[:-1]  # the last character stays incomplete and is shown at the end
    assert "".join(stream_text(model, tokenizer, "the weight", Sampling())).endswith("\N{REPLACEMENT CHARACTER}")


def test_bos_is_added_only_where_the_model_names_one(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    model.generation_config.bos_token_id = None
    with pytest.raises(UserError, match="prompt is empty"):
        list(stream_text(model, tokenizer, "", Sampling()))
    model.generation_config.bos_token_id = 0
    assert list(stream_text(model, tokenizer, "", Sampling(max_new_tokens=3)))


def test_the_command_streams_and_times(workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(workspace.teacher), "--prompt", "the model", "--max-new-tokens", "5", "--temperature", "1"]
    assert run(command.main, command.parser(), arguments) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("the model")
    assert "5 tokens in " in printed.err
    assert "tokens/s" in printed.err


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


def test_ctrl_c_is_no_error_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    assert run(interrupted, command.parser(), ["model"]) == 130
    assert capsys.readouterr().err == "generate.py: interrupted\n"
    with pytest.raises(KeyboardInterrupt):
        run(interrupted, command.parser(), ["model", "--debug"])
