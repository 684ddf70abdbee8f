"""Commands that change nothing: `plans`, and the arguments they share with `find`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from reattend.cli_guard import console, dumped, emit, guarded
from reattend.errors import ArgumentError

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Model folder, id on this machine, or code to call: pkg.module:factory, file.py:make.",
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="Safetensors for the module a factory made."),
]
Inputs = Annotated[
    Path | None,
    typer.Option("--inputs", metavar="FILE", help="Safetensors: example arguments of forward."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run model code that lies in the folder.")
]

plans = typer.Typer(
    help="List, show and check plans, and see which shapes fit a model.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def opened_model(model: str, weights: Path | None) -> Any:
    """The module a factory makes, or what was given: a folder or id, opened later."""
    from reattend.factory import build, names_factory

    if names_factory(model):
        return build(model, weights)
    if weights is not None:
        raise ArgumentError(
            "--weights is for a module that a factory makes",
            where=model,
            next_step="a model folder holds its own weights; leave --weights out",
        )
    return model


def example_inputs(file: Path | None, model: Any) -> dict[str, Any] | None:
    """What `--inputs` holds; asked for where nothing can be made up."""
    from reattend.factory import read_inputs
    from reattend.inputs import is_hf

    if file is not None:
        return read_inputs(file, model)
    if not is_hf(model):
        raise ArgumentError(
            "example inputs are needed for a module that is not from transformers",
            where=type(model).__name__,
            next_step="add --inputs FILE.safetensors: tensors named like the parameters of "
            "forward, batch and length >= 2 and distinct",
        )
    return None


@plans.command("list")
@guarded
def list_plans(json: Json = False) -> None:
    """The plans that are shipped."""
    from rich.table import Table
    from rich.text import Text

    from reattend.plans import preset_names, preset_summary

    if json:
        emit(dumped({name: preset_summary(name) for name in preset_names()}))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name in preset_names():
        table.add_row(Text(name, style="bold"), Text(preset_summary(name)))
    console().print(table)


@plans.command("show")
@guarded
def show_plan(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of `reattend plans list`.")],
) -> None:
    """The YAML of a shipped plan, as a start for your own."""
    from reattend.plan_text import unknown_name
    from reattend.plans import preset_names, preset_text

    if name not in preset_names():
        raise unknown_name("plan", name, preset_names(), "plans show")
    emit(preset_text(name))


@plans.command("check")
@guarded
def check_plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A plan in YAML.")],
    json: Json = False,
) -> None:
    """Read a plan and every option in it; nothing else is done."""
    from rich.text import Text

    from reattend.plan import Plan

    plan = Plan.load(file)
    if json:
        emit(dumped(plan.to_dict()))
        return
    out = console()
    for number, rule in enumerate(plan.rules):
        given = {} if rule.options is None else rule.options.model_dump(exclude_unset=True)
        options = ", ".join(f"{k}: {v}" for k, v in given.items())
        what = f"{number}  {rule.describe()}  ->  {rule.to}" + (f"  ({options})" if options else "")
        out.print(Text(what))
    out.print(Text(f"{file}: a valid plan, {len(plan.rules)} rules", style="bold"))
