"""What `pip install fbitrain` leaves to its extras: packages that only some commands need."""

from __future__ import annotations

from importlib.util import find_spec

from fbitrain.base.errors import UserError

# extra: the modules that it brings (setup.cfg has the packages)
EXTRAS = {"train": ("deepspeed", "tensorboard", "matplotlib"), "serve": ("starlette", "uvicorn")}


def missing(extra: str) -> list[str]:
    """The modules of `extra` that are not installed."""
    return [name for name in EXTRAS[extra] if find_spec(name) is None]


def require_extra(extra: str, what: str) -> None:
    """Raises UserError if a module of `extra` is not installed, which `what` needs."""
    if modules := missing(extra):
        are, them = ("is", "it") if len(modules) == 1 else ("are", "them")
        named = " and ".join([", ".join(modules[:-1]), modules[-1]]) if len(modules) > 1 else modules[0]
        raise UserError(f"{named} {are} not installed, and {what} needs {them}; pip install 'fbitrain[{extra}]'")
