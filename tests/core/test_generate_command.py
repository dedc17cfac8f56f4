"""`fbitrain generate`: prompts from the command line, files and stdin, and conversations."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer

from fbitrain.base.command import run
from fbitrain.base.errors import UserError
from fbitrain.commands import generate as command
from fbitrain.data.tokenizer import load_tokenizer
from fbitrain.loading.chat_template import load_chat_template
from fbitrain.loading.model_folder import load_lm

Ended = tuple[int, str, str]  # exit code, stdout, stderr
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


@pytest.fixture
def generate(workspace: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def call(*arguments: str, model: Path = workspace.teacher) -> Ended:
        code = run(command.main, command.parser(), [str(model), "--max-new-tokens", "4", *arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def chatty(workspace: Any, tmp_path: Path) -> Path:
    """The teacher with a chat template."""
    folder = tmp_path / "chatty"
    shutil.copytree(workspace.teacher, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_prompts_come_from_everywhere_in_their_order(
    generate: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("the model\r\n\n  \na teacher\n")
    (tmp_path / "b.jsonl").write_text('"one\\nbit"\n{"prompt": "per é", "id": 3}\n')
    give_stdin(monkeypatch, "weight é".encode())
    files = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "-"]
    wanted = ["--prompt", "that", "--prompt", "knows", *(word for file in files for word in ("--prompts", file))]
    code, out, err = generate(*wanted, "--json")
    assert code == 0
    prompts = ["that", "knows", "the model", "a teacher", "one\nbit", "per é", "weight é"]
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == prompts
    assert re.search(r"\b\d+ tokens in .* tokens/s on ", err)
    give_stdin(monkeypatch, "weight é".encode())
    code, shown, _ = generate(*wanted)
    assert shown == "\n".join(f"{answer['prompt']}{answer['text']}\n" for answer in answers)
    for answer in answers:
        assert generate("--prompt", answer["prompt"])[1] == f"{answer['prompt']}{answer['text']}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"the\n\xff\n", "a.txt, line 2 is not UTF-8"),
        ("a.jsonl", b'"the"\n{"text": "x"}\n', "a.jsonl, line 2 holds no prompt"),
        ("a.jsonl", b'"the"\n{\n', "a.jsonl, line 2 is not JSON"),
        ("a.txt", b"the\n" + b"weight " * 3000, "a.txt, line 2: the prompt has"),
        ("a.txt", None, "a.txt cannot be read: No such file"),
    ],
)
def test_a_bad_prompt_ends_it_after_the_good_ones(
    generate: Callable[..., Ended], tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, out, err = generate("--prompts", str(tmp_path / name))
    assert code == 1
    assert message in err.splitlines()[-1]
    assert (out == "") == (content is None)
    assert out.count("\n") <= 1
    assert "weight" not in out


def test_a_message_is_answered_as_the_template_says(
    generate: Callable[..., Ended], chatty: Path, workspace: Any
) -> None:
    code, out, _ = generate("--chat", "--system", "sure", "--prompt", "the model", model=chatty)
    assert code == 0
    text = "<s>system\nsure</s>\n<s>user\nthe model</s>\n<s>assistant\n"
    tokenizer = load_tokenizer(chatty)
    template = load_chat_template(tokenizer, chatty)
    messages = [{"role": "system", "content": "sure"}, {"role": "user", "content": "the model"}]
    ids = template.encode(messages)
    assert ids == AutoTokenizer.from_pretrained(chatty).apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    assert tokenizers.Tokenizer.from_file(str(chatty / "tokenizer.json")).encode(text).ids == ids
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    whole = load_lm(chatty, torch.float32).generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out == tokenizer.decode([*ids, *whole[0, len(ids) :].tolist()])[len(tokenizer.decode(ids)) :] + "\n"
    assert template.encode([{"role": "user", "content": "</s>"}]).count(1) == 1  # its own end, not the user's
    with pytest.raises(UserError, match="refuses the conversation: late"):
        template.encode([*messages, *messages])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chat", "--prompt", "x"], "has no chat template; give text to continue instead"),
        (["--chat"], "--chat without a prompt talks on a terminal, and stdin is none"),
        (["--system", "x"], "--system is a message of a conversation; give --chat too"),
    ],
)
def test_what_makes_no_conversation_is_one_sentence(
    generate: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    give_stdin(monkeypatch, b"")
    code, out, err = generate(*arguments)
    assert (code, out, message in err) == (1, "", True)


@pytest.mark.parametrize("template", ["{% for", 7, [{"name": "tool_use", "template": "x"}]])
def test_a_template_that_cannot_be_used_is_one_sentence(chatty: Path, template: Any) -> None:
    (chatty / "chat_template.jinja").unlink()
    settings = json.loads((chatty / "tokenizer_config.json").read_text())
    (chatty / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    words = "is damaged: " if isinstance(template, str) else "has no chat template"
    with pytest.raises(UserError, match=words):
        load_chat_template(load_tokenizer(chatty), chatty)


def test_a_conversation_on_a_terminal(chatty: Path) -> None:
    """The second answer depends on the first message and its answer."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "fbitrain", "generate", str(chatty), "--chat", "--max-new-tokens", "6"],
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(follower)
    os.write(leader, b"the model\n\nthe model\n\x04")
    out, err = process.communicate(timeout=120)
    os.close(leader)
    assert process.returncode == 0, err
    first, second, end = (part.removeprefix("> ") for part in out.split("\n> "))
    assert first != second
    assert end == "\n"
    assert "Ctrl-D" in err
