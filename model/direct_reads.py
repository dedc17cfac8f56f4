"""Weights that the module around a Linear computes with by itself, as Mamba does with its dt_proj's.

It would go on with a binary layer's latent weights, and neither an error nor a binary product would come of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from fbitrain.base.errors import UserError
from fbitrain.model.methods import FullLinear
from fbitrain.model.refusals import skip_for_all


def check_direct_reads(linears: Mapping[str, FullLinear], run: Callable[[], object]) -> None:
    """Raises UserError if `run`, a forward pass, computes with the weight of one of `linears` outside its own forward.

    A look at a weight's dtype, shape or device is not computing. A Linear that `run` does not use, an expert that no
    token was sent to for example, is no error.
    """
    watch = _Watch(linears)
    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(linear.module.register_forward_pre_hook(watch.entered(name)))
            stack.enter_context(linear.module.register_forward_hook(watch.left(name), always_call=True))
        stack.enter_context(watch)
        run()
    for name in watch.read:
        raise UserError(
            f"the weight of {name} is read by the module around it, which would miss that it is binary; "
            f"add {skip_for_all(name)!r} to binarize.skip to keep all of that name in full precision"
        )


class _Watch(TorchFunctionMode):
    """Sees every function of torch that is called, and notes whose weight it was given."""

    def __init__(self, linears: Mapping[str, FullLinear]) -> None:
        super().__init__()
        self._names = {id(linear.parameter): name for name, linear in linears.items()}
        self._running: set[str] = set()
        self.read: list[str] = []

    def entered(self, name: str) -> Callable[..., None]:
        return lambda *_: self._running.add(name)

    def left(self, name: str) -> Callable[..., None]:
        return lambda *_: self._running.discard(name)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(part, Tensor) for part in _flat([result])):
            given = (self._names.get(id(value)) for value in _flat([*args, *(kwargs or {}).values()]))
            self.read += [name for name in given if name and name not in self._running]
        return result


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """The values, those of lists and tuples among them in their place."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from value
        else:
            yield value
