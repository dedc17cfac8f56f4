"""Turn a run into a release: `python launch/release.py runs/NAME --format dense,packed --out releases/NAME`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: argparse.Namespace) -> None:
    # torch is not needed to read the arguments
    from fbitrain.releasing.model_card import Labels
    from fbitrain.releasing.release import phase_of, release

    formats = [name.strip() for name in arguments.format.split(",")]
    languages = [code.strip() for code in arguments.language.split(",")]
    labels = Labels(arguments.license, languages, arguments.base_model)
    checkpoint = release(arguments.run, arguments.out, formats, arguments.dtype, labels)
    phase = phase_of(checkpoint)
    print(f"released {checkpoint}" + (f": {phase}" if phase else ""))
    for name in formats:
        weights = [path for path in (arguments.out / name).iterdir() if path.suffix in (".safetensors", ".gguf")]
        print(f"  {arguments.out / name}: {sum(path.stat().st_size for path in weights) / 1e6:,.1f} MB of weights")
    told = f"license {labels.license}, language {arguments.language}"
    print(f"  {arguments.out / 'README.md'}: the model card ({told}; --license, --language and --base-model say it)")


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain release", description=__doc__)
    commands.add_argument("run", type=Path, help="a run folder, whose newest checkpoint is taken, or one checkpoint")
    commands.add_argument("--out", type=Path, required=True, help="the release folder; an older release is replaced")
    commands.add_argument(
        "--format", default="dense,packed", help="dense, packed, gguf, or several with commas (default: dense,packed)"
    )
    commands.add_argument("--dtype", default="float16", help="float16 (default), bfloat16 or float32, for all but bits")
    commands.add_argument("--license", default="unknown", help="for the card, the hub's short name, such as apache-2.0")
    commands.add_argument("--language", default="en", help="for the card, ISO codes with commas (default: en)")
    commands.add_argument(
        "--base-model", default="", metavar="HUB_ID", help="for the card, if fine-tuning named a path"
    )
    return commands
