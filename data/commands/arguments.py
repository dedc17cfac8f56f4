"""The arguments that the data room's commands share."""

from __future__ import annotations

import argparse


def config_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser of `fbitrain data VERB config.yaml [section.key=value …]`."""
    parser = argparse.ArgumentParser(prog=f"fbitrain data {verb}", description=description)
    parser.add_argument("config", help="a training configuration, or any YAML file with a data: section")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override fields of the file")
    return parser
