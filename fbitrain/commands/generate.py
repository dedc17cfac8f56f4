"""Let a model continue a text: `python launch/generate.py releases/NAME/packed --prompt "def main("`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from fbitrain.base.command import positive
from fbitrain.base.errors import UserError
from fbitrain.commands.arguments import add_activations


def main(arguments: argparse.Namespace) -> None:
    if arguments.bench:
        from fbitrain.benches.decoding import bench
        from fbitrain.loading.model_folder import read_config

        if arguments.model is not None:
            read_config(arguments.model)  # a folder without a model, or with code of its own, is refused here
        threads = arguments.threads or len(os.sched_getaffinity(0))
        bench(arguments.model, arguments.preset, peers=arguments.peers, threads=threads, rounds=arguments.rounds)
        return
    if arguments.model is None:
        raise UserError("no model is named; give a folder such as releases/NAME/packed, or --bench")
    from fbitrain.inference.generate import Sampling, stream_text
    from fbitrain.loading.model_folder import open_model

    sampling = Sampling(
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    with open_model(arguments.model, arguments.dtype, activations=arguments.activations) as model:
        print(arguments.prompt, end="", flush=True)
        started, n_tokens = time.perf_counter(), 0
        for piece in stream_text(model.lm, model.tokenizer, model.prompt_start, arguments.prompt, sampling):
            print(piece, end="", flush=True)
            n_tokens += 1
        seconds = time.perf_counter() - started
    print()
    rate = f"{n_tokens} tokens in {seconds:.1f} s, {n_tokens / seconds:.1f} tokens/s"
    print(f"{rate} on {model.runs_on}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain generate", description=__doc__)
    commands.add_argument(
        "model", type=Path, nargs="?", help="a released folder, another Hugging Face folder, or a .gguf file"
    )
    commands.add_argument("--prompt", default="", help="the text to continue (default: none, a new document)")
    commands.add_argument("--max-new-tokens", type=int, default=64, help="at most this many tokens (default 64)")
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
