"""What a converted model is lowered to: by `export`, or by a plan's `targets`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from reattend.errors import ArgumentError, PlanError
from reattend.plan import Plan
from reattend.plan_target import Target, target_name
from reattend.plan_text import unknown_name
from reattend.workdir import Workdir

if TYPE_CHECKING:
    from torch import nn

    from reattend.api import Result
    from reattend.preflight import Choice

TARGETS = ("onnx", "deepseek", "deepseek-v2")


def check_targets(plan: Plan, out: Path | None) -> None:
    """Everything that can be known of the plan's targets before any work is done.

    Raises:
        PlanError: an unknown target, or targets without an output folder.
        MissingExtraError: a package or library of a target is not installed.
    """
    names = [target_name(target) for target in plan.targets]
    for target, name in zip(plan.targets, names, strict=True):
        if name not in TARGETS:
            raise unknown_name("target", name, TARGETS, "plan: targets")
        _check_flavour(target)
    if plan.targets and out is None:
        raise PlanError(
            "the plan has targets, but there is no folder for them",
            where=f"targets: {', '.join(names)}",
            next_step="pass out=..., or leave `targets` out and call `reattend.export`",
        )
    if "onnx" in names:
        from reattend.targets.onnx.requirements import need_exporter

        need_exporter()


def _check_flavour(target: str | Target) -> None:
    if isinstance(target, str) or target.flavour is None:
        return
    if target.name != "onnx":
        raise PlanError(
            "flavour is for the target onnx",
            where=f"plan: targets: {target.name}",
            next_step=f"write `targets: [{target.name}]`",
        )
    from reattend.targets.onnx.flavours import FLAVOURS

    if target.flavour not in FLAVOURS:
        raise unknown_name("flavour", target.flavour, FLAVOURS, "plan: targets: onnx")
    if target.flavour == "custom":
        from reattend.targets.onnx.library import find_library

        find_library()


def check_choices(plan: Plan, model: nn.Module, choices: list[Choice]) -> None:
    """Whether what the plan makes of this model fits its targets, as far as that is known.

    Raises:
        RefusedError: it does not; every reason.
    """
    for target in map(target_name, plan.targets):
        if target.startswith("deepseek"):
            from reattend.targets.deepseek import foresee

            foresee(model, choices, "v2" if target == "deepseek-v2" else "v3")
        elif target == "onnx":
            from reattend.targets.onnx.forecast import foresee as foresee_onnx

            foresee_onnx(choices)


def check_export(target: Any, dtype: Any, pad: Any, flavour: Any, inputs: Any = None) -> str | None:
    """What can be known to be wrong before a model is opened; the dtype's name.

    Raises:
        ArgumentError: an unknown target, no dtype, or an option of another target.
    """
    if target not in TARGETS:
        known = ", ".join(f'"{name}"' for name in TARGETS)
        raise ArgumentError(
            f"unknown export target {target!r}", next_step=f"known targets: {known}"
        )
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype is not None and not isinstance(dtype, str):
        raise ArgumentError(
            f"not a dtype: {type(dtype).__name__}", where=f"dtype={dtype!r}"[:200],
            next_step='give its name ("float16") or the torch.dtype',
        )  # fmt: skip
    if pad is not None and target == "onnx":
        raise ArgumentError(
            "pad is for the targets deepseek and deepseek-v2",
            where=f"pad={pad!r}",
            next_step="leave it out: ONNX files take layers of any size",
        )
    if inputs is not None and target != "onnx":
        raise ArgumentError(
            "inputs is for the target onnx", where=f"target={target!r}", next_step="leave it out"
        )
    if flavour is not None and target != "onnx":
        raise ArgumentError(
            "flavour is for the target onnx", where=f"flavour={flavour!r}", next_step="leave it out"
        )
    return dtype


def written(
    model: nn.Module,
    target: str,
    out: Path,
    *,
    dtype: str | None = None,
    pad: str | None = None,
    flavour: str | None = None,
    inputs: Any = None,
    tokenizer: Any = None,
    original: Path | None = None,
    overwrite: bool = False,
) -> Any:
    """Write the artifact; arguments and errors as `reattend.export`.

    Args:
        original: the folder whose licence and processor go with it.
    """
    beside = {"tokenizer": tokenizer, "original": original, "overwrite": overwrite}
    if target == "onnx":
        from reattend.targets.onnx import export_onnx

        kind = flavour or "portable"
        name = dtype or "float32"
        return export_onnx(model, out, dtype=name, flavour=kind, inputs=inputs, **beside)
    from reattend.targets.deepseek import export_deepseek

    version: Literal["v2", "v3"] = "v2" if target == "deepseek-v2" else "v3"
    return export_deepseek(model, out, version=version, dtype=dtype, pad=pad, **beside)


def lower(result: Result, work: Workdir, target: str | Target) -> None:
    """Publish what `export` makes of the converted model as the folder named like the target.

    Raises:
        As `reattend.export`; nothing of the conversion is then published, and the same command
        continues after what it had finished.
    """
    name = target_name(target)
    flavour = None if isinstance(target, str) else target.flavour

    def write(folder: Path) -> None:
        written(
            result.model, name, folder / name, flavour=flavour, tokenizer=result.tokenizer,
            original=result.original,
        )  # fmt: skip

    work.publish_folder(write)
