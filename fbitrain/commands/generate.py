"""Let a model continue a text: `python launch/generate.py releases/NAME/packed --prompt "def main("`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fbitrain.base.command import positive
from fbitrain.base.errors import UserError
from fbitrain.commands.arguments import add_activations
from fbitrain.commands.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from fbitrain.inference.generate import Sampling
    from fbitrain.loading.model_folder import Pretrained

NEW_TOKENS, NEW_TOKENS_OF_AN_ANSWER = 64, 512


def main(arguments: argparse.Namespace) -> None:
    if arguments.bench:
        run_bench(arguments)
        return
    if arguments.model is None:
        raise UserError("no model is named; give a folder such as releases/NAME/packed, or --bench")
    talks = arguments.chat and not (arguments.prompt or arguments.prompts)
    if talks and not sys.stdin.isatty():
        raise UserError("--chat without a prompt talks on a terminal, and stdin is none; give --prompt or --prompts -")
    if arguments.system and not arguments.chat:
        raise UserError("--system is a message of a conversation; give --chat too")
    from fbitrain.inference.generate import Sampling
    from fbitrain.loading.model_folder import open_model

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens or (NEW_TOKENS_OF_AN_ANSWER if arguments.chat else NEW_TOKENS),
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    with open_model(arguments.model, arguments.dtype, activations=arguments.activations) as model:
        rate = Rate()
        encode = encoder(model, arguments)
        if talks:
            converse(model, encode, sampling, rate)
        else:
            texts = arguments.prompt or ([] if arguments.prompts else [""])
            continue_each(model, encode, sampling, rate, read_prompts(texts, arguments.prompts), arguments)
        print(f"{rate} on {model.runs_on}", file=sys.stderr)


def encoder(model: Pretrained, arguments: argparse.Namespace) -> Callable[[list[str]], list[int]]:
    """A function that gives the token ids of a prompt, or with --chat those of a conversation: the user's message, the
    model's answer and so on. Raises UserError for --chat with a model that has no chat template."""
    if arguments.chat:
        from fbitrain.loading.chat_template import load_chat_template

        template = load_chat_template(model.tokenizer, model.folder)
        first = [{"role": "system", "content": arguments.system}] if arguments.system else []

        def of_conversation(texts: list[str]) -> list[int]:
            roles = ("user", "assistant")
            return template.encode([*first, *({"role": roles[i % 2], "content": t} for i, t in enumerate(texts))])

        return of_conversation
    from fbitrain.inference.generate import prompt_tokens

    return lambda texts: prompt_tokens(model.lm, model.tokenizer, model.prompt_start, texts[0])


def continue_each(
    model: Pretrained,
    encode: Callable[[list[str]], list[int]],
    sampling: Sampling,
    rate: Rate,
    prompts: Iterator[Prompt],
    arguments: argparse.Namespace,
) -> None:
    """Prints every prompt with its continuation, with --chat the answer alone, with --json a line of JSON for each."""
    from fbitrain.inference.generate import room_after, stream_pieces

    for number, prompt in enumerate(prompts):
        try:
            ids = encode([prompt.text])
            room_after(model.lm, ids)  # a prompt that is refused is not shown as if it had been continued
            pieces = rate.counted(stream_pieces(model.lm, model.tokenizer, ids, sampling))
            if arguments.json:
                print(json.dumps({"prompt": prompt.text, "text": "".join(pieces)}, ensure_ascii=False), flush=True)
                continue
            print("\n" * (number > 0) + prompt.text * (not arguments.chat), end="", flush=True)
            for piece in pieces:
                print(piece, end="", flush=True)
        except UserError as error:
            raise UserError(f"{prompt.where}: {error}") from error
        print()


def converse(model: Pretrained, encode: Callable[[list[str]], list[int]], sampling: Sampling, rate: Rate) -> None:
    """A conversation on the terminal until its end of input (Ctrl-D). Ctrl-C ends an answer."""
    from fbitrain.inference.generate import stream_pieces

    with suppress(ImportError):
        import readline  # noqa: F401 - its import lets a line be edited
    texts: list[str] = []
    print("a conversation; Ctrl-C ends an answer, Ctrl-D the conversation", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            continue
        answer: list[str] = []
        with suppress(KeyboardInterrupt):
            for piece in rate.counted(stream_pieces(model.lm, model.tokenizer, encode([*texts, text]), sampling)):
                answer.append(piece)
                print(piece, end="", flush=True)
        print()
        texts += [text, "".join(answer)]


class Rate:
    """How many tokens were made in what time."""

    def __init__(self) -> None:
        self.n_tokens, self.seconds = 0, 0.0

    def counted(self, pieces: Iterator[str]) -> Iterator[str]:
        started = time.perf_counter()
        try:
            for piece in pieces:
                self.n_tokens += 1
                yield piece
        finally:
            self.seconds += time.perf_counter() - started

    def __str__(self) -> str:
        per_second = self.n_tokens / self.seconds if self.seconds else 0.0
        return f"{self.n_tokens} tokens in {self.seconds:.1f} s, {per_second:.1f} tokens/s"


def run_bench(arguments: argparse.Namespace) -> None:
    from fbitrain.benches.decoding import bench
    from fbitrain.loading.model_folder import read_config

    if arguments.model is not None:
        read_config(arguments.model)  # a folder without a model, or with code of its own, is refused here
    threads = arguments.threads or len(os.sched_getaffinity(0))
    bench(arguments.model, arguments.preset, peers=arguments.peers, threads=threads, rounds=arguments.rounds)


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain generate", description=__doc__)
    commands.add_argument(
        "model", type=Path, nargs="?", help="a released folder, another Hugging Face folder, or a .gguf file"
    )
    commands.add_argument(
        "--prompt", action="append", default=[], help="a text to continue; may be given again (default: a new document)"
    )
    commands.add_argument(
        "--prompts", action="append", default=[], type=Path, metavar="FILE", help="prompts, one a line; - is stdin"
    )
    commands.add_argument("--json", action="store_true", help='a line {"prompt": …, "text": …} per prompt')
    commands.add_argument("--chat", action="store_true", help="prompts are messages; without one, a conversation")
    commands.add_argument("--system", default="", metavar="TEXT", help="the system's message at the start of --chat")
    commands.add_argument("--max-new-tokens", type=positive, help="at most this many tokens (default 64; --chat 512)")
    commands.add_argument("--temperature", type=float, default=0.0, help="0 (default) takes the most likely token")
    commands.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens (default 0: all)")
    commands.add_argument("--top-p", type=float, default=1.0, help="sample from this share of probability (default 1)")
    commands.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    commands.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add_activations(commands)
    bench = commands.add_argument_group("measuring the speed of a packed model instead")
    bench.add_argument("--bench", action="store_true", help="time the model, or random weights without one, on the CPU")
    bench.add_argument("--preset", default="130m", help="the shape of the random weights (default 130m)")
    bench.add_argument("--peers", action="store_true", help="llama.cpp too; needs llama-cpp-python")
    bench.add_argument("--threads", type=positive, help="of every contender (default: the CPUs of this process)")
    bench.add_argument("--rounds", type=positive, default=5, help="turns of every contender (default 5)")
    return commands
