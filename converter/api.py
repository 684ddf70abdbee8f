"""The public calls, and the pipeline in the order it runs.

capture -> find -> plan -> rewrite -> calibrate -> verify -> lower
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from reattend.arguments import (
    as_callback,
    as_flag,
    as_folder,
    as_inputs,
    as_inputs_or_file,
    as_seed,
    as_tokenizer,
)
from reattend.events import OnEvent
from reattend.finder import find_attention
from reattend.plan import Plan
from reattend.report import Report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reattend.report import Run

__all__ = ["Result", "convert", "export", "find_attention", "load"]


@dataclass
class Result:
    """What `convert` returns.

    Attributes:
        model: the converted model, in eval mode; `generate` works where the original's did.
        report: what was done, and the proof.
        run: times and measured memory of this run; None when it was already complete.
        out: the published folder, or None.
        tokenizer: the original's, or the one that was given.
        original: the folder of the original, whose licence and processor go with the result.
    """

    model: nn.Module
    report: Report
    run: Run | None = None
    out: Path | None = None
    tokenizer: Any = None
    original: Path | None = None

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Publish checkpoint, tokenizer and report into `folder` (through `folder.partial`).

        Raises:
            OutputError: the folder is taken, read-only or full.
        """
        from reattend.publishing import save_result

        return save_result(
            self, as_folder(folder, "folder"), overwrite=as_flag(overwrite, "overwrite")
        )


def convert(
    model: nn.Module | str | Path,
    plan: str | Path | Mapping[str, Any] | Plan = "transmla",
    *,
    inputs: dict[str, Any] | str | Path | None = None,
    data: Any = None,
    tokenizer: Any = None,
    out: str | Path | None = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    seed: int = 0,
    inplace: bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    on_event: OnEvent | None = None,
) -> Result:
    """Give a trained model a new attention.

    Args:
        model: a transformers model or folder (or the id of one already downloaded), or any
            `torch.nn.Module`.
        plan: preset name, YAML path, dict or `Plan`.
        inputs: example keyword arguments for modules that are not from transformers, batch and
            length at least 2 and distinct; or a safetensors file of them.
        data: text file, `.jsonl`, folder, list of strings, or token tensors. None: sequences
            sampled from the model itself, for statistics only.
        tokenizer: for text data; found in the model's folder when None.
        out: folder to publish to; a killed run continues from `out.partial`.
        device, device_map, dtype: how to load a model given as folder or id.
        seed: of sampling, training and measurement.
        inplace: change the given module instead of a copy that shares unchanged tensors.
        overwrite: replace an earlier result in `out`.
        trust_remote_code: run model code that lies in the model's folder.
        on_event: called with every `reattend.events.Event`.

    Returns:
        The converted model, its report, and the published folder.

    Raises:
        ReattendError: a subclass for every user-visible failure; `exit_code` as documented.
    """
    from reattend.pipeline import Job

    job = Job(
        plan=Plan.load(plan), inputs=as_inputs_or_file(inputs), data=data, seed=as_seed(seed),
        inplace=as_flag(inplace, "inplace"), out=None if out is None else as_folder(out, "out"),
        overwrite=as_flag(overwrite, "overwrite"), on_event=as_callback(on_event, "on_event"),
    )  # fmt: skip
    job.open(
        model, tokenizer=tokenizer, device=device, device_map=device_map, dtype=dtype,
        trust_remote_code=as_flag(trust_remote_code, "trust_remote_code"),
    )  # fmt: skip
    job.find()  # capture the graph, read every block, and let it prove itself
    job.preflight()  # match the plan with the blocks; every refusal at once
    with job.folder() as complete:  # out.partial: a killed run continues there
        if not complete:
            job.rewrite()  # statistics, then new blocks in a copy of the model
            job.calibrate()  # distil the original into it
            job.verify()  # measure, report, hold to the plan's gates
            job.lower()  # publish the checkpoint and the plan's targets
    return job.result


def load(
    folder: str | Path, model: nn.Module | None = None, inputs: Any = None, **kwargs: Any
) -> Any:
    """Load a converted model.

    Args:
        folder: what `convert(out=...)` or `Result.save` wrote.
        model: for a hand-written module: an instance of the original class; its blocks are
            replaced and the stored weights loaded into it.
        inputs: the example inputs given to `convert`; needed where the model became a graph.
        kwargs: passed to `from_pretrained` (dtype, device_map, ...).

    Raises:
        ModelError: not a reattend folder, or written by a newer reattend.
    """
    from reattend.publishing import load_folder

    return load_folder(as_folder(folder, "folder"), model, as_inputs(inputs), **kwargs)


def export(
    model: nn.Module | str | Path,
    target: str = "onnx",
    *,
    out: str | Path,
    dtype: str | torch.dtype | None = None,
    pad: str | None = None,
    flavour: str | None = None,
    inputs: Any = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Any:
    """Lower a converted model to an artifact.

    Args:
        model: a converted model or its folder.
        target: `onnx`; `deepseek` (a checkpoint that transformers' DeepseekV3ForCausalLM loads
            without reattend) or `deepseek-v2`.
        out: folder for the artifact.
        dtype: for ONNX `float32` (the default) or `float16` (bfloat16 has no CPU path in ONNX
            Runtime); a checkpoint keeps the model's where None.
        pad: DeepSeek targets only: `max` pads layers of several sizes to the largest, `512+64`
            to at least that latent rank and rotary width.
        flavour: ONNX only: `portable` (the default: any runtime), `ort` (ONNX Runtime's own
            operators where they win), `custom` (the portable file, checked with and run by the
            kernels of reattend's own library).
        inputs: ONNX only, for models without states (encoders, vision, diffusion): example inputs
            by name, or the safetensors file that they are in; one pass is written.
        tokenizer: saved beside the model; found in the model's folder when None.
        overwrite: replace another export in `out`.

    Raises:
        ArgumentError: unknown target, dtype or padding.
        MissingExtraError: the `onnx` extra is not installed.
        RefusedError: the target cannot carry the model.
    """
    from reattend.lowering import check_export, written

    stored = check_export(target, dtype, pad, flavour, inputs)
    out, overwrite = as_folder(out, "out"), as_flag(overwrite, "overwrite")
    tokenizer, original = as_tokenizer(tokenizer), None
    example = as_inputs_or_file(inputs)
    if not isinstance(model, nn.Module):
        from reattend.source_load import find_tokenizer

        original = as_folder(model, "model")
        model = load(original)  # first: its errors name the folder
        tokenizer = tokenizer or find_tokenizer(str(original), True, False)
    assert isinstance(model, nn.Module)
    if isinstance(example, Path):
        from reattend.factory import read_inputs

        example = read_inputs(example, model)
    return written(
        model, target, out, dtype=stored, pad=pad, flavour=flavour, inputs=example,
        tokenizer=tokenizer, original=original, overwrite=overwrite,
    )  # fmt: skip
