"""Turn a run into a release: `python launch/release.py runs/NAME --format dense,packed --out releases/NAME`."""

from __future__ import annotations

import argparse
from pathlib import Path


def main(arguments: argparse.Namespace) -> None:
    from fbitrain.releasing.release import phase_of, release  # torch is not needed to read the arguments

    formats = [name.strip() for name in arguments.format.split(",")]
    checkpoint = release(arguments.run, arguments.out, formats, arguments.dtype)
    phase = phase_of(checkpoint)
    print(f"released {checkpoint}" + (f": {phase}" if phase else ""))
    for name in formats:
        weights = [path for path in (arguments.out / name).iterdir() if path.suffix in (".safetensors", ".gguf")]
        print(f"  {arguments.out / name}: {sum(path.stat().st_size for path in weights) / 1e6:,.1f} MB of weights")
    print(f"  {arguments.out / 'README.md'}: the model card")


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain release", description=__doc__)
    commands.add_argument("run", type=Path, help="a run folder, whose newest checkpoint is taken, or one checkpoint")
    commands.add_argument("--out", type=Path, required=True, help="the release folder; an older release is replaced")
    commands.add_argument(
        "--format", default="dense,packed", help="dense, packed, gguf, or several with commas (default: dense,packed)"
    )
    commands.add_argument("--dtype", default="float16", help="float16 (default), bfloat16 or float32, for all but bits")
    return commands
