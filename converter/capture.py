"""Capture a model as an FX graph with torch.export, and watch its submodules run.

The graph says *what* is computed; the watched calls say *who* computed it, so that arguments of
a submodule and values in the graph can be matched by value, never by name.
"""

from __future__ import annotations

import copy
import warnings
from collections import UserDict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from reattend.errors import CaptureError
from reattend.inputs import is_hf, made_up, resized, without_cache
from reattend.passes.base import CAPTURED
from reattend.passes.evaluate import Evaluator
from reattend.passes.normalize.writes import WritesToScatter
from reattend.running import evaluation, uncached
from reattend.tracing import RANGES, trace

#: tokens from which a model is not run only to see what it does there
LONGEST = 8192


@dataclass
class Call:
    """One call of a submodule: its arguments after it and its result, tensors by reference."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Capture:
    """A model's graph and the inputs it was captured with.

    `gm` is rewritten to normal forms; `exact` stays as captured, and computes bit for bit what
    the model does where the kernels are deterministic. `left_out`: modules that torch.export could
    not follow, each one operation of the graph (`reattend.holes`), and why.
    """

    model: nn.Module
    gm: fx.GraphModule
    inputs: dict[str, Any]
    sizes: dict[str, int]
    exact: fx.GraphModule | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def placeholders(self, inputs: dict[str, Any] | None = None) -> dict[fx.Node, Any]:
        """The graph's input nodes with the values they take under `inputs`."""
        nodes = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        flat = torch.utils._pytree.tree_leaves(list((inputs or self.inputs).values()))
        return dict(zip(nodes, flat, strict=True))

    def values(self, nodes: list[fx.Node], inputs: dict[str, Any]) -> dict[fx.Node, Any]:
        """Values of nodes of `gm` as the model itself computes them.

        Normal forms round differently (a norm, a softmax), and in 16 bits that grows over
        layers until two runs cannot be matched. So whatever the graph as captured has too is
        computed there, and only nodes that the normal forms added are computed in `gm`.
        """
        known: dict[fx.Node, Any] = dict(self.placeholders(inputs))
        if self.exact is not None:
            twins = {n.name: n for n in self.exact.graph.nodes}
            same = {n: twins[n.meta[CAPTURED]] for n in nodes if n.meta.get(CAPTURED) in twins}
            given = {twins[n.name]: v for n, v in known.items()}
            run = Evaluator(self.exact).run(list(same.values()), given)
            known.update(zip(same, run, strict=True))
        rest = [n for n in nodes if n not in known]
        known.update(zip(rest, Evaluator(self.gm).run(rest, known), strict=True))
        return {n: known[n] for n in nodes}

    def outside(self, most: int = LONGEST) -> dict[int, str]:
        """Lengths up to `most` that the graph does not hold for, where Python asked for the length.

        With each the end of the range behind which it lies, in words.

        A model may do something else from some length on (compress every 128 tokens), and its
        graph shows what it does at the example's.
        """
        found: dict[int, str] = {}
        ranges = self.gm.meta.get(RANGES, {})
        for node, value in self.placeholders().items():
            if not isinstance(value, Tensor):
                continue
            for size, symbol in zip(value.shape, node.meta["val"].shape, strict=True):
                low, high = ranges.get(str(symbol), (0, None))
                if size != self.sizes.get("N"):
                    continue
                if low > 2:
                    found[low - 1] = f"from {low} tokens on only"
                if high is not None:  # blocks may see their neighbours
                    ends = {min(n, most) for n in (high + 7, 4 * high + 7) if n <= LONGEST}
                    found |= {n: f"up to {high} tokens only" for n in ends if n > high}
        return {length: found[length] for length in sorted(found)}

    @property
    def positions(self) -> int:
        """The longest text that the model has positions for; `LONGEST` where it does not say."""
        config: Any = getattr(self.model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else None
        most = getattr(text, "max_position_embeddings", None)
        return most if isinstance(most, int) and 0 < most < LONGEST else LONGEST

    def probe(
        self, length: int | None = None, padded: bool = False, side: slice = slice(0, 3)
    ) -> dict[str, Any]:
        """The example inputs at another length, the first row padded where there is a mask.

        A mask is a tensor of ones [B, N]; or of False, as torch's own modules mark padding. Left
        padding (the default) leaves rows that see nothing; the right side does not, so there every
        value is comparable.
        """
        inputs = dict(self.inputs)
        if length is not None and "N" in self.sizes:
            inputs = resized(inputs, self.sizes["N"], length)
        if padded:
            for name, value in inputs.items():
                if not isinstance(value, Tensor) or value.dim() != 2:
                    continue
                hides = value.dtype == torch.bool and not bool(value.any())
                if hides or bool((value == 1).all()):
                    value = value.clone()
                    value[0, side] = hides
                    inputs[name] = value
        return inputs


def capture(model: nn.Module, inputs: dict[str, Any] | None = None, images: bool = True) -> Capture:
    """Export `model` without cache, sizes symbolic where the model allows.

    Args:
        model: any module; not changed.
        inputs: example keyword arguments; None makes them up for transformers models. Batch
            and length must be at least 2 and distinct, or sizes freeze.
        images: heights and widths of images are symbolic too, where that is feasible.

    Raises:
        CaptureError: torch.export cannot follow the model.
        ArgumentError: inputs are needed.
    """
    if inputs is None:
        if not is_hf(model):
            from reattend.errors import ArgumentError

            raise ArgumentError(
                "example inputs are needed for a module that is not from transformers",
                where=type(model).__name__,
                next_step="pass inputs={'name': tensor, ...} with batch and length >= 2, distinct",
            )
        inputs = made_up(model)
    elif is_hf(model):
        inputs = without_cache(model, inputs)
    with evaluation(model), uncached(model), torch.no_grad():
        gm, left_out = trace(model, inputs, images)
    WritesToScatter()(gm)
    for node in gm.graph.nodes:
        node.meta[CAPTURED] = node.name
    with warnings.catch_warnings():  # copying a tree of torch's own warns of its class
        warnings.simplefilter("ignore", FutureWarning)
        exact = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    return Capture(model, gm, inputs, _sizes(inputs), exact, left_out)


def tokens_first(captured: Capture, core: fx.Node) -> None:
    """Note where the model's inputs have tokens before the batch, [N, B, ..], as a core shows."""
    q = core.args[0].meta["val"]
    for node in captured.gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.dim() >= 2:
            if [str(s) for s in value.shape[:2]] == [str(q.shape[2]), str(q.shape[0])]:
                sizes = captured.placeholders()[node].shape
                captured.sizes = {"B": sizes[1], "N": sizes[0]}
            return


def _sizes(inputs: dict[str, Any]) -> dict[str, int]:
    """B and N of the first tensor with two axes or more."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim() >= 2:
            return {"B": value.shape[0], "N": value.shape[1]}
    return {}


def watch(model: nn.Module, paths: set[str], inputs: dict[str, Any]) -> dict[str, Call]:
    """Run the model once and record the calls of the named submodules.

    Returns:
        path -> the first call (a module called twice keeps its first).

    Raises:
        CaptureError: the model does not take these inputs (tokens outside its vocabulary).
    """
    return {path: calls[0] for path, calls in watch_all(model, paths, inputs).items()}


def _kept(value: Any) -> Any:
    """Arguments with mappings as they are now: later modules may write into them."""
    if type(value) is dict or isinstance(value, UserDict):
        same = copy.copy(value)
        for key, item in value.items():
            same[key] = _kept(item)
        return same
    if type(value) in (tuple, list):
        return type(value)(_kept(item) for item in value)
    return value


def watch_all(model: nn.Module, paths: set[str], inputs: dict[str, Any]) -> dict[str, list[Call]]:
    """`watch`, every call of each submodule in order."""
    calls: dict[str, list[Call]] = {}
    handles = []
    for path in paths:
        module = model.get_submodule(path)

        def hook(_m: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
            calls.setdefault(path, []).append(Call(_kept(args), _kept(kwargs), output))

        handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        with evaluation(model), torch.no_grad():
            model(**inputs)
    except (IndexError, TypeError, ValueError) as problem:
        raise CaptureError(
            "the model does not run on the example inputs",
            where=type(model).__name__,
            why=f"{type(problem).__name__}: {problem}",
            next_step="check that model(**inputs) runs",
        ) from problem
    finally:
        for handle in handles:
            handle.remove()
    return calls
