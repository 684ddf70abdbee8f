"""What the steps of `find_attention` share: the normalised capture, and runs of the model."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from reattend.capture import LONGEST, Call, Capture, capture, tokens_first, watch
from reattend.errors import CaptureError
from reattend.frame import call_number, dropouts
from reattend.frequencies import exact_frequencies
from reattend.hollow import hollow, is_meta
from reattend.inputs import is_hf
from reattend.install.adapter import Adapter
from reattend.locate import Place, locate
from reattend.ownercheck import Watched
from reattend.passes.find.owners import owner_of
from reattend.passes.find.sites import Found
from reattend.passes.normalize import normalize
from reattend.passes.normalize.forms import attention, is_op
from reattend.sizecheck import graph_check

#: what is told of a block that was read from a model without weights
DEFERRED = "the weights are not here (meta device): its proof waits for them"


class Search:
    """One model, captured and normalised.

    Attributes:
        captured: the graph and the inputs it was captured with.
        passes: what each normalising pass did.
        ours: blocks that an earlier conversion replaced, by path.
        whole: the graph cannot take the model's place, so every block needs an owning module.
        watched: calls of the owners; filled by `locate`.
        deferred: why nothing can be proven now: the model has no weights. Empty if it has.
        apart: the graph is that of one module of the model (`reattend.alone`).
    """

    apart = False

    def __init__(
        self, model: nn.Module, inputs: dict[str, Any] | None, images: bool = True
    ) -> None:
        self.deferred = DEFERRED if is_meta(model) else ""
        model = hollow(model) if self.deferred else model
        self._enter(capture(model, inputs, images), is_hf(model))

    def _enter(self, captured: Capture, whole: bool) -> None:
        """Normalise what was captured; `whole` as above, whatever was left out."""
        self.captured = captured
        self._drops = dropouts(self.gm)
        self.passes = normalize(self.gm)
        first = next((n for n in self.gm.graph.nodes if is_op(n, attention)), None)
        if first is not None:
            tokens_first(self.captured, first)
        self.ours = {p: m for p, m in captured.model.named_modules() if isinstance(m, Adapter)}
        self.whole = whole or bool(captured.left_out)
        self.watched = Watched(self.captured, set())
        self._places: dict[int, Place] = {}
        self._elsewhere: dict[int, dict[str, Call]] = {}
        self._ends: str | None = None

    @property
    def gm(self) -> fx.GraphModule:
        """The normalised graph."""
        return self.captured.gm

    def inputs_at(self, length: int | None, padded: bool) -> dict[fx.Node, Any]:
        """Placeholder values at another length, padded on the left or not."""
        return self.captured.placeholders(self.captured.probe(length, padded))

    def locate(self, found: list[Found]) -> None:
        """Find the owner of every block; without weights nothing runs, and the graph has to say."""
        if self.deferred:
            for item in found:
                path = owner_of(item.region.nodes)
                number = call_number(item.region.core, path)
                self._places[id(item)] = Place(path, number=number)
                if item.region.rotation is not None:
                    exact_frequencies(self.captured, item)
            return
        self._places = locate(self.captured, found, self._drops)
        owners = {p.path for p in self._places.values() if p.binding is not None}
        self.watched = Watched(self.captured, owners)

    def elsewhere(self, path: str, length: int) -> Call | None:
        """The call of the module at `path` at a length that the graph was not captured at.

        None if the model does not run there, or the module does not.
        """
        if length not in self._elsewhere:
            try:
                inputs = self.captured.probe(length)
                self._elsewhere[length] = watch(self.captured.model, self.watched.paths, inputs)
            except (CaptureError, RuntimeError, AssertionError):
                self._elsewhere[length] = {}
        return self._elsewhere[length].get(path)

    def graph_ends(self) -> str:
        """Why the graph is not the model at some length; empty where it holds for every length.

        It has to hold beyond the model's positions where it may take the model's place.
        """
        if self._ends is None:
            most = self.captured.positions if self.whole else LONGEST
            reasons = (graph_check(self.captured, n) for n in self.captured.outside(most))
            self._ends = next(filter(None, reasons), "")
        return self._ends

    def place(self, item: Found) -> Place:
        """Where a block lives."""
        return self._places[id(item)]
