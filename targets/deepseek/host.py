"""The model around its attention, read as the parts a DeepSeek decoder has, or why it is none.

A pre-norm decoder is recognised by values: in one short run, the norm before the attention is the
module whose result the attention was given; the residual sum, the gated product in the MLP, the
scale of embeddings and logits are recomputed and compared. Constant factors between the parts go
into weights. What was read is proven once more, as a whole, when the finished checkpoint is loaded
(`proof`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reattend.targets.deepseek.host_layer import Layer, read_layer
from reattend.targets.deepseek.host_norm import Norm, NotThere, rms_norm
from reattend.targets.deepseek.obstacles import KEEP_FORMAT, Obstacle
from reattend.targets.deepseek.trace import Trace, multiple, record, same, within


@dataclass(frozen=True)
class Host:
    """Everything but attention.

    Attributes:
        embedding: [V, D], as stored; multiply by `embedding_factor`.
        head: [V, D], as stored; multiply by `head_factor`.
        tied: embedding and head are one tensor.
        layers: by attention path, in order.
        norm: before the head.
    """

    embedding: Tensor
    embedding_factor: float
    head: Tensor
    head_factor: float
    tied: bool
    layers: dict[str, Layer]
    norm: Norm

    @property
    def scaled(self) -> bool:
        """Whether a factor has to go into embedding or head, which unties them."""
        return self.embedding_factor != 1.0 or self.head_factor != 1.0


def read_host(model: nn.Module, paths: list[str]) -> tuple[Host | None, list[Obstacle]]:
    """Read a decoder around the attention modules at `paths` (in the order of layers).

    Returns:
        The host, or None and every obstacle met.
    """
    named: dict[str, nn.Module] = dict(model.named_modules())
    layers = {path: _layer_of(path) for path in paths}
    if None in layers.values() or len(set(layers.values())) < len(layers):
        odd = next((p for p, layer in layers.items() if layer is None), paths[0])
        return None, [Obstacle(odd, "it is not the only attention of a layer", KEEP_FORMAT)]
    trace = record(model)
    found: list[Obstacle] = []
    read: dict[str, Layer] = {}
    for path, layer in layers.items():
        try:
            read[path] = read_layer(named, trace, str(layer), path, model.config)
        except NotThere as problem:
            found.append(Obstacle(str(layer), str(problem), KEEP_FORMAT))
    if found:
        return None, found
    try:
        return _outside(model, named, trace, layers, read), []
    except NotThere as problem:
        return None, [Obstacle(type(model).__name__, str(problem), KEEP_FORMAT)]


def _layer_of(path: str) -> str | None:
    """The entry of a stack that holds a module: up to the last number in its path."""
    found = re.fullmatch(r"(.*\.\d+)\.[^\d.][^.]*(?:\.[^\d.][^.]*)*", path)
    return found[1] if found else None


def _outside(
    model: Any,
    named: dict[str, nn.Module],
    trace: Trace,
    layers: dict[str, str | None],
    read: dict[str, Layer],
) -> Host:
    """Embedding, final norm and head.

    Raises:
        NotThere: one of them is not what a DeepSeek model has.
    """
    ends = [str(layer) for layer in layers.values()]
    for before, after in zip(ends, ends[1:], strict=False):
        given, result = trace.calls[after].inputs[0], trace.calls[before].output
        if result is None or not same(given, result):
            raise NotThere(f"something stands between {before} and {after}")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): path for path, module in named.items()}
    weight = embedding.weight.detach()
    factor = multiple(trace.calls[ends[0]].inputs[0], weight[trace.ids])
    if factor is None:
        raise NotThere("more than a constant factor stands between embedding and first layer")
    call = trace.calls.get(paths.get(id(head), ""))
    if not isinstance(head, nn.Linear) or call is None or call.output is None:
        raise NotThere("the head is not one linear layer")
    if head.bias is not None:
        raise NotThere("the head has a bias")
    norms = [p for p in trace.giving(call.inputs[0]) if not within(p, ends[-1])]
    last = trace.calls[ends[-1]].output
    norm = next((p for p in norms if last is not None and p in trace.reading(last)), None)
    if norm is None:
        raise NotThere("no norm stands between the last layer and the head")
    assert trace.logits is not None
    logits = multiple(trace.logits, call.output)
    if logits is None:
        raise NotThere("logits are changed after the head (a cap, or steps of the model's own)")
    if weight.shape[0] != head.weight.shape[0] or head.weight.shape[1] != weight.shape[1]:
        raise NotThere("embedding and head have different sizes")
    return Host(
        weight, factor, head.weight.detach(), logits, head.weight is embedding.weight, read,
        rms_norm(named[norm], norm),
    )  # fmt: skip
