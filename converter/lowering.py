"""A plan's `targets`: what a conversion is lowered to, in folders beside its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reattend.errors import PlanError
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


def lower(result: Result, work: Workdir, target: str | Target) -> None:
    """Publish what `export` makes of the converted model as the folder named like the target.

    Raises:
        As `reattend.export`; nothing of the conversion is then published, and the same command
        continues after what it had finished.
    """
    from reattend.api import export

    name = target_name(target)
    flavour = None if isinstance(target, str) else target.flavour

    def write(folder: Path) -> None:
        out = folder / name
        export(result.model, name, out=out, flavour=flavour, tokenizer=result.tokenizer)

    work.publish_folder(write)
