"""An owner with programs proves itself as a whole: its result in the graph against the adapter's.

The block inside has passed `reattend.selfcheck`; here the programs around it, the binding and the
adapter are checked together, in promoted float64, with random weights and activations, at two
lengths and with padding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from reattend.activations import drawn, redrawn, replaced
from reattend.capture import Call, Capture, watch
from reattend.install.adapter import Adapter
from reattend.install.binding import Binding, bound, read, same, signature_of
from reattend.install.pieces import BEFORE, Path
from reattend.locate import Place
from reattend.mixers.base import Mixer
from reattend.passes.evaluate import Evaluator, attribute
from reattend.passes.find.sites import Found
from reattend.passes.find.streams import read_stream
from reattend.selfcheck import TOLERANCE, second_length
from reattend.selfcheck_weights import random_weights
from reattend.surround import filled
from reattend.weights import build_dense


class _Turned(Adapter):
    """An adapter that takes the graph's rotary tables, where no argument holds them."""

    tables: tuple[Tensor, Tensor] | None = None

    def rotation(self, arguments: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """See `Adapter.rotation`."""
        return super().rotation(arguments) if self.tables is None else self.tables


class Watched:
    """Calls of owners under the inputs of the proof; the model runs once per kind of input."""

    def __init__(self, captured: Capture, paths: set[str]) -> None:
        self.captured, self.paths = captured, paths
        self._calls: dict[tuple[int | None, bool], dict[str, Call]] = {}

    def inputs(self, length: int | None, padded: bool) -> dict[str, Any]:
        """Example inputs, padded on the right: there every value is comparable."""
        return self.captured.probe(length, padded, slice(-3, None))

    def call(self, path: str, length: int | None, padded: bool) -> Call:
        """The call of the module at `path`."""
        if (length, padded) not in self._calls:
            inputs = self.inputs(length, padded)
            self._calls[length, padded] = watch(self.captured.model, self.paths, inputs)
        return self._calls[length, padded][path]


def owner_check(watched: Watched, found: Found, place: Place) -> str:
    """Why the owner's programs are not trusted; empty if they are.

    Args:
        watched: the normalised graph and the owners' calls.
        found: the block, proven by itself.
        place: its owner, with programs.
    """

    def given(length: int | None, padded: bool) -> dict[fx.Node, Any]:
        return watched.captured.placeholders(watched.inputs(length, padded))

    trials: list[tuple[int | None, bool]] = [(None, False), (None, True)]
    longer = second_length(found, given)
    if longer is not None:
        trials.append((longer, True))
    worst = 0.0
    for length, padded in trials:
        call = watched.call(place.path, length, padded)
        worst = max(worst, _trial(watched.captured, found, place, call, given(length, padded)))
    if not worst <= TOLERANCE:
        return (
            f"{place.path} does more than its attention, and rebuilt around it differs by "
            f"{worst:.1e} (limit {TOLERANCE:g})"
        )
    return ""


def _trial(
    captured: Capture, found: Found, place: Place, call: Call, given: dict[fx.Node, Any]
) -> float:
    """Relative difference of the owner's results under these inputs; infinite if one is missing."""
    path, binding, surrounding = place.path, place.binding, place.surrounding
    assert binding is not None and surrounding is not None
    gm, generator = captured.gm, torch.Generator().manual_seed(2)
    weights = random_weights(gm, found.spec, generator)
    for name in sorted(surrounding.names() - weights.keys() - surrounding.constants.keys()):
        weights[name] = _stirred(attribute(gm, name), generator)
    module = captured.model.get_submodule(path)
    arguments = bound(module, call.args, call.kwargs)
    fixed: dict[fx.Node, Any] = {}
    changed: dict[Path, Any] = {}
    activations = drawn(binding)
    for node, at in surrounding.arguments.items():
        if at not in changed:
            changed[at] = redrawn(read(arguments, at), at in activations, generator)
        if changed[at] is not None:  # a mask that hides nothing may be left out of a call
            fixed[node] = changed[at]
    arguments = replaced(arguments, changed)
    opaque = found.spec.core.pattern.kind == "opaque"
    if opaque and binding.mask is not None and read(arguments, binding.mask) is None:
        return 0.0  # called without the mask that is its pattern; the padded trials have it
    around = filled(surrounding, weights.__getitem__).double()
    mixer = _mixer(found, weights)
    adapter = _Turned(mixer, binding, signature_of(module), around)
    adapter.tables, tables = _tables(gm, found, binding, given)
    with torch.no_grad():
        result = adapter.answer(arguments)
    nodes = [node for _, node in surrounding.outputs]
    expected = Evaluator(gm, promote=torch.float64, weights=weights).run(
        nodes, {**given, **tables, **fixed}
    )
    gaps = [
        same(read({"": result}, ("", *at)), value)
        for (at, _), value in zip(surrounding.outputs, expected, strict=True)
    ]
    return max([*gaps, _table_gap(adapter, arguments)])


def _mixer(found: Found, weights: dict[str, Tensor]) -> Mixer:
    memory = found.region.memory
    width = 0 if memory is None else int(memory.meta["val"].shape[-1])
    hidden = int(found.region.hidden.meta["val"].shape[-1])
    return build_dense(found.spec, weights.__getitem__, hidden, width)


def _tables(
    gm: fx.GraphModule, found: Found, binding: Binding, given: dict[fx.Node, Any]
) -> tuple[tuple[Tensor, Tensor] | None, dict[fx.Node, Any]]:
    """cos and sin for the mixer, and their nodes to fix, where no argument holds them.

    The graph would compute them anew in float64, and differ by the rounding of its own dtype.
    """
    region = found.region
    if region.rotation is None or (binding.cos is not None and binding.cos.path[0] != BEFORE):
        return None, {}
    here = read_stream(gm, region.core.args[0], given).rotation
    assert here is not None
    run = Evaluator(gm).run(region.externals, given)
    nodes = dict(zip(region.externals, run, strict=True))
    return (here.cos_NP[None], here.sin_NP[None]), nodes


def _table_gap(adapter: _Turned, arguments: dict[str, Any]) -> float:
    """0 where the tables the programs make equal the graph's, to the rounding of their dtype."""
    if adapter.binding.cos is None or adapter.tables is None or adapter.around is None:
        return 0.0
    made = Adapter.rotation(adapter, adapter.around.prepare(arguments))
    if made is None:
        return float("inf")
    limit = 1e-5 if made[0].element_size() > 2 else 0.03
    pairs = zip(made, adapter.tables, strict=True)
    gap = max(same(a[:1], b) for a, b in pairs)
    return 0.0 if gap <= limit else gap


def _stirred(weight: Tensor, generator: torch.Generator) -> Tensor:
    """A weight of the programs, moved a little: equal gains and zero biases would hide mistakes."""
    if not weight.is_floating_point():
        return weight
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    moved = weight.detach().double() * (1 + 0.1 * noise)
    return moved + 0.01 * noise.abs() if bool((weight != 0).any()) else moved + 0.1 * noise
