"""Show a configuration as a run would have it: `fbitrain config show quickstart`; `fbitrain config list` names them."""

from __future__ import annotations

import argparse

from fbitrain.base.errors import UserError
from fbitrain.base.settings import shipped_configs
from fbitrain.config import load_config, to_yaml


def main(arguments: argparse.Namespace) -> None:
    if arguments.action == "list":
        for path in shipped_configs():
            first = path.read_text(encoding="utf-8").partition("\n")[0]
            print(f"{path.stem:<16}{first.lstrip('# ')}")
        return
    if not arguments.config:
        raise UserError(
            "no configuration is named; give a YAML file, or one of those that `fbitrain config list` names"
        )
    config = load_config(arguments.config, arguments.overrides, world_size=arguments.world_size)
    print(to_yaml(config), end="")


def parser() -> argparse.ArgumentParser:
    commands = argparse.ArgumentParser(prog="fbitrain config", description=__doc__)
    commands.add_argument("action", choices=("show", "list"))
    commands.add_argument("config", nargs="?", help="a YAML file, or the name of a shipped configuration")
    commands.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    commands.add_argument("--world-size", type=int, default=1, help="ranks of the run (default 1)")
    return commands
