"""`fbitrain VERB …` and `python -m fbitrain VERB …`."""

from __future__ import annotations

import sys

from fbitrain.commands.verbs import leave


def main() -> None:
    leave(sys.argv[1:])


if __name__ == "__main__":
    main()
