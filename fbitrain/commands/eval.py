"""Measure a model: `python launch/eval.py releases/NAME/packed --ppl wikitext2=wiki.test.raw --tasks piqa`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbitrain.base.command import at_home, positive
from fbitrain.base.errors import UserError
from fbitrain.commands.arguments import add_activations

if TYPE_CHECKING:
    from fbitrain.loading.model_folder import Pretrained

DEFAULT_SEQ_LEN = 2048  # the papers'; less where the model has fewer positions


def main(arguments: argparse.Namespace) -> None:
    texts = named_files(arguments.ppl)
    tasks = [name for chosen in arguments.tasks for name in chosen.split(",") if name]
    if not texts and not tasks:
        raise UserError("nothing to measure; give --ppl NAME=FILE, --tasks, or both")
    from fbitrain.base.files import require_writable, write_json
    from fbitrain.loading.model_folder import open_model

    if arguments.out:
        require_writable(arguments.out, "--out")
    # lm-eval knows transformers' models only.
    options = {"activations": arguments.activations, "transformers_only": bool(tasks)}
    with open_model(arguments.model, arguments.dtype, **options) as model:
        print(f"running on {model.runs_on}", file=sys.stderr)
        positions = getattr(model.lm.config, "max_position_embeddings", DEFAULT_SEQ_LEN)
        seq_len = arguments.seq_len or min(DEFAULT_SEQ_LEN, positions)
        results: dict[str, Any] = {"model": str(arguments.model), "dtype": arguments.dtype}
        results["activations"] = arguments.activations
        if texts:
            results |= {"seq_len": seq_len, "ppl": measure_texts(model, texts, seq_len, arguments)}
            print_texts(results["ppl"])
        if tasks:
            results |= measure_tasks(model, tasks, arguments)
            print_tasks(results["tasks"])
    if arguments.out:
        write_json(arguments.out, results)
        print(f"written to {arguments.out}")


def measure_texts(
    model: Pretrained, texts: Mapping[str, Path], seq_len: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    from fbitrain.inference.evaluate import load_text, perplexity

    return {
        name: asdict(
            perplexity(
                model.lm,
                load_text(path, model.tokenizer),
                seq_len,
                max_tokens=arguments.max_tokens,
                batch_size=arguments.batch_size,
            )
        )
        for name, path in texts.items()
    }


def measure_tasks(model: Pretrained, tasks: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    from fbitrain.inference.lm_eval_tasks import lm_eval_version, run_tasks

    found = run_tasks(
        model.lm,
        model.folder,
        tasks,
        include_path=arguments.include_path,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
    )
    return {"lm_eval": lm_eval_version(), "tasks": {name: asdict(result) for name, result in found.items()}}


def named_files(pairs: Sequence[str]) -> dict[str, Path]:
    """NAME=FILE arguments as a dict; raises UserError for one of another form, or a name given twice."""
    named: dict[str, Path] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not name or not equals or not file:
            raise UserError(f"--ppl {pair} is not of the form NAME=FILE, such as wikitext2=wiki.test.raw")
        if name in named:
            raise UserError(f"--ppl names {name} twice; give every text its own name")
        named[name] = at_home(Path(file))
    return named


def print_texts(texts: Mapping[str, Mapping[str, Any]]) -> None:
    width = max(len("text"), *map(len, texts))
    print(f"{'text':<{width}} {'perplexity':>12} {'bits/byte':>10} {'tokens':>10}")
    for name, found in texts.items():
        print(f"{name:<{width}} {found['ppl']:>12.3f} {found['bits_per_byte']:>10.4f} {found['n_tokens']:>10,}")


def print_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracies in per cent, then all other figures as they are. majority: always giving the most frequent answer."""
    width = max(len("task"), *map(len, tasks)) if tasks else len("task")
    print(
        f"{'task':<{width}} {'acc':>6} {'±':>5} {'acc_norm':>9} {'±':>5} {'majority':>9} {'documents':>10} {'shots':>6}"
    )
    for name, found in tasks.items():
        acc, norm = per_cent(found["acc"], 6), per_cent(found["acc_norm"], 9)
        errors = [per_cent(found[key], 5) for key in ("acc_stderr", "acc_norm_stderr")]
        majority, documents = per_cent(found["majority"], 9), f"{found['n_documents']:>10,}"
        shots = "-" if found["n_shot"] is None else found["n_shot"]
        print(f"{name:<{width}} {acc} {errors[0]} {norm} {errors[1]} {majority} {documents} {shots:>6}")
    for name, found in tasks.items():
        for figure, value in found["others"].items():
            metric, _, filtered = figure.partition(",")
            if not metric.endswith("_stderr"):
                error = found["others"].get(f"{metric}_stderr,{filtered}")
                print(f"{name:<{width}} {figure.removesuffix(',none')} {value:.4g}{f' ± {error:.2g}' if error else ''}")


def per_cent(share: float | None, width: int) -> str:
    return f"{'-':>{width}}" if share is None else f"{100 * share:>{width}.1f}"


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain eval", description=__doc__)
    commands.add_argument("model", type=Path, help="a released folder, another Hugging Face folder, or a .gguf file")
    commands.add_argument(
        "--ppl",
        nargs="+",
        default=[],
        metavar="NAME=FILE",
        help="texts to measure perplexity on: .txt (one document), .raw (WikiText), or .jsonl, .jsonl.gz, .jsonl.zst",
    )
    commands.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="lm-eval tasks")
    commands.add_argument("--include-path", type=Path, help="a folder with YAML tasks of your own")
    commands.add_argument(
        "--seq-len", type=positive, help=f"window in tokens (default {DEFAULT_SEQ_LEN}, or what fits)"
    )
    commands.add_argument("--max-tokens", type=positive, help="of each text, at most this many (default: all)")
    commands.add_argument("--dtype", default="float32", help="float32 (default), bfloat16 or float16")
    add_activations(commands)
    commands.add_argument("--batch-size", type=positive, default=1, help="windows, or task requests, at a time")
    commands.add_argument("--limit", type=positive, help="documents per task, for a quick look")
    commands.add_argument("--out", type=Path, metavar="JSON", help="write the figures to this file")
    return commands
