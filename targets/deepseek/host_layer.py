"""One decoder layer, read by values: norm, attention, sum, norm, gated MLP, sum.

Layout letters: D hidden width, I intermediate width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reattend.targets.deepseek.host_norm import Norm, NotThere, rms_norm
from reattend.targets.deepseek.trace import Trace, close, same, summed, within


@dataclass(frozen=True)
class Mlp:
    """down(act(gate x) * up x); biases where there are any."""

    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    act: str


@dataclass(frozen=True)
class Layer:
    """The factors multiply what attention and MLP add to the residual stream."""

    before: Norm
    between: Norm
    mlp: Mlp
    attention_factor: float
    mlp_factor: float


def read_layer(
    named: dict[str, nn.Module], trace: Trace, layer: str, attention: str, config: Any
) -> Layer:
    """Read the layer that holds `attention`.

    Raises:
        NotThere: it is no pre-norm layer with one gated MLP.
    """
    inside = f"{layer}."
    call, whole = trace.calls.get(attention), trace.calls.get(layer)
    if call is None or whole is None or not whole.inputs:
        raise NotThere("its attention is not run through the layer's own module")
    if call.times > 1 or whole.times > 1:
        raise NotThere("it is called several times in one run")
    stream = whole.inputs[0]
    hidden = next((x for x in call.inputs if x.shape == stream.shape), None)
    if hidden is None or whole.output is None or call.output is None:
        raise NotThere("its attention is not given the normed stream, or gives no tensor")
    if same(hidden, stream):
        raise NotThere("no norm stands before its attention")
    before = _only(trace.giving(hidden, inside), attention, "before its attention")
    if not same(trace.calls[before].inputs[0], stream):
        raise NotThere("more than a norm stands before its attention")
    joined = _joined(trace, inside, attention, stream, call.output)
    if joined is None:
        raise NotThere("its MLP does not read the sum of residual stream and attention output")
    between, attention_factor = joined
    read = trace.calls[between].output
    assert read is not None
    mlp, used, result = _mlp(named, trace, inside, attention, read, config)
    mlp_factor = summed(whole.output, trace.calls[between].inputs[0], result)
    if mlp_factor is None:
        raise NotThere("its result is not the sum of residual stream and MLP output")
    known = (*used, before, between)
    for path, module in named.items():
        mine = path.startswith(inside) and not within(path, attention)
        if mine and path not in known and next(module.parameters(recurse=False), None) is not None:
            raise NotThere(f"it holds {path.removeprefix(inside)}, which no DeepSeek layer has")
    return Layer(
        rms_norm(named[before], before), rms_norm(named[between], between), mlp,
        attention_factor, mlp_factor,
    )  # fmt: skip


def _only(paths: list[str], attention: str, where: str) -> str:
    paths = [p for p in paths if not within(p, attention)]
    if not paths:
        raise NotThere(f"no module of its own stands {where}")
    return paths[0]


def _joined(
    trace: Trace, inside: str, attention: str, stream: Tensor, result: Tensor
) -> tuple[str, float] | None:
    """The module that reads stream + f * attention output, and f."""
    for path, call in trace.calls.items():
        if not path.startswith(inside) or within(path, attention) or not call.inputs:
            continue
        given = call.inputs[0]
        if same(given, stream) or same(given, result) or call.output is None:
            continue
        factor = summed(given, stream, result)
        if factor is not None and call.output.shape == stream.shape:
            return path, factor
    return None


def _mlp(
    named: dict[str, nn.Module], trace: Trace, inside: str, attention: str, x: Tensor, config: Any
) -> tuple[Mlp, list[str], Tensor]:
    """The gated MLP that reads x: its weights, the modules it is made of, its result."""
    readers = [
        p
        for p in trace.reading(x, inside)
        if isinstance(named[p], nn.Linear) and not within(p, attention)
    ]
    outs = [trace.calls[p].output for p in readers]
    parts: list[Any]
    if len(readers) == 2:
        both: list[Any] = [named[p] for p in readers]
        parts = [(w.weight, w.bias, o) for w, o in zip(both, outs, strict=True)]
    elif len(readers) == 1 and outs[0] is not None and outs[0].shape[-1] % 2 == 0:
        linear: Any = named[readers[0]]
        biases = (None, None) if linear.bias is None else linear.bias.chunk(2)
        parts = list(zip(linear.weight.chunk(2), biases, outs[0].chunk(2, -1), strict=True))
    else:
        raise NotThere("its MLP is not a gated one of three matrices (two read the norm's result)")
    for path, call in trace.calls.items():
        module = named[path]
        if not path.startswith(inside) or within(path, attention) or not call.inputs:
            continue
        if not isinstance(module, nn.Linear) or path in readers:
            continue
        for gate, up in (parts, parts[::-1]):
            act = _activation(gate[2], up[2], call.inputs[0], config)
            if act is not None and call.output is not None:
                biases = _biases(gate[1], up[1], module.bias)
                made = Mlp(gate[0], up[0], module.weight, biases, act)
                return made, [*readers, path], call.output
    raise NotThere("its MLP is not down(act(gate x) * up x)")


def _biases(*biases: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
    there = [b for b in biases if b is not None]
    if not there:
        return None
    if len(there) < 3:
        raise NotThere("some but not all matrices of its MLP have a bias")
    return there[0], there[1], there[2]


def _activation(gate: Tensor, up: Tensor, product: Tensor, config: Any) -> str | None:
    """The name of act where product = act(gate) * up."""
    from transformers.activations import ACT2FN

    if product.shape != gate.shape:
        return None
    said = [getattr(config, n, None) for n in ("hidden_act", "hidden_activation", "activation")]
    for name in dict.fromkeys([*said, "silu", "gelu", "gelu_pytorch_tanh", "relu"]):
        if isinstance(name, str) and name in ACT2FN and close(product, ACT2FN[name](gate) * up):
            return name
    return None
