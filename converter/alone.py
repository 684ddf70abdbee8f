"""A module is captured alone where the model's own graph holds for one size only.

A model may count its tokens in Python, and then torch.export writes the example's length into the
whole graph (Funnel's lists of positions). The attention inside is given tensors and knows no such
number, so it is captured once more as a model of its own: with what the model hands it, all sizes
symbolic. The model goes on making its inputs, at every length and padding that the proof wants.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from reattend.capture import Call, Capture, capture, watch_all
from reattend.errors import CaptureError
from reattend.found import RefusedSite
from reattend.judge import Case, judged
from reattend.passes.find.sites import Found, find
from reattend.search import Search

_PLAIN = (bool, int, float, str, type(None))
#: padding behind which every row still sees something
_END = slice(-3, None)


class NotAlone(Exception):
    """What a module is called with is more than tensors and constants."""


@dataclass(frozen=True)
class Layout:
    """The arguments of a call: leaf by leaf a constant, or the name of a tensor.

    A tensor that stands in two places has one name: queries and keys of one sequence are one.
    """

    leaves: tuple[Any, ...]
    names: tuple[str | None, ...]
    nesting: TreeSpec

    def call(self, tensors: dict[str, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments."""
        pairs = zip(self.leaves, self.names, strict=True)
        leaves = [leaf if name is None else tensors[name] for leaf, name in pairs]
        args, kwargs = tree_unflatten(leaves, self.nesting)
        return args, kwargs


def laid_out(call: Call) -> tuple[Layout, dict[str, Tensor]]:
    """The layout of a call, and its tensors.

    Raises:
        NotAlone: it holds caches or other objects.
    """
    leaves, nesting = tree_flatten((call.args, call.kwargs))
    known: dict[int, str] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            known.setdefault(id(leaf), f"x{len(known)}")
        elif not isinstance(leaf, _PLAIN):
            raise NotAlone(f"it is called with a {type(leaf).__name__}")
    names = tuple(known.get(id(leaf)) if isinstance(leaf, Tensor) else None for leaf in leaves)
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    tensors = {known[id(leaf)]: leaf for leaf in leaves if isinstance(leaf, Tensor)}
    return Layout(constants, names, nesting), tensors


class Alone(nn.Module):
    """A module of a model at its own path, called with the tensors of its calls there."""

    def __init__(self, module: nn.Module, path: str, layout: Layout) -> None:
        super().__init__()
        self._path, self._layout = path, layout
        place: nn.Module = self
        *above, name = path.split(".")
        for part in above:
            place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        place.add_module(name, module)

    def forward(self, **tensors: Tensor) -> Any:
        """The module's result."""
        args, kwargs = self._layout.call(tensors)
        return self.get_submodule(self._path)(*args, **kwargs)


@dataclass
class AloneCapture(Capture):
    """A capture whose inputs at other lengths are what the model hands the module there."""

    outer: Capture = field(kw_only=True)
    path: str = field(kw_only=True)
    layout: Layout = field(kw_only=True)
    always_padded: bool = field(default=False, kw_only=True)
    _known: dict[Any, dict[str, Any]] = field(default_factory=dict, kw_only=True)

    def probe(
        self, length: int | None = None, padded: bool = False, side: slice = slice(0, 3)
    ) -> dict[str, Any]:
        """See `Capture.probe`; the length is that of the model's inputs.

        Where the call has its mask only if something is padded, the end of the first row is.
        """
        if self.always_padded and not padded:
            padded, side = True, _END
        at = (length, padded, side.start, side.stop)
        if at not in self._known:
            inputs = self.outer.probe(length, padded, side)
            call = the_call(self.outer.model, self.path, inputs)
            layout, self._known[at] = laid_out(call)
            if layout != self.layout:
                raise CaptureError(
                    "a module is called in another way at another length", where=self.path
                )
        return self._known[at]


def the_call(model: nn.Module, path: str, inputs: dict[str, Any]) -> Call:
    """The one call of the module at `path`.

    Raises:
        CaptureError: it is called several times, or the model does not take the inputs.
    """
    calls = watch_all(model, {path}, inputs).get(path, [])
    if len(calls) != 1:
        raise CaptureError(f"a module is called {len(calls)} times", where=path)
    return calls[0]


class AloneSearch(Search):
    """`Search` in one module of a model.

    Args:
        outer: the search in the model.
        path: of the module.

    Raises:
        CaptureError: torch.export cannot follow it alone either.
        NotAlone: its call holds more than tensors.
    """

    apart = True

    def __init__(self, outer: Search, path: str) -> None:
        self.deferred = ""
        of = outer.captured
        layout, tensors = laid_out(the_call(of.model, path, of.inputs))
        padded = of.probe(padded=True, side=_END)
        fuller, masked = laid_out(the_call(of.model, path, padded))
        left_out = fuller != layout  # a mask that would hide nothing is not handed over
        if left_out:
            layout, tensors = fuller, masked
        alone = Alone(of.model.get_submodule(path), path, layout)
        made = vars(capture(alone, tensors)) | {"sizes": of.sizes}
        entered = AloneCapture(**made, outer=of, path=path, layout=layout, always_padded=left_out)
        self._enter(entered, outer.whole)


def frozen(verdict: tuple[Case, RefusedSite | None]) -> bool:
    """Whether a block was refused because its graph holds for the example's length only."""
    return verdict[1] is not None and verdict[1].step == "lengths"


def judged_alone(search: Search, item: Found) -> tuple[Case, RefusedSite | None] | None:
    """The block read from its module alone and judged; None where that does not help either.

    A block with a cache is left: its module's call does not show what a cache keeps.
    """
    place = search.place(item)
    if place.binding is None or place.binding.cache is not None or not place.path:
        return None
    case = read_alone(search, place.path)
    return (case, None) if case is not None and case.place.path == place.path else None


def read_alone(search: Search, path: str) -> Case | None:
    """The one block of a module, read from that module alone; None where it is not proven."""
    try:
        alone = AloneSearch(search, path)
        seen = find(alone.gm, alone.captured.placeholders(), alone.inputs_at)
        if len(seen) != 1 or not isinstance(seen[0], Found):
            return None
        alone.locate([seen[0]])
        case, refusal = judged(alone, seen[0])
    except (CaptureError, NotAlone, RuntimeError):
        return None
    return case if refusal is None else None
