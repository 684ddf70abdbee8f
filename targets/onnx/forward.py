"""Models without a state to ONNX: encoders, vision and diffusion, one pass from inputs to outputs.

The converted blocks are computed by standard operators where they stand; no node of ours is needed,
because nothing is kept from call to call. Heights and widths of images are those of the example.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from reattend.errors import ArgumentError, NothingFoundError, RefusedError
from reattend.inputs import is_hf
from reattend.install.adapter import Adapter
from reattend.targets.onnx.graph import forget_the_trace, translated
from reattend.targets.onnx.manifest import (
    MODEL,
    CheckEntry,
    Generation,
    LayerEntry,
    border_entry,
)
from reattend.targets.onnx.requirements import need
from reattend.targets.onnx.verify import LIMITS, passed
from reattend.unwieldy import symbolic_axes


class Forward(nn.Module):
    """A model as a function of the tensors among its inputs; the rest of them stays as given."""

    def __init__(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.fixed = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}
        self.input_names = [k for k, v in inputs.items() if isinstance(v, Tensor)]
        self.output_names: list[str] = []
        if is_hf(model) and "return_dict" not in self.fixed:
            self.fixed["return_dict"] = True

    def forward(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor of the result, by name."""
        return named(self.model(**tensors, **self.fixed))


def named(result: Any) -> dict[str, Tensor]:
    """The tensors of a result: fields by their names, others `output`, `output.1`, ...

    Raises:
        ArgumentError: there is none.
    """
    if isinstance(result, Tensor):
        return {"output": result}
    if isinstance(result, Mapping) and any(isinstance(v, Tensor) for v in result.values()):
        return {str(k): v for k, v in result.items() if isinstance(v, Tensor)}
    found = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    if not found:
        raise ArgumentError(
            "the model returns no tensor, so there is nothing to export",
            where=type(result).__name__,
            next_step="pass inputs with which model(**inputs) gives tensors (return_dict=False)",
        )
    return {f"output.{i}" if i else "output": x for i, x in enumerate(found)}


def export_graph(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The `onnx_ir.Model` of one pass; sizes free but for images' heights and widths.

    Raises:
        CaptureError: torch cannot trace or translate the model.
        ArgumentError: no input is a tensor, or the model returns none.
    """
    forward = Forward(model, inputs)
    tensors = {name: inputs[name] for name in forward.input_names}
    if not tensors:
        raise ArgumentError("no input is a tensor", where=f"inputs: {', '.join(inputs)}")
    shapes = ({name: symbolic_axes(x, images=False) for name, x in tensors.items()},)
    with torch.no_grad():
        forward.output_names = list(forward(tensors))
    graph = translated(
        forward,
        lambda: torch.export.export(forward, (tensors,), dynamic_shapes=shapes, strict=False),
    )
    _name_axes(graph)
    forget_the_trace(graph)
    return graph


def _name_axes(graph: Any) -> None:
    """B for the batch, A1, A2, ... for other free axes, on the graph's border."""
    import onnx_ir as ir

    border, names = [*graph.graph.inputs, *graph.graph.outputs], dict[str, str]()
    for value in border:
        for axis, size in enumerate(value.shape):
            if not isinstance(size, int) and str(size.value) not in names:
                free = "B" if axis == 0 and "B" not in names.values() else f"A{len(names)}"
                names[str(size.value)] = free
    for value in border:
        sizes = [s if isinstance(s, int) else names[str(s.value)] for s in value.shape]
        value.shape = ir.Shape(sizes)


def blocks(model: nn.Module) -> list[LayerEntry]:
    """The converted blocks of a model.

    Raises:
        NothingFoundError: it has none.
        RefusedError: one keeps something from call to call, which a single pass has no place for.
    """
    found: list[LayerEntry] = []
    for path, module in model.named_modules():
        if not isinstance(module, Adapter):
            continue
        for mixer in module.mixer.head_groups:
            config: Any = mixer.config
            if config.core.causal:
                raise RefusedError(
                    "a causal block is no part of a file without states",
                    where=path,
                    why="inputs= writes one pass, for encoders, vision and diffusion",
                    next_step="leave inputs out: a language model decodes from states",
                )
            layer = len({entry.path for entry in found} - {path})
            found.append(LayerEntry(path=path, layer=layer, op=mixer.kind, form="standard"))
    if not found:
        raise NothingFoundError(
            "the model has no converted attention layer, so there is nothing to lower",
            next_step='convert it first: convert(model, plan="identity") keeps it as it is',
        )
    return found


def describe_forward(
    graph: Any, model: nn.Module, dtype: Literal["float32", "float16"]
) -> dict[str, Any]:
    """The fields of a `Manifest`: no states, and nothing about tokens."""
    return {
        "dtype": dtype,
        "opset": graph.opset_imports[""],
        "domains": dict(sorted(graph.opset_imports.items())),
        "functions": sorted(f"{key[0]}::{key[1]}" for key in graph.functions),
        "model_class": type(model).__name__,
        "layers": blocks(model),
        "inputs": [border_entry(v) for v in graph.graph.inputs],
        "outputs": [border_entry(v) for v in graph.graph.outputs],
        "states": [],
        "cache_bytes_per_token": 0,
        "generation": Generation(),
    }


def check_forward(
    folder: Path, model: nn.Module, inputs: Mapping[str, Any], dtype: str
) -> list[CheckEntry]:
    """ONNX Runtime against torch: the example, and one row more of other numbers.

    Raises:
        GateError: an output differs by more than the limit, or is not finite.
    """
    ort = need("onnxruntime", "checking the exported model")
    session = ort.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
    forward, entries = Forward(model, inputs), []
    example = {name: inputs[name] for name in forward.input_names}
    for tensors in (example, _other(example, session)):
        with torch.no_grad():
            expected = forward(tensors)
        got = session.run(list(expected), {k: v.numpy() for k, v in tensors.items()})
        error = max(map(_difference, got, expected.values()))
        batch = next(iter(tensors.values())).shape[0] if next(iter(tensors.values())).dim() else 1
        entry = CheckEntry(
            runtime="onnxruntime", batch=batch, prefill=0, padding=0, steps=0, error=error,
            limit=LIMITS[dtype],
        )  # fmt: skip
        entries.append(passed(entry, "outputs", f"batch {batch}"))
    return entries


def _other(example: dict[str, Tensor], session: Any) -> dict[str, Tensor]:
    """Other numbers; a row more where every input's first axis is free."""
    free = {v.name: bool(v.shape) and not isinstance(v.shape[0], int) for v in session.get_inputs()}
    rows = {x.shape[0] for name, x in example.items() if free.get(name)}
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, x in example.items():
        if x.is_floating_point():
            x = x[..., torch.randperm(x.shape[-1], generator=generator)] if x.dim() > 1 else x
        more = free.get(name) and len(rows) == 1
        found[name] = torch.cat([x, x[:1]]) if more else x
    return found


def _difference(got: np.ndarray, expected: Tensor) -> float:
    wanted = expected.float().numpy()
    gap: np.ndarray = np.abs(got.astype(np.float32) - wanted)
    return float(gap.max() / max(1.0, np.abs(wanted).max())) if gap.size else 0.0


def as_given(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Example inputs on the CPU, numbers in the export's dtype."""
    move: Callable[[Any], Any] = lambda x: (  # noqa: E731
        x.detach().to("cpu", dtype if x.is_floating_point() else x.dtype)
        if isinstance(x, Tensor)
        else x
    )
    return {name: move(x) for name, x in inputs.items()}
