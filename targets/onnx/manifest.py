"""`manifest.json`: all a program needs to run the exported file without reading the graph."""

from __future__ import annotations

import hashlib
import json
from math import ceil
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from reattend.errors import ModelError
from reattend.targets.onnx.contrib import GROUP_QUERY, Form
from reattend.targets.onnx.encoder_body import ENCODER
from reattend.targets.onnx.encoder_observed import OBSERVED
from reattend.targets.onnx.flavours import Flavour
from reattend.targets.onnx.layout import GroupLayout, LayerLayout, StateTensor

SCHEMA = 7
#: inputs of a file with passes over one input: which pass a call is, counted from 1, of how many,
#: and tokens that are filled in
PASS = ("pass_number", "passes", "new_tokens")
#: what layers of models without caches are
WHOLE = (*ENCODER, OBSERVED)
MANIFEST = "manifest.json"
MODEL = "model.onnx"
DATA = "model.onnx.data"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorEntry(_Part):
    """An input or output; letters B batch, N new tokens, T total tokens, C capacity."""

    name: str
    dtype: str
    shape: list[str | int]


class StateEntry(_Part):
    """A state: bind one buffer, filled with zeros at first, as `input` and as `output`; one with a
    `capacity` is filled with zeros again before another text.

    Attributes:
        input, output: of the graph.
        layer, name: whose it is.
        shape: letters and numbers; `C/64`: a row for every 64 tokens, rounded up; `3C/64+80`: three
            for so many, and 80. P blocks of queries and K blocks that each reads: what one pass
            over a text found, for the next.
        capacity: rows that it has, however many tokens there are; null: as many as `shape` says of
            C, at least the number of tokens.
        ring: token t, padding counted, stands in row t mod the number of rows: whoever moves it to
            a buffer of more rows puts it there.
    """

    input: str
    output: str
    layer: int
    name: str
    shape: list[str | int]
    capacity: int | None = None
    ring: bool = False


class LayerEntry(_Part):
    """A head group of a converted layer, or a class of sparse heads: one node each, in their order.

    Attributes:
        path, layer: the module and the number of the layer.
        op: what it is in our words: `Attention`, `LatentAttention`, `SparseAttention` (sinks and a
            window, state of bounded size), `KeptAttention` (other KV-monotone patterns, states of
            what later queries may see), `PatternAttention` (any pattern, state of every row),
            `LinearAttention` and `WindowLinearAttention` (sums, state of bounded size), or what
            chooses keys at run time (state of every row), see `selected_body.KINDS`. Of a model
            without caches one of `WHOLE`; `A + B`: a grid, and the text around it.
        form: the operator that stands in the graph, as `domain::name`.
        reason: why it is not the operator that the flavour prefers; empty where it is.
        pattern: what sparse heads see.
        saves: what the file saves by it, and why not more.
    """

    path: str
    layer: int
    op: str
    form: str = ""
    reason: str = ""
    pattern: str = ""
    saves: str = ""


class Generation(_Part):
    """Special token ids."""

    bos_token_id: int | None = None
    eos_token_id: list[int] = Field(default_factory=list)
    pad_token_id: int | None = None


class CheckEntry(_Part):
    """One comparison of logits with torch's at export, over real tokens.

    Attributes:
        runtime: what ran the file. Of a model without caches, results instead of logits are
            compared, padding is on the right, and steps are passes over one text.
        batch, prefill, padding, steps: rows, prompt length, left padding of the first row, and
            single steps after the prompt.
        error: relative: largest |difference| / max(1, largest |logit|). No unit.
        limit: the largest `error` that is published.
        share: of the tokens, those with the least differences, that `error` is of. Where long
            texts choose keys at run time, rounding decides near ties differently for some tokens,
            and half of all tokens are looked at.
    """

    runtime: str
    batch: int
    prefill: int
    padding: int
    steps: int
    error: float = Field(description="largest |difference| / max(1, largest |logit|)")
    limit: float = Field(description="largest error that is published")
    share: float = 1.0


class Manifest(_Part):
    """The file as a whole; `schema_version` rises when a reader must change."""

    schema_version: Literal[1, 2, 3, 4, 5, 6, 7] = 7
    file: str = MODEL
    data: str = DATA
    dtype: Literal["float32", "float16"]
    flavour: Flavour = "portable"
    opset: int
    domains: dict[str, int]
    functions: list[str]
    model_class: str
    model_sha256: str
    layers: list[LayerEntry]
    inputs: list[TensorEntry]
    outputs: list[TensorEntry]
    states: list[StateEntry]
    cache_bytes_per_token: int = Field(description="of the states that grow with the text")
    cache_bytes_fixed: int = Field(
        default=0, description="of the states of bounded size, per sequence"
    )
    chunk_rows: int | None = Field(
        default=None,
        description="rows of a call that feeds several tokens on top of others; no limit if null",
    )
    generation: Generation
    checks: list[CheckEntry]
    versions: dict[str, str]

    @property
    def whole(self) -> bool:
        """Whether the file is of a model without caches: a call brings all there is."""
        return not self.states or any(e.op.split(" + ")[0] in WHOLE for e in self.layers)


