"""torch.export with whatever it cannot follow left out of the trace.

What fails is seen from the module that was running. It, or the smallest module around it whose
results have predictable shapes, becomes a hole (`reattend.holes`), and so do the others of its
class; then the export is tried again.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from reattend.corewatch import cores_by_module
from reattend.errors import CaptureError
from reattend.holes import Hole, Openings, Sizes, Unshaped, fill
from reattend.host import device_of
from reattend.install.binding import signature_of
from reattend.running import running_modules
from reattend.unwieldy import FIXED, has_images, noticing, symbolic_axes

#: key of a graph's `meta`: the sizes it holds for, by symbol: smallest and, where finite, largest
RANGES = "ranges"
#: classes of modules that are left out at most
_ATTEMPTS = 8


def trace(
    model: nn.Module, inputs: dict[str, Any], images: bool = True
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The graph of a model, sizes symbolic where the model allows.

    Args:
        model: in evaluation mode; not changed.
        inputs: example keyword arguments.
        images: heights and widths of images are symbolic too, where that is feasible.

    Returns:
        The graph, and by path the modules left out and what torch.export said.

    Raises:
        CaptureError: torch.export cannot follow the model, or what it cannot follow is no part
            that could be left out.
    """
    try:
        return _export(model, inputs, images), {}
    except Exception as problem:
        return _around(model, inputs, problem, images)


def _export(model: nn.Module, inputs: dict[str, Any], images: bool) -> fx.GraphModule:
    if not has_images(inputs):
        return _exported(model, inputs, True)
    if images:
        with noticing() as seen:
            try:
                return _exported(model, inputs, True)
            except Exception:
                if not seen.unwieldy:
                    raise
    gm = _exported(model, inputs, False)
    gm.meta[FIXED] = True
    return gm


def _exported(model: nn.Module, inputs: dict[str, Any], images: bool) -> fx.GraphModule:
    """The graph; `images`: heights and widths are symbolic too."""
    shapes = {name: symbolic_axes(v, images) for name, v in inputs.items()}
    quiet = redirect_stderr(StringIO())  # it prints the graph of a failure
    with _named(model, inputs), _settled(), quiet:
        program = torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=False)
    gm = program.module()
    assert isinstance(gm, fx.GraphModule)
    ends = {str(symbol): (r.lower, r.upper) for symbol, r in program.range_constraints.items()}
    gm.meta[RANGES] = {
        symbol: (int(low), int(high) if high.is_Integer else None)
        for symbol, (low, high) in ends.items()
        if low.is_Integer
    }
    return gm


@contextmanager
def _named(model: nn.Module, inputs: dict[str, Any]) -> Iterator[None]:
    """A signature that names every input: torch.export loses sizes of what `**kwargs` takes."""
    if all(name in signature_of(model).parameters for name in inputs):
        yield
        return
    before, inside = vars(model).get("forward"), model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return inside(*args, **kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    names = [inspect.Parameter(name, kind, default=None) for name in inputs]
    forward.__signature__ = inspect.Signature(names)  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if before is None:
            del model.forward
        else:
            model.forward = before


@contextmanager
def _settled() -> Iterator[None]:
    """`module.to(dtype)` inside a forward is left out where it changes nothing (routers).

    torch.export cannot follow it: the weights are stand-ins that cannot be swapped.
    """
    convert = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        wanted = [*args, *kwargs.values()]
        if len(wanted) == 1 and isinstance(wanted[0], torch.dtype):
            tensors = [*self.parameters(), *self.buffers()]
            if all(t.dtype == wanted[0] for t in tensors if t.is_floating_point()):
                return self
        return convert(self, *args, **kwargs)

    nn.Module.to = to  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = convert  # type: ignore[method-assign]


def _around(
    model: nn.Module, inputs: dict[str, Any], first: Exception, images: bool
) -> tuple[fx.GraphModule, dict[str, str]]:
    """`trace` for a model that torch.export cannot follow everywhere."""
    if device_of(model).type == "meta":
        raise _failed(model, first) from first
    try:
        openings = Openings(model, inputs)
    except Exception:
        raise _failed(model, first) from first  # the model runs at one size only
    cores = cores_by_module(model, inputs)
    left_out: dict[str, str] = {}
    sizes: dict[str, Sizes] = {}
    alone: set[type[nn.Module]] = set()
    closed: set[str] = set()  # called with more than tensors, which a hole cannot hand over
    problem, where = first, ""
    for _ in range(_ATTEMPTS):
        holes: list[Hole] = []
        try:
            with openings.open(sizes) as holes, running_modules(model) as running:
                gm = _export(model, inputs, images)
        except Exception as again:
            problem, where = again, running[-1] if running else ""
            said = _said(again)
            if isinstance(again, Unshaped) and where in sizes:
                said = left_out.pop(where)
                del sizes[where]
                closed.add(where)
        else:
            fill(gm, holes)
            return gm, left_out
        chosen = _smallest(openings, where, sizes, closed)
        if chosen is None:
            break
        for inside in [p for p in sizes if p.startswith(f"{chosen}.")]:
            del sizes[inside], left_out[inside]
        kind = type(model.get_submodule(chosen))
        one = kind not in alone and any(f"{p}.".startswith(f"{chosen}.") for p in cores)
        alone.add(kind)  # attention itself is given up one block at a time, until a second fails
        for path, module in model.named_modules():
            if (path == chosen if one else type(module) is kind) and path not in sizes:
                try:
                    sizes[path] = openings.sizes(path)
                except Unshaped:
                    continue
                left_out[path] = said
    raise _failed(model, problem, where) from problem


def _smallest(
    openings: Openings, path: str, known: dict[str, Sizes], closed: set[str]
) -> str | None:
    """The smallest submodule around a place that can be left out; None if there is none."""
    while path:
        if path in known:
            return None  # it is left out already, and did not help
        try:
            if path not in closed and openings.sizes(path):
                return path
        except Unshaped:
            pass
        path = path.rpartition(".")[0]
    return None


def _said(problem: Exception) -> str:
    """What torch.export says of a failure; what a size like `u1` is, in words."""
    first = (str(problem).splitlines() or [""])[0]
    if isinstance(problem, GuardOnDataDependentSymNode):
        asked = re.search("data-dependent expression (.+?)(?: \\(unhinted|$)", first)
        told = asked[1] if asked else first
        return (
            f"data-dependent: it reads a size from the values of a tensor and asks whether {told}"
        )
    return f"{type(problem).__name__}: {first}"


def _failed(model: nn.Module, problem: Exception, where: str = "") -> CaptureError:
    name = type(model).__name__
    return CaptureError(
        "torch.export could not capture this model",
        where=f"{name}, {where}" if where else name,
        why=_said(problem),
        next_step="check that model(**inputs) runs; data-dependent Python branches cannot be "
        "captured",
    )
