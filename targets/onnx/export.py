"""`export_onnx`: a converted model to a folder with one ONNX file for prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from reattend.companions import write_companions
from reattend.errors import ArgumentError
from reattend.targets.onnx.flavours import Flavour, check_flavour
from reattend.targets.onnx.layout import check_dtype, layout
from reattend.targets.onnx.library import find_library
from reattend.targets.onnx.manifest import (
    DATA,
    MANIFEST,
    MODEL,
    Manifest,
    describe,
    read_manifest,
    weights_sha256,
)
from reattend.targets.onnx.requirements import need_exporter
from reattend.workdir import Workdir, digest

_DTYPES = {"float32": torch.float32, "float16": torch.float16}
_PACKAGES = ("reattend", "torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Artifact:
    """A finished export.

    Attributes:
        path: the folder.
        manifest: what `manifest.json` in it says.
    """

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        """The ONNX file; its weights lie beside it."""
        return self.path / self.manifest.file

    @property
    def max_error(self) -> float:
        """Largest relative difference from torch's logits at export; `CheckEntry.error`."""
        return max(check.error for check in self.manifest.checks)


def export_onnx(
    model: nn.Module,
    out: str | Path,
    *,
    dtype: str = "float32",
    flavour: str = "portable",
    inputs: Any = None,
    tokenizer: Any = None,
    original: Path | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Write a converted model as ONNX, opset 24: a language model, or one pass of another one.

    Each converted layer is one node of domain `ai.reattend` with a function body in standard ops;
    of a language model prefill and decode are one file, of a model without caches (an encoder of
    texts or images) a call is all there is, see `EncoderSession`. The folder holds `model.onnx`,
    `model.onnx.data`, `manifest.json`, the generation config, and the tokenizer if given. It
    appears under its name only after the file passed onnx.checker and gave torch's logits in ONNX
    Runtime. `model` is not changed.

    Args:
        model: a model of `convert` or `load`; every attention layer must be converted.
        out: folder to create.
        dtype: "float32" or "float16".
        flavour: which operators the attention layers become; `reattend.targets.onnx.flavours`.
        inputs: example inputs of a model without states (encoders, vision, diffusion): one pass
            from these inputs to its outputs is written (`reattend.targets.onnx.forward`).
        tokenizer: saved beside the model.
        original: a folder whose licence and processor files are copied.
        overwrite: replace another export in `out`.

    Raises:
        ArgumentError: dtype or flavour is something else, or the model is neither a decoder-only
            language model nor one without caches.
        MissingExtraError: the packages of the extra `onnx` are not installed, or, for flavour
            `custom`, the library is not built.
        RefusedError: a layer has no ONNX form; the message names it.
        CaptureError: torch cannot export the model.
        GateError: the exported file does not give torch's logits.
        OutputError: `out` is taken or cannot be written.
    """
    if dtype not in _DTYPES:
        why = "ONNX Runtime has no bfloat16 kernels for CPUs" if "bf" in dtype else ""
        raise ArgumentError(
            f"ONNX export does not support dtype {dtype!r}",
            why=why,
            next_step='use dtype="float32" (or "float16")',
        )
    kind = check_flavour(flavour)
    need_exporter()
    if kind == "custom":
        find_library()
    write = _writer(model, cast("Literal['float32', 'float16']", dtype), kind, inputs)
    asked = {
        "weights": weights_sha256(model),
        "model": digest(_config(model)),
        "target": f"onnx {dtype} {flavour}",
        "tokenizer": type(tokenizer).__name__,
        "versions": digest(_versions()),
    }
    if inputs is not None:
        asked["inputs"] = digest({k: str(getattr(v, "shape", v)) for k, v in inputs.items()})
    with Workdir.open(out, asked, overwrite) as work:
        if work.state != "complete":
            write(work, asked)
            work.publish_folder(lambda folder: write_companions(folder, model, tokenizer, original))
            work.finish()
    return Artifact(work.out, read_manifest(work.out))


def _writer(
    model: nn.Module, dtype: Literal["float32", "float16"], flavour: Flavour, inputs: Any
) -> Callable[[Workdir, dict[str, str]], None]:
    """What writes this kind of model; all that can be known to be wrong is said here."""
    from reattend.targets.onnx.encoder import check_encoder, is_encoder
    from reattend.targets.onnx.encoder_export import check_encoder_flavour
    from reattend.targets.onnx.forward import blocks
    from reattend.targets.onnx.wrapper import check_language_model

    if inputs is not None:
        blocks(model)
        check_encoder_flavour(flavour)
        return lambda work, asked: _write_forward(model, work, dtype, inputs, asked)
    if is_encoder(model):
        check_encoder(model)
        check_encoder_flavour(flavour)
        return lambda work, asked: _write_encoder(model, work, dtype, asked)
    check_language_model(model)
    check_dtype(layout(model), dtype)
    return lambda work, asked: _write(model, work, dtype, flavour, asked)


def _write_forward(
    model: nn.Module,
    work: Workdir,
    dtype: Literal["float32", "float16"],
    inputs: Any,
    asked: dict[str, str],
) -> None:
    """One pass, checked."""
    from reattend.targets.onnx.forward import (
        as_given,
        check_forward,
        describe_forward,
        export_graph,
    )
    from reattend.targets.onnx.graph import evaluation_copy
    from reattend.targets.onnx.verify import check_file

    copied, given = evaluation_copy(model, _DTYPES[dtype]), as_given(inputs, _DTYPES[dtype])
    graph = export_graph(copied, given)
    work.publish_folder(_graph_writer(graph))
    check_file(work.path(MODEL))
    fields = describe_forward(graph, model, dtype)
    fields |= {"model_sha256": asked["weights"], "versions": _versions()}
    checks = check_forward(work.partial, copied, given, dtype)
    work.publish_json(MANIFEST, Manifest(**fields, checks=checks).model_dump(mode="json"))


def _write(
    model: nn.Module,
    work: Workdir,
    dtype: Literal["float32", "float16"],
    flavour: Flavour,
    asked: dict[str, str],
) -> None:
    from reattend.targets.onnx.graph import build, evaluation_copy
    from reattend.targets.onnx.session import Session
    from reattend.targets.onnx.sparse_mixer import make_traceable
    from reattend.targets.onnx.verify import check_file, check_logits, shapes
    from reattend.targets.onnx.wrapper import Step

    copied = evaluation_copy(model, _DTYPES[dtype])
    make_traceable(copied)
    layers = layout(copied)
    graph, forms = build(Step(copied, layers), _DTYPES[dtype], flavour)
    work.publish_folder(_graph_writer(graph))
    check_file(work.path(MODEL))
    fields = describe(graph, layers, forms, model, dtype)
    fields |= {"flavour": flavour, "model_sha256": asked["weights"], "versions": _versions()}
    # The session reads the manifest for its states, so a first one without checks is published.
    work.publish_json(MANIFEST, Manifest(**fields, checks=[]).model_dump(mode="json"))
    config = cast("Any", model).config
    sizes = shapes(layers, getattr(config, "max_position_embeddings", None))
    runs = {"onnxruntime": lambda: Session(work.partial, library=False)}
    if flavour == "custom":
        runs["onnxruntime with ai.reattend kernels"] = lambda: Session(work.partial)
    checks = [
        entry
        for name, session in runs.items()
        for entry in check_logits(session, copied, dtype, int(config.vocab_size), name, sizes)
    ]
    work.publish_json(MANIFEST, Manifest(**fields, checks=checks).model_dump(mode="json"))


def _write_encoder(
    model: nn.Module, work: Workdir, dtype: Literal["float32", "float16"], asked: dict[str, str]
) -> None:
    from reattend.targets.onnx.encoder_export import (
        build_encoder,
        check_results,
        describe_encoder,
        encoder_of,
        folder_session,
    )
    from reattend.targets.onnx.verify import check_file

    plain, encoder = encoder_of(model, _DTYPES[dtype])
    graph = build_encoder(encoder)
    work.publish_folder(_graph_writer(graph))
    check_file(work.path(MODEL))
    fields = describe_encoder(graph, encoder, model, dtype)
    fields |= {"model_sha256": asked["weights"], "versions": _versions()}
    work.publish_json(MANIFEST, Manifest(**fields, checks=[]).model_dump(mode="json"))
    checks = check_results(folder_session(work.partial), plain, dtype, encoder)
    work.publish_json(MANIFEST, Manifest(**fields, checks=checks).model_dump(mode="json"))


def _config(model: Any) -> dict[str, Any]:
    """The model's config without the folder it came from; of a module that has none, its words."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {"module": repr(model), "config": repr(config)}
    return {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}


def _graph_writer(graph: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        import onnx_ir as ir

        ir.save(graph, str(folder / MODEL), external_data=DATA)

    return write


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # onnxruntime-gpu is the same module under another name
            continue
    return found