def describe(
    graph: Any,
    layers: list[LayerLayout],
    forms: dict[str, Form],
    model: nn.Module,
    dtype: Literal["float32", "float16"],
) -> dict[str, Any]:
    """The fields of a `Manifest` that follow from the graph and the model."""
    tensors = [t for layer in layers for t in layer.tensors]
    size = {"float32": 4, "float16": 2}[dtype]
    config: Any = model.config
    return {
        "dtype": dtype,
        "opset": graph.opset_imports[""],
        "domains": dict(sorted(graph.opset_imports.items())),
        "functions": sorted(f"{key[0]}::{key[1]}" for key in graph.functions),
        "model_class": type(model).__name__,
        "layers": [_layer(x, g, forms[g.first.output]) for x in layers for g in x.groups],
        "inputs": [_entry(v, config.vocab_size) for v in graph.graph.inputs],
        "outputs": [_entry(v, config.vocab_size) for v in graph.graph.outputs],
        "states": [_state(t) for t in tensors],
        "cache_bytes_per_token": ceil(size * sum(t.numbers * t.growing / t.block for t in tensors)),
        "cache_bytes_fixed": size * sum(t.numbers * t.rows for t in tensors),
        # ONNX Runtime's GroupQueryAttention takes a later chunk of one row only.
        "chunk_rows": 1 if any(f.op == GROUP_QUERY for f in forms.values()) else None,
        "generation": generation(model),
    }


def _entry(value: Any, vocabulary: int) -> TensorEntry:
    entry = border_entry(value)
    if value.name != "logits":
        return entry
    last = entry.shape[-1]
    return entry.model_copy(
        update={"shape": ["B", "N", last if isinstance(last, int) else vocabulary]}
    )


def border_entry(value: Any) -> TensorEntry:
    """An input or output of a graph."""
    shape = [s if isinstance(s, int) else str(s.value) for s in value.shape]
    name = {"FLOAT": "float32"}.get(value.dtype.name, value.dtype.name.lower())
    return TensorEntry(name=value.name, dtype=name, shape=shape)


def _layer(layer: LayerLayout, group: GroupLayout, form: Form) -> LayerEntry:
    return LayerEntry(
        path=layer.path, layer=layer.layer, op=group.op, form=form.op, reason=form.reason,
        pattern=group.pattern, saves=group.saves,
    )  # fmt: skip


def _state(tensor: StateTensor) -> StateEntry:
    return StateEntry(
        input=tensor.input, output=tensor.output, layer=tensor.layer, name=tensor.name,
        shape=tensor.letters, capacity=None if tensor.growing else tensor.rows, ring=tensor.ring,
    )  # fmt: skip


def generation(model: nn.Module) -> Generation:
    """Special token ids from the generation config, else the model config."""
    sources = [getattr(model, "generation_config", None), getattr(model, "config", None)]

    def first(name: str) -> Any:
        return next((v for s in sources if (v := getattr(s, name, None)) is not None), None)

    eos = first("eos_token_id")
    ends = [] if eos is None else [int(e) for e in (eos if isinstance(eos, list) else [eos])]
    return Generation(
        bos_token_id=first("bos_token_id"), eos_token_id=ends, pad_token_id=first("pad_token_id")
    )


def weights_sha256(model: nn.Module) -> str:
    """Hash of names, dtypes, shapes and bytes of the checkpoint's tensors."""
    import torch

    from reattend.sharing import is_shared

    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        assert isinstance(tensor, Tensor)
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        plain = plain.clone() if is_shared(plain) else plain  # numpy's pointer ends the sharing
        found.update(cast("Any", plain.numpy()))
    return found.hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an export.

    Raises:
        ModelError: the folder has none, or one of a newer schema.
    """
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "this folder is not an ONNX export of reattend",
            where=str(folder),
            why=f"{MANIFEST} cannot be read: {error}",
            next_step='write one with export(model, target="onnx", out=...)',
        ) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA:
        raise ModelError(
            f"this export has manifest version {version}; this reattend reads up to {SCHEMA}",
            where=str(path),
            next_step="pip install -U reattend",
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise ModelError(
            "the manifest of this export is damaged",
            where=f"{path}: {'.'.join(str(x) for x in first['loc'])}",
            why=first["msg"],
            next_step="export the model again",
        ) from error
