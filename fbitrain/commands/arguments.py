"""Arguments that several commands share."""

from __future__ import annotations

import argparse


def add_activations(parser: argparse.ArgumentParser) -> None:
    """Adds --activations, which commands that run a packed model share."""
    parser.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="of a packed model on the CPU: float (default), as in training, or int8 per token, faster and less exact",
    )
