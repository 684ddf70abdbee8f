"""Commands that change nothing: `find` and `plans`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reattend.cli_guard import console, dumped, emit, guarded, quiet
from reattend.errors import ArgumentError, NothingFoundError

if TYPE_CHECKING:
    from reattend.finder import FoundAttention

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


@guarded
def find(
    model: Model,
    json: Json = False,
    trust_remote_code: Trust = False,
    weights: Weights = None,
    inputs: Inputs = None,
) -> None:
    """List the attention blocks of a model, what they compute, and which cannot be converted.

    A block is verified when, rebuilt from its description, it gives the original's output to
    1e-12 in float64.
    """
    quiet()
    from reattend.finder import find_attention
    from reattend.source import open_source

    source = open_source(opened_model(model, weights), trust_remote_code=trust_remote_code)
    found = find_attention(source.model, example_inputs(inputs, source.model))
    if json:
        emit(dumped(_found(found)))
    else:
        _show(found)
    if not found.sites:
        raise NothingFoundError(
            "no attention block was found that could be converted",
            where=model,
            why="; ".join(f"{r.path}: {r.reason}" for r in found.refused[:5])
            or "the graph has no softmax attention",
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


def _found(found: FoundAttention) -> dict[str, Any]:
    from reattend.reporting import spec_summary

    return {
        "sites": [
            {
                "path": s.path,
                "kind": s.spec.kind,
                "spec": spec_summary(s).model_dump(mode="json"),
                "verified": s.verified,
                "error": s.error,
            }
            for s in found.sites
        ],
        "refused": [asdict(r) for r in found.refused],
    }


def _show(found: FoundAttention) -> None:
    from rich.table import Table
    from rich.text import Text

    from reattend.reporting import spec_summary

    out = console()
    if found.sites:
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for head in ("Block", "Attention", "Verified"):
            table.add_column(head, overflow="fold")
        for s in found.sites:
            spec = Text(spec_summary(s).text() + (", cross" if s.spec.kind == "cross" else ""))
            table.add_row(Text(s.path), spec, Text(f"✓ {s.error:.0e}" if s.verified else "no"))
        out.print(table)
    latent = [r for r in found.refused if r.latent is not None]
    missed = [r for r in found.refused if r.latent is None]
    for title, rows in (("Already latent", latent), ("Not understood", missed)):
        if rows:
            table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
            for head in (title, "Reason"):
                table.add_column(head, overflow="fold")
            for r in rows:
                reason = f"{r.reason} ✓" if r.verified else r.reason
                table.add_row(Text(r.path or "(model)"), Text(reason))
            out.print(table)
    already = f"{len(latent)} already latent, " if latent else ""
    told = f"{len(found.sites)} found, {already}{len(missed)} not understood"
    out.print(Text(told, style="bold"))


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
