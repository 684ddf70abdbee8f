"""A block that carries the model's own steps is called at a length it was not captured at.

torch.export may write sizes of the example into a graph (a pooling by two, a table of distances).
The proof in the graph cannot see that; the model itself, run at another length, shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.callcheck import rounding_limit
from reattend.capture import Call, Capture
from reattend.errors import ArgumentError
from reattend.install.adapter import Adapter
from reattend.install.binding import bound, shared_tensors, signature_of
from reattend.locate import Place
from reattend.passes.evaluate import attribute
from reattend.passes.find.sites import Found
from reattend.surround import filled
from reattend.weights import build_dense


def size_check(captured: Capture, found: Found, place: Place, call: Call) -> str:
    """Why the block is not trusted at other lengths; empty if it is.

    Args:
        captured: the normalised graph.
        found: the block.
        place: its owner.
        call: of the owner, at another length than the captured one, without padding.
    """
    binding, region = place.binding, found.region
    assert binding is not None

    def stored(name: str) -> Tensor:
        tensor: Tensor = attribute(captured.gm, name).detach()
        return tensor

    width = 0 if region.memory is None else int(region.memory.meta["val"].shape[-1])
    mixer = build_dense(found.spec, stored, int(region.hidden.meta["val"].shape[-1]), width)
    around = None if place.surrounding is None else filled(place.surrounding, stored)
    module = captured.model.get_submodule(place.path)
    plain = binding.model_copy(update={"cache": None})  # the watched call has filled its cache
    adapter = Adapter(mixer, plain, signature_of(module), around)
    try:
        with torch.no_grad():
            result = adapter.answer(bound(module, call.args, call.kwargs))
    except (RuntimeError, ArgumentError) as problem:
        first = (str(problem).splitlines() or [""])[0][:120]
        return (
            f"torch.export follows this block at the sizes of the example only: at another length "
            f"it fails ({first})"
        )
    for got, expected in shared_tensors(result, call.output):
        if got.shape != expected.shape:
            return (
                f"torch.export follows this block at the sizes of the example only: at another "
                f"length it returns {tuple(got.shape)} for {tuple(expected.shape)}"
            )
        if not bool(expected.isfinite().all()):
            continue  # the model's own numbers overflow: nothing can be learned from them
        scale = max(float(expected.double().abs().max()), 1e-30)
        gap = float((got.double() - expected.double()).abs().max()) / scale
        limit = rounding_limit(expected.dtype) if expected.is_floating_point() else 0.0
        if not gap <= limit:
            return (
                f"torch.export follows this block at the sizes of the example only: at another "
                f"length it differs by {gap:.1e} from the model's (limit {limit:.0e})"
            )
    return ""
