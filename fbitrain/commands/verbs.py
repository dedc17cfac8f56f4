"""`fbitrain VERB …`: which verbs there are, and the call of one. The scripts of launch/ are the same calls.

A command is a module with `parser()` and `main(arguments)`. It is imported when it is called, because some need torch
and DeepSpeed, which take seconds, and the doctor must run where they are missing.
"""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fbitrain.base.command import run, until_nobody_reads
from fbitrain.base.extras import require_extra

# verb: (module, what it does)
VERBS = {
    "pretrain": ("commands.pretrain", "pretrain a model (on several ranks: deepspeed launch/pretrain.py)"),
    "finetune": ("commands.finetune", "make a pretrained model binary, and train it"),
    "run": ("commands.run", "pretrain or fine-tune, restarted after a lost rank or node"),
    "cache-teacher": ("commands.cache_teacher", "write a teacher's targets once, for all students"),
    "release": ("commands.release", "turn a run into a release"),
    "eval": ("commands.eval", "measure a model: perplexity and lm-eval tasks"),
    "generate": ("commands.generate", "let a model continue a text, or time it"),
    "serve": ("commands.serve", "serve a model by OpenAI's HTTP API"),
    "doctor": ("commands.doctor", "say what this machine has and what a run would take"),
    "compare": ("commands.compare", "run the variants of a study and compare them"),
    "config": ("commands.config", "show a configuration as it is resolved, or list the shipped ones"),
    "fetch-teacher": ("commands.fetch_teacher", "fetch the quickstart's teacher"),
    "summarize": ("commands.summarize", "sum up a run and its release"),
    "data inspect": ("data.commands.inspect", "show what a configuration would train on"),
    "data pretokenize": ("data.commands.pretokenize", "tokenize the corpus once, into memory-mapped shards"),
    "data duplicates": ("data.commands.duplicates", "list the documents that occur more than once"),
    "data holdout": ("data.commands.holdout", "gather held-out documents into one shard"),
    "data train-tokenizer": ("data.commands.train_tokenizer", "train a SentencePiece tokenizer"),
    "data sample": ("data.commands.sample", "write the sample corpus"),
    "data bench": ("data.commands.bench", "time the stream beside its peers"),
}
# verb: the extra of setup.cfg that it needs
EXTRA_OF = {
    **dict.fromkeys(("pretrain", "finetune", "run", "cache-teacher", "compare", "summarize", "data inspect"), "train"),
    "serve": "serve",
}
TRAINING = ("pretrain", "finetune", "cache-teacher")
ASK_FOR_HELP = ("", "-h", "--help", "help")
USAGE = 2  # argparse's exit code for arguments that it cannot read


def call(argv: Sequence[str]) -> int:
    """The exit code of the command that `argv` names; without a known verb, of the list of verbs."""
    verb, rest = split(argv)
    if verb not in VERBS:
        asked = " ".join(argv[:1]) in ASK_FOR_HELP or (list(argv[:1]) == ["data"] and "".join(argv[1:]) in ASK_FOR_HELP)
        return until_nobody_reads(list_verbs) if asked else refuse(verb)
    command = importlib.import_module(f"fbitrain.{VERBS[verb][0]}")

    def main(arguments: argparse.Namespace) -> int | None:
        if verb in EXTRA_OF:
            require_extra(EXTRA_OF[verb], f"fbitrain {verb}")
        code: int | None = command.main(arguments)
        return code

    return run(main, command.parser(), rest)


def split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of two words for the data room, and the arguments after it."""
    n_words = 2 if argv and argv[0] == "data" else 1
    return " ".join(argv[:n_words]), list(argv[n_words:])


def list_verbs() -> int:
    print("usage: fbitrain VERB …, and fbitrain VERB --help for one of these:")
    for verb, (_, description) in VERBS.items():
        print(f"  {verb:<22}{description}")
    return 0


def refuse(verb: str) -> int:
    near = difflib.get_close_matches(verb, VERBS, n=1)
    hint = f"did you mean {near[0]}?" if near else "`fbitrain` alone lists them"
    print(f"fbitrain: {verb!r} is no verb; {hint}", file=sys.stderr)
    return USAGE


def leave_script(module: str, file: str) -> None:
    """What a script of launch/ does: the verb that it is called after, unless a worker process imports the script."""
    if module == "__main__":
        leave([Path(file).stem.replace("_", "-"), *sys.argv[1:]])


def leave(argv: Sequence[str]) -> NoReturn:
    """Calls the command that `argv` names and ends this process with its exit code.

    A training process ends without the interpreter's own end, its work done and its files written: there the threads of
    process groups abort a rank now and then, and the launcher would report a signal. A rank that failed leaves out the
    exit functions too, for they may wait for the other ranks.
    """
    code = call(argv)
    if split(argv)[0] not in TRAINING:
        sys.exit(code)
    if not code:
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
