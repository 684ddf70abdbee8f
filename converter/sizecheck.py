"""A block that carries the model's own steps is called at a length it was not captured at.

torch.export may write sizes of the example into a graph (a pooling by two, a table of distances).
The proof in the graph cannot see that; the model itself, run at another length, shows it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from reattend.callcheck import rounding_limit
from reattend.capture import Call, Capture
from reattend.errors import ArgumentError
from reattend.install.adapter import Adapter
from reattend.install.binding import bound, shared_tensors, signature_of
from reattend.locate import Place
from reattend.passes.evaluate import Evaluator, attribute
from reattend.passes.find.sites import Found
from reattend.running import evaluation
from reattend.surround import filled
from reattend.weights import build_dense


def size_check(captured: Capture, found: Found, place: Place, call: Call, length: int) -> str:
    """Why the block is not trusted at other lengths; empty if it is.

    Args:
        captured: the normalised graph.
        found: the block.
        place: its owner.
        call: of the owner, at another length than the captured one, without padding.
        length: that one, in tokens of the model's inputs.
    """
    at = _at("block", captured, length)
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
        return f"{at}it fails ({first})"
    return _apart(at, shared_tensors(result, call.output))


def graph_check(captured: Capture, length: int) -> str:
    """Why the whole graph is not trusted at another length; empty if it is.

    Where the model does not run at that length there is nothing to compare.
    """
    at = _at("model", captured, length)
    inputs = captured.probe(length)
    try:
        with evaluation(captured.model), torch.no_grad():
            expected = tree_leaves(captured.model(**inputs))
    except (RuntimeError, IndexError, ValueError, TypeError):
        return ""
    (end,) = (n for n in captured.gm.graph.nodes if n.op == "output")
    nodes = tree_leaves(end.args)
    try:
        got = Evaluator(captured.gm).run(nodes, captured.placeholders(inputs))
    except RuntimeError as problem:
        return f"{at}it fails ({(str(problem).splitlines() or [''])[0][:120]})"
    both = zip(got, expected, strict=False)
    return _apart(at, ((a, b) for a, b in both if isinstance(b, Tensor)))


def _at(what: str, captured: Capture, length: int) -> str:
    """The beginning of a refusal: how far the graph holds, and where it was looked at."""
    holds = captured.outside().get(length, "at the sizes of the example only")
    return f"torch.export follows this {what} {holds}: at {length} tokens "


def _apart(at: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> str:
    """How a result differs from the model's; empty if it does not."""
    for got, expected in pairs:
        if got.shape != expected.shape:
            return f"{at}it returns {tuple(got.shape)} for {tuple(expected.shape)}"
        if not bool(expected.isfinite().all()):
            continue  # the model's own numbers overflow: nothing can be learned from them
        scale = max(float(expected.double().abs().max()), 1e-30)
        gap = float((got.double() - expected.double()).abs().max()) / scale
        limit = rounding_limit(expected.dtype) if expected.is_floating_point() else 0.0
        if not gap <= limit:
            return f"{at}it differs by {gap:.1e} from the model's (limit {limit:.0e})"
    return ""
