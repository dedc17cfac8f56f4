"""Perplexity against arithmetic done by hand, what a text is, and lm-eval on local files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.build import load_windows
from fbitrain.commands import eval as command
from fbitrain.config import load_config
from fbitrain.data.reading.heldout_text import HeldoutText
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.inference import evaluate
from fbitrain.inference.evaluate import (
    bits_per_byte,
    heldout_windows,
    load_text,
    nll_of_windows,
    perplexity,
)
from fbitrain.loading.model_folder import load_lm, open_model


@pytest.fixture(scope="module")
def model(workspace: Any) -> PreTrainedModel:
    return load_lm(workspace.teacher, torch.float32)


def random_ids(n: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (n,), generator=torch.Generator().manual_seed(5))


def held(token_ids: torch.Tensor, bytes_per_token: int = 1) -> HeldoutText:
    return HeldoutText(token_ids, torch.full_like(token_ids, bytes_per_token), n_documents=1)


@torch.inference_mode()
def nll_by_hand(model: PreTrainedModel, windows: torch.Tensor) -> float:
    logits = model(input_ids=windows).logits[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"))


def test_windows_do_not_overlap_and_drop_the_tail() -> None:
    ids = torch.arange(100)
    assert heldout_windows(ids, 7).tolist() == [list(range(s, s + 7)) for s in range(0, 98, 7)]
    assert heldout_windows(ids, 7, max_tokens=20).tolist() == [list(range(7)), list(range(7, 14))]
    assert heldout_windows(ids, 100).shape == (1, 100)
    for seq_len, max_tokens, mend in (
        (101, None, "give more text"),
        (101, 100, "give more text"),
        (50, 49, "raise max_tokens"),
        (1, None, "leaves no token to predict; choose 2 or more$"),
    ):
        with pytest.raises(UserError, match=f"seq_len={seq_len}.*{mend}"):
            heldout_windows(ids, seq_len, max_tokens)


@pytest.mark.parametrize(("batch_size", "chunk_tokens"), [(1, 512), (3, 10), (4, 1), (50, 47)])
def test_nll_is_the_sum_over_each_windows_next_tokens(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, batch_size: int, chunk_tokens: int
) -> None:
    monkeypatch.setattr(evaluate, "CHUNK_TOKENS", chunk_tokens)
    windows = heldout_windows(random_ids(187, model.config.vocab_size), 17)
    nll, n_tokens = nll_of_windows(evaluate.hidden_and_head(model), windows, batch_size)
    assert n_tokens == 11 * 16
    assert nll == pytest.approx(nll_by_hand(model, windows), rel=1e-6)


def test_no_more_than_a_chunk_of_logits_exists(model: PreTrainedModel) -> None:
    sizes = []

    def hidden_and_head(ids: torch.Tensor) -> tuple[torch.Tensor, evaluate.Head]:
        hidden, head = evaluate.hidden_and_head(model)(ids)

        def counted(hidden_MD: torch.Tensor) -> torch.Tensor:
            sizes.append(len(hidden_MD))
            return head(hidden_MD)

        return hidden, counted

    nll_of_windows(hidden_and_head, heldout_windows(random_ids(1400, model.config.vocab_size), 100), 7)
    assert sizes == [512, 181] * 2


def test_perplexity_is_that_of_the_mean(model: PreTrainedModel) -> None:
    text = held(random_ids(103, model.config.vocab_size), 4)
    found = perplexity(model, text, 10, batch_size=4)
    windows = heldout_windows(text.token_ids, 10)
    mean = nll_by_hand(model, windows) / 90
    assert (found.n_tokens, found.n_bytes, found.n_windows) == (90, 360, 10)
    assert found.nll_per_token == pytest.approx(mean, rel=1e-6)
    assert found.ppl == pytest.approx(math.exp(mean), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(mean / math.log(2) / 4, rel=1e-6)  # four bytes a token


def test_the_bytes_are_those_of_the_predicted_tokens(model: PreTrainedModel) -> None:
    """The text's first part has more bytes per token than the rest, and every window's first token more still."""
    text = held(random_ids(103, model.config.vocab_size))
    text.token_bytes[:50] = 3
    text.token_bytes[::10] = 100
    found = perplexity(model, text, 10, max_tokens=35)
    assert (found.n_tokens, found.n_bytes) == (27, 81)
    assert found.bits_per_byte == pytest.approx(found.nll_per_token / math.log(2) / 3, rel=1e-6)


def test_a_run_counts_the_same_bytes(tmp_path: Path, workspace: Any) -> None:
    """Short words, of which one token each, before what the vocabulary has no words for."""
    (tmp_path / "held.txt").write_text("the model learns " * 40 + "漢字" * 300)
    config = load_config(workspace.config, [f"data.heldout=[{tmp_path}/held.txt]", "eval.max_tokens=48"])
    tokenizer = load_tokenizer(workspace.teacher)
    heldout = load_windows(config, tokenizer)
    assert heldout is not None
    assert heldout.windows.shape == (2, 24)
    assert heldout.n_bytes == sum(len(tokenizer.decode(window[1:].tolist())) for window in heldout.windows)


def test_a_uniform_model_costs_log2_of_the_vocabulary_per_token() -> None:
    uniform = lambda ids: (torch.zeros(*ids.shape, 3), lambda hidden: torch.zeros(len(hidden), 256))  # noqa: E731
    nll, n_tokens = nll_of_windows(uniform, torch.zeros(5, 9, dtype=torch.int64), 2)
    assert bits_per_byte(nll, 2 * n_tokens) == pytest.approx(4.0)
    assert bits_per_byte(nll, 0) == math.inf


def test_other_architectures_are_measured_by_their_own_logits() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    text = held(random_ids(64, 50))
    found = perplexity(gpt2, text, 8)
    assert found.nll_per_token == pytest.approx(nll_by_hand(gpt2, heldout_windows(text.token_ids, 8)) / 56, rel=1e-6)


def test_texts_the_model_cannot_read_are_refused(model: PreTrainedModel) -> None:
    known = held(torch.zeros(5000, dtype=torch.int64))
    with pytest.raises(UserError, match=r"seq_len=4096 .* 2048 positions"):
        perplexity(model, known, 4096)
    unknown = held(torch.full((50,), model.config.vocab_size))
    with pytest.raises(UserError, match="tokenizer is not the model's"):
        perplexity(model, unknown, 10)


def test_wikitext_is_read_as_the_datasets_library_yields_it(tmp_path: Path, workspace: Any) -> None:
    tokenizer = load_tokenizer(workspace.teacher)
    content = " \n = Title = \n \n A line . \n"
    joined = "\n\n".join(["", " = Title = \n", "", " A line . \n"])
    for suffix, expected, n_documents in ((".raw", joined, 4), (".tokens", joined, 4), (".txt", content, 1)):
        path = tmp_path / f"wiki.test{suffix}"
        path.write_text(content)
        text = load_text(path, tokenizer)
        assert text.token_ids.tolist() == tokenizer.encode(expected)
        assert (text.token_bytes.sum(), text.n_documents) == (len(expected.encode()), n_documents)


def test_shards_are_joined_by_a_blank_line(workspace: Any) -> None:
    tokenizer = load_tokenizer(workspace.teacher)
    path = workspace.path / "heldout.jsonl"
    joined = "\n\n".join(json.loads(line)["text"] for line in path.read_text().splitlines())
    assert load_text(path, tokenizer).token_ids.tolist() == tokenizer.encode(joined)


def test_a_missing_text_is_one_sentence(tmp_path: Path, workspace: Any) -> None:
    with pytest.raises(UserError, match=r"none\.raw cannot be read"):
        load_text(tmp_path / "none.raw", load_tokenizer(workspace.teacher))


def test_the_command_measures_several_texts(tmp_path: Path, workspace: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the model learns one bit per weight from a teacher " * 20)
    out = tmp_path / "results.json"
    arguments = [str(workspace.teacher), "--ppl", f"a={tmp_path / 'a.txt'}", f"held={workspace.path / 'heldout.jsonl'}"]
    arguments += ["--seq-len", "24", "--max-tokens", "100", "--batch-size", "3", "--out", str(out)]
    assert run(command.main, command.parser(), arguments) == 0
    found = json.loads(out.read_text())
    assert found["seq_len"] == 24
    with open_model(workspace.teacher) as teacher:
        text = load_text(tmp_path / "a.txt", teacher.tokenizer)
        expected = perplexity(teacher.lm, text, 24, max_tokens=100)
    assert found["ppl"]["a"]["ppl"] == pytest.approx(expected.ppl)
    assert found["ppl"]["held"]["n_tokens"] == expected.n_tokens == 4 * 23
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["text", "a", "held"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{model}"], "nothing to measure"),
        (["{model}", "--ppl", "file.txt"], "NAME=FILE"),
        (["{model}", "--ppl", "a=x.txt", "a=y.txt"], "twice"),
        (["{model}", "--ppl", "a={tmp}/none.txt"], "text: '{tmp}/none.txt' matches no"),
        (["{model}", "--ppl", "a={tmp}/empty.txt"], "text: {tmp}/empty.txt holds no text; name files that do"),
        (["{model}", "--ppl", "a={tmp}/empty.raw"], "text: {tmp}/empty.raw holds no text; name files that do"),
        (["{model}", "--ppl", "a={model}/../heldout.jsonl", "--dtype", "int4"], "float32"),
        (["{tmp}", "--ppl", "a=b.txt"], "holds no model"),
        (["{tmp}/none", "--ppl", "a=b.txt"], "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(
    tmp_path: Path, workspace: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    for name in ("empty.txt", "empty.raw"):
        (tmp_path / name).touch()
    filled = [argument.format(model=workspace.teacher, tmp=tmp_path) for argument in arguments]
    assert run(command.main, command.parser(), filled) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fbitrain eval: ")
    assert words.format(tmp=tmp_path) in error
    assert "data.heldout" not in error
