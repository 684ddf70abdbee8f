"""From the wrapper module to an ONNX model with one node per head group.

Layout letters: B batch, N new tokens, T total tokens, C capacity.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reattend.errors import CaptureError, ReattendError
from reattend.targets.onnx.contrib import Form
from reattend.targets.onnx.flavours import Flavour, choose_forms
from reattend.targets.onnx.functions import (
    DOMAIN,
    OPSET,
    VERSION,
    Uses,
    function_proto,
    with_called,
)
from reattend.targets.onnx.layout import LayerLayout, StateTensor
from reattend.targets.onnx.linear_features import MAPS
from reattend.targets.onnx.pattern_terms import TERMS
from reattend.targets.onnx.rewriting import attribute
from reattend.targets.onnx.rotary import fuse_rotary
from reattend.targets.onnx.selected_choice import BUDGETS
from reattend.targets.onnx.simplify import cancel_squeezes, fuse_norms
from reattend.targets.onnx.sparse_translate import has_term
from reattend.targets.onnx.translate import translation_table
from reattend.targets.onnx.wrapper import Step

# Distinct and not 1, so that no two dimensions are taken for one another or for a constant.
_EXAMPLE = {"batch": 3, "new": 5, "past": 7, "capacity": 17}


def build(step: Step, dtype: torch.dtype, flavour: Flavour) -> tuple[Any, dict[str, Form]]:
    """The `onnx_ir.Model` of a wrapper: named inputs and outputs, functions attached.

    Returns:
        The model, and what the node of each head group is, by its first state output.

    Raises:
        CaptureError: torch cannot trace or translate the model; the reason is torch's.
        RefusedError: a layer that was not converted.
    """
    model = translated(step, lambda: _capture(step, dtype))
    _name_dimensions(model, step)
    tidy(model)
    _check_nodes(model, step.layers)
    forms = choose_forms(model, flavour)
    attach(model, step.layers)
    return model, forms


def translated(step: Any, capture: Callable[[], Any]) -> Any:
    """The `onnx_ir.Model` of what `capture` traces.

    Args:
        step: the wrapper: `model`, `input_names` and `output_names`.
        capture: gives its `ExportedProgram`.

    Raises:
        CaptureError: torch cannot trace or translate it; the reason is torch's.
    """
    with _quiet(), torch.no_grad():
        try:
            exported = torch.onnx.export(
                capture(),
                dynamo=True,
                opset_version=OPSET,
                input_names=step.input_names,
                output_names=step.output_names,
                custom_translation_table=translation_table(),
                optimize=True,
                verbose=False,
            )
        except ReattendError:
            raise
        except Exception as error:
            raise CaptureError(
                "torch could not export the model to ONNX",
                where=type(step.model).__name__,
                why=f"{type(error).__name__}: {_first_line(error)}",
            ) from error
    assert exported is not None
    return exported.model


def tidy(model: Any) -> None:
    """Make a translated graph smaller and free of the trace."""
    forget_the_trace(model)
    cancel_squeezes(model)
    fuse_norms(model)
    fuse_rotary(model)


def _capture(step: Step, dtype: torch.dtype) -> Any:
    arguments = step.example(**_EXAMPLE, dtype=dtype)
    auto = torch.export.Dim.AUTO
    states = [_dynamic_state(t) for t in step.state_tensors]
    shapes = ({0: auto, 1: auto}, {0: auto, 1: auto}, {0: auto, 1: auto}, states)
    return torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)


def _dynamic_state(tensor: StateTensor) -> dict[int, Any]:
    auto = torch.export.Dim.AUTO
    return {0: auto, 2 if tensor.heads else 1: auto} if tensor.growing else {0: auto}


def _name_dimensions(model: Any, step: Step) -> None:
    """Put the manifest's letters on the graph's border."""
    import onnx_ir as ir

    letters: dict[str, list[str | int]] = {
        "input_ids": ["B", "N"],
        "attention_mask": ["B", "T"],
        "position_ids": ["B", "N"],
    }
    for tensor in step.state_tensors:
        letters[tensor.input] = letters[tensor.output] = tensor.letters
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name == "logits":
            value.shape = ir.Shape(["B", "N", value.shape[-1]])
        else:
            value.shape = ir.Shape(letters[value.name])


def forget_the_trace(model: Any) -> None:
    """Drop what torch noted about the trace: stack traces (they name files of this machine) and
    its own symbol names inside the graph, which do not match the border's letters.
    """
    import onnx_ir as ir

    border = {id(v) for v in [*model.graph.inputs, *model.graph.outputs]}
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if id(value) not in border and value.shape is not None:
                value.shape = ir.Shape([d if isinstance(d, int) else None for d in value.shape])


def attach(model: Any, layers: list[LayerLayout]) -> None:
    """Add the function bodies of the nodes that are left in our domain."""
    import onnx_ir as ir

    used = {n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN}
    if used:
        model.opset_imports[DOMAIN] = VERSION
    else:
        model.opset_imports.pop(DOMAIN, None)
    uses = _uses(model, layers)
    for name in with_called(used):
        function = ir.serde.deserialize_function(function_proto(name, uses))
        model.functions[function.identifier()] = function


def _uses(model: Any, layers: list[LayerLayout]) -> Uses:
    nodes = [node for node in model.graph.all_nodes() if node.domain == DOMAIN]
    return Uses(
        rope_may_be_empty=any(
            g.second is not None and not g.second.width for layer in layers for g in layer.groups
        ),
        terms=tuple(term for term in TERMS if any(has_term(node, term) for node in nodes)),
        budgets=tuple(
            name
            for name, none in BUDGETS.items()
            if any(attribute(node, name, none) != none for node in nodes)
        ),
        capped=any(attribute(node, "softcap") for node in nodes),
        sliding=any(attribute(node, "sliding_window") for node in nodes),
        decayed=any(attribute(node, "decays") for node in nodes),
        maps=tuple(
            name
            for number, name in enumerate(MAPS)
            if any(attribute(node, "feature_map") == number for node in nodes)
        ),
    )


def _check_nodes(model: Any, layers: list[LayerLayout]) -> None:
    """Check that every head group, or class of a sparse one, became exactly one node."""
    wanted = Counter(op for layer in layers for group in layer.groups for op in group.nodes)
    found = Counter(n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN)
    if wanted != found:
        raise CaptureError(
            "the exported graph does not have one node per head group of a converted layer",
            why=f"expected {dict(wanted)}, found {dict(found)}",
        )


def _first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    text = str(error).strip()
    return text.splitlines()[0] if text else "no reason given"


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports success through warnings and loggers; only errors matter here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def evaluation_copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype` and evaluation mode; tensors already in that dtype are shared.

    Buffers that are not part of the checkpoint (rotary tables) keep their dtype, as transformers
    itself keeps them.
    """
    import copy

    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        wanted = dtype if parameter.is_floating_point() else parameter.dtype
        data = parameter.detach().to(device="cpu", dtype=wanted)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            wanted = dtype if saved and buffer.is_floating_point() else buffer.dtype
            memo[id(buffer)] = buffer.detach().to(device="cpu", dtype=wanted)
    made = copy.deepcopy(model, memo)
    return made.eval()
