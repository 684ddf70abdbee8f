"""The command line: `reattend find | plans | convert | verify | export | report`.

Commands live in `reattend.cli_<name>`; nothing here imports torch, so `--help` is quick.
"""

from __future__ import annotations

from typing import Annotated

import typer

from reattend import __version__
from reattend.cli_convert import Command, convert
from reattend.cli_find import find
from reattend.cli_fit import fit
from reattend.cli_guard import DEBUG
from reattend.cli_look import plans
from reattend.cli_options import options as plan_options
from reattend.cli_result import export, report, verify

__all__ = ["app", "main"]

EXAMPLES = """
[bold]Examples[/bold]

  reattend find MODEL

  reattend find MODEL --why model.layers.0.self_attn

  reattend plans show transmla > my-plan.yaml

  reattend plans options mla

  reattend plans fit MODEL

  reattend convert MODEL --plan transmla --set kv_keep=0.25 --dry-run

  reattend convert MODEL --plan my-plan.yaml --data text.txt --out converted

  reattend report converted

  reattend export converted --target onnx --out converted-onnx

[bold]Exit codes[/bold]

  0 ok; 1 internal error; 2 bad plan or arguments; 3 nothing matched, unsupported or refused;

  4 a verification gate failed; 5 a package is missing; 6 interrupted, can be resumed
"""

app = typer.Typer(
    name="reattend",
    help="Give a trained transformer a new attention: find it, convert it, prove it, lower it.",
    epilog=EXAMPLES,
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"reattend {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command's name."""
    DEBUG.set(debug)


LOOK, DO, USE = "Look, change nothing", "Convert", "Work with a result"
app.command(rich_help_panel=LOOK)(find)
plans.command("options")(plan_options)
plans.command("fit")(fit)
app.add_typer(plans, name="plans", rich_help_panel=LOOK)
app.command(rich_help_panel=DO, cls=Command)(convert)
app.command(rich_help_panel=USE)(report)
app.command(rich_help_panel=USE)(verify)
app.command(rich_help_panel=USE)(export)


def main() -> None:
    """The console script."""
    app()
