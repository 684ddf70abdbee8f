"""A model without states as ONNX: its graph, what its manifest says, and what it must pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from reattend.denoising import denoising
from reattend.errors import ArgumentError, CaptureError
from reattend.inputs import LENGTH, made_up
from reattend.install.adapter import Adapter
from reattend.targets.onnx.encoder import Encoder, leaves
from reattend.targets.onnx.encoder_masked import LONG
from reattend.targets.onnx.encoder_mixer import WholeSparse
from reattend.targets.onnx.encoder_session import EncoderSession
from reattend.targets.onnx.flavours import Flavour
from reattend.targets.onnx.fragments import TILE
from reattend.targets.onnx.functions import DOMAIN
from reattend.targets.onnx.graph import attach, evaluation_copy, tidy, translated
from reattend.targets.onnx.manifest import (
    CheckEntry,
    LayerEntry,
    StateEntry,
    border_entry,
    generation,
)
from reattend.targets.onnx.verify import LIMITS, passed

#: what is saved by each node
_SAVES = {
    "MaskedAttention": f"reads and arithmetic of more than {LONG} tokens: {TILE} neighbours read "
    "the rows that one of them sees, where those are less than three quarters of all",
    "RegionAttention": "reads and arithmetic: boxes of queries read the rows that they see",
    "BandAttention": "reads and arithmetic: what is near is read, in texts not padded on the left",
    "ChosenRegionAttention": "reads and arithmetic: tiles of queries read the tiles they chose",
    "ObservedAttention": "reads and arithmetic of the passes behind the one that observes",
}


class Call(NamedTuple):
    """Rows, tokens (of texts), padding on the right of the first row, passes over one input."""

    batch: int
    tokens: int
    padding: int
    passes: int = 0


def check_encoder_flavour(flavour: Flavour) -> None:
    """Only function bodies in standard operators.

    Raises:
        ArgumentError: another flavour.
    """
    if flavour != "portable":
        raise ArgumentError(
            f"a model without caches has no ONNX file of flavour {flavour!r}",
            why="its layers are function bodies in standard operators, in every runtime",
            next_step='use flavour="portable"',
        )


def build_encoder(encoder: Encoder) -> Any:
    """The `onnx_ir.Model` of a wrapper: named inputs and outputs, functions attached.

    Raises:
        CaptureError: torch cannot trace or translate the model, or a node is missing.
    """
    given = list(encoder.example.values())
    shapes = ([encoder.dynamic(name) for name in encoder.input_names],)
    model = translated(
        encoder,
        lambda: torch.export.export(encoder, (given,), dynamic_shapes=shapes, strict=False),
    )
    _name_sizes(model, encoder)
    tidy(model)
    wanted = Counter(op for _, entry in _nodes(encoder.model) for op in entry.op.split(" + "))
    found = Counter(n.op_type for n in model.graph.all_nodes() if n.domain == DOMAIN)
    if wanted != found:
        raise CaptureError(
            "the exported graph does not have the nodes of its converted layers",
            why=f"expected {dict(wanted)}, found {dict(found)}",
        )
    attach(model, [])
    return model


def describe_encoder(
    graph: Any, encoder: Encoder, model: nn.Module, dtype: Literal["float32", "float16"]
) -> dict[str, Any]:
    """The fields of a `Manifest` that follow from the graph and the model."""
    border = [*graph.graph.inputs, *graph.graph.outputs]
    entries = [border_entry(value) for value in border]
    return {
        "dtype": dtype,
        "opset": graph.opset_imports[""],
        "domains": dict(sorted(graph.opset_imports.items())),
        "functions": sorted(f"{key[0]}::{key[1]}" for key in graph.functions),
        "model_class": type(model).__name__,
        "layers": [entry for _, entry in _nodes(encoder.model)],
        "inputs": entries[: len(graph.graph.inputs)],
        "outputs": entries[len(graph.graph.inputs) :],
        "states": [
            StateEntry(
                input=name, output=name.replace("state.", "state_out.", 1),
                layer=int(name.split(".")[1]), name=name.split(".", 2)[2],
                shape=["B", heads, "P", "K"],
            )
            for name, heads in encoder.states.items()
        ],
        "cache_bytes_per_token": 0,
        "generation": generation(model),
    }  # fmt: skip


def check_results(
    open_session: Callable[[], EncoderSession], model: nn.Module, dtype: str, encoder: Encoder
) -> list[CheckEntry]:
    """ONNX Runtime against torch: padded texts, single rows, passes over one text.

    Where heads choose, rounding decides near ties differently; half of all rows count then.

    Args:
        open_session: opens the file.
        model: the torch model in the file's dtype.
        dtype: decides the limit.
        encoder: the wrapper that was exported.

    Raises:
        GateError: a difference is above the limit or not finite.
    """
    session, found = open_session(), []
    mixers = [m.mixer for m in model.modules() if isinstance(m, Adapter)]
    patterns = [c.pattern for m in mixers for c in getattr(m.config, "classes", ())]
    share = 0.5 if any(p.select is not None for p in patterns) else 1.0
    for call in _calls(encoder):
        given = _inputs(model, call)
        error = max(_differences(session, model, given, call, share))
        entry = CheckEntry(
            runtime="onnxruntime", batch=call.batch, prefill=call.tokens, padding=call.padding,
            steps=call.passes, error=error, limit=LIMITS[dtype], share=share,
        )  # fmt: skip
        where = f"batch {call.batch}, {call.tokens} tokens, {call.passes} passes"
        found.append(passed(entry, "results", where))
    return found


def _calls(encoder: Encoder) -> list[Call]:
    if "input_ids" not in encoder.own:
        return [Call(4, 0, 0), Call(1, 0, 0, passes=5 if encoder.states else 0)]
    if encoder.states:
        return [Call(2, LENGTH, 0), Call(2, LENGTH - 2, 0, passes=5)]
    padding = 3 if "attention_mask" in encoder.own else 0
    return [Call(2, LENGTH - 4, padding), Call(1, LENGTH + 4, 0)]


def _inputs(model: nn.Module, call: Call) -> dict[str, Tensor]:
    given = made_up(model, call.batch, call.tokens or LENGTH)
    tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
    if call.padding:
        tensors["attention_mask"][0, -call.padding :] = 0
    return tensors


def _differences(
    session: EncoderSession, model: nn.Module, given: dict[str, Tensor], call: Call, share: float
) -> list[float]:
    """Of every output of every pass, relative to its largest number or 1."""
    if not call.passes:
        return _compared(session, model, given, share)
    new, found, main = call.tokens // 3, [], next(iter(given))
    first = call.tokens - new
    with denoising(model, call.passes, new), session.denoising(call.passes, new):
        for number in range(call.passes):
            value = given[main].clone()
            value[:, first:] = value[:, first:].roll(number, -1)
            found += _compared(session, model, {**given, main: value}, share)
    return found


def _compared(
    session: EncoderSession, model: nn.Module, given: dict[str, Tensor], share: float
) -> list[float]:
    with torch.no_grad():
        wanted = dict(leaves(model(**given, return_dict=True)))
    got = session.run(**{name: value.numpy() for name, value in given.items()})
    mask, found = given.get("attention_mask"), []
    for name, value in got.items():
        want = wanted[name].float().numpy()
        apart = np.abs(value.astype(np.float32) - want)
        if mask is not None and want.shape[:2] == mask.shape:
            apart = apart[mask.bool().numpy()]
        rows = np.sort(apart.reshape(len(apart), -1).max(-1))
        worst = rows[max(0, int(np.ceil(share * len(rows))) - 1)]
        found.append(float(worst / max(1.0, np.abs(want).max())))
    return found


def _nodes(model: nn.Module) -> list[tuple[str, LayerEntry]]:
    """Every class of heads of every converted layer, and what it became."""
    found, layer = [], 0
    for path, module in model.named_modules():
        if not isinstance(module, Adapter):
            continue
        mixer: Any = module.mixer
        forms = mixer.forms if isinstance(mixer, WholeSparse) else {0: "MaskedAttention"}
        for number, op in sorted(forms.items()):
            pattern = mixer.config.classes[number].pattern if mixer.kind == "sparse" else None
            plain = pattern is None or pattern.full
            entry = LayerEntry(
                path=path, layer=layer, op=op, form=f"{DOMAIN}::{op}",
                pattern=pattern.words() if pattern else "",
                saves="" if plain else _SAVES[op.split(" + ")[0]],
            )  # fmt: skip
            found.append((path, entry))
        layer += 1
    return found


def _name_sizes(model: Any, encoder: Encoder) -> None:
    """Letters on the graph's border: rows B, tokens N, blocks P and K; other sizes are numbers."""
    import onnx_ir as ir

    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.name.startswith("state"):
            heads = encoder.states[value.name.replace("state_out.", "state.", 1)]
            value.shape = ir.Shape(["B", heads, "P", "K"])
            continue
        sizes = list(value.shape)
        letters = ["B", *("N" for _ in sizes[1:])]
        value.shape = ir.Shape(
            [s if isinstance(s, int) else x for s, x in zip(sizes, letters, strict=True)]
        )


def encoder_of(model: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Encoder]:
    """The model in a file's dtype, twice: as it is, and as it is traced."""
    return evaluation_copy(model, dtype), Encoder(evaluation_copy(model, dtype))


def folder_session(folder: Path) -> Callable[[], EncoderSession]:
    """What opens a folder that is being written."""
    return lambda: EncoderSession(folder)
