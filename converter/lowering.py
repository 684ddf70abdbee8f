"""A plan's `targets`: what a conversion is lowered to, in folders beside its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from reattend.errors import PlanError
from reattend.plan import Plan
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
        MissingExtraError: a package of a target is not installed.
    """
    for target in plan.targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS, "plan: targets")
    if plan.targets and out is None:
        raise PlanError(
            "the plan has targets, but there is no folder for them",
            where=f"targets: {', '.join(plan.targets)}",
            next_step="pass out=..., or leave `targets` out and call `reattend.export`",
        )
    if "onnx" in plan.targets:
        from reattend.targets.onnx.requirements import need_exporter

        need_exporter()


def check_choices(plan: Plan, model: nn.Module, choices: list[Choice]) -> None:
    """Whether what the plan makes of this model fits its targets, as far as that is known.

    Raises:
        RefusedError: it does not; every reason.
    """
    for target in plan.targets:
        if target.startswith("deepseek"):
            from reattend.targets.deepseek import foresee

            foresee(model, choices, "v2" if target == "deepseek-v2" else "v3")


def lower(result: Result, work: Workdir, target: str) -> None:
    """Publish what `export` makes of the converted model as the folder `target`.

    Raises:
        As `reattend.export`; nothing of the conversion is then published, and the same command
        continues after what it had finished.
    """
    from reattend.api import export

    def write(folder: Path) -> None:
        export(result.model, target, out=folder / target, tokenizer=result.tokenizer)

    work.publish_folder(write)
