"""`reattend convert`: one conversion, or its forecast with `--dry-run`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from reattend.cli_guard import console, dumped, emit, guarded, quiet
from reattend.cli_look import Inputs, Model, Trust, Weights, example_inputs, opened_model
from reattend.errors import ArgumentError, InterruptedRun
from reattend.processes import is_main

if TYPE_CHECKING:
    from reattend.events import OnEvent
    from reattend.pipeline import Job
    from reattend.predict import Prediction

LOADING, OUTPUT = "How the model is opened", "What is shown"
STDERR = Path("-")


class Command(TyperCommand):
    """`convert`, whose `--log-json` may stand alone."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `-` where another option, or nothing, follows."""
        for i in [i for i, word in enumerate(args) if word == "--log-json"][::-1]:
            if i + 1 == len(args) or (args[i + 1].startswith("-") and args[i + 1] != str(STDERR)):
                args.insert(i + 1, str(STDERR))
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


@guarded
def convert(
    model: Model,
    plan: Annotated[
        str, typer.Option("--plan", "-p", help="A shipped plan or a YAML file.")
    ] = "transmla",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "-d",
            metavar="PATH",
            help=".txt, .jsonl or folder; self, or none: the model's own samples.",
        ),
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="PATH", help="Folder to create.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change the plan: kv_keep=0.25; repeat. All keys: `reattend plans options`.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, training and measurement.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another result of reattend in OUT.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change and cost; write nothing.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, ...: none keeps it.", rich_help_panel=LOADING),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, ...", rich_help_panel=LOADING)
    ] = None,
    trust_remote_code: Trust = False,
    weights: Weights = None,
    inputs: Inputs = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the report as JSON.", rich_help_panel=OUTPUT)
    ] = False,
    log_json: Annotated[
        Path | None,
        typer.Option(
            "--log-json",
            metavar="[FILE]",
            rich_help_panel=OUTPUT,
            help="Every event as a line of JSON, appended to FILE; none, or -: to stderr.",
        ),
    ] = None,
) -> None:
    """Give a model a new attention, and prove what was done.

    Works in OUT.partial and renames it to OUT when everything is there. A run that was stopped
    continues when the same command is given again.
    """
    for name, given in (("--plan", plan), ("--data", data), ("--out", out)):
        if given is not None and not given.strip():  # as of a shell variable that is not set
            raise ArgumentError(
                f"{name} is empty", where=f"{name} {given!r}", next_step="leave it out, or name it"
            )
    if out is None and not dry_run:
        raise ArgumentError(
            "there is no output folder",
            next_step="add --out DIR, or --dry-run to see what would happen",
        )
    from reattend.plan import Plan

    chosen = Plan.load(plan).with_set(settings or [])
    with _listening(log_json) as listen:
        quiet()
        from reattend.arguments import as_seed
        from reattend.pipeline import Job

        opened = opened_model(model, weights)
        example: Any = inputs
        batches: Any = data
        if opened is not model:
            example = example_inputs(inputs, opened)
            if data is not None and Path(data).suffix == ".safetensors":
                batches = [example_inputs(Path(data), opened)]
        where = None if out is None else Path(out)
        opening: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "trust_remote_code": trust_remote_code,
        }
        from reattend.api import convert as run

        try:
            if dry_run:
                job = Job(chosen, example, batches, as_seed(seed), out=where, on_event=listen)
                _dry_run(job, opened, opening, json)
                return
            result = run(
                opened, chosen, inputs=example, data=batches, out=where, seed=seed,
                overwrite=overwrite, on_event=listen, **opening,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise _interrupted(where) from None
    if not is_main():
        return
    if json:
        emit(result.report.to_json())
        return
    screen = console()
    screen.print(result.report.summary())
    screen.print()
    reused = [] if result.run is None else [s.name for s in result.run.stages if s.reused]
    if result.run is None:
        screen.print("already complete: this very result was there, nothing was done")
    if reused:
        screen.print(f"reused from an earlier run: {', '.join(reused)}", markup=False)
    screen.print(f"{result.out}", markup=False, soft_wrap=True)
    screen.print(f"report: {Path(str(result.out)) / 'report.html'}", markup=False, soft_wrap=True)


@contextlib.contextmanager
def _listening(log: Path | None) -> Iterator[OnEvent]:
    from reattend.events import JsonLog, Progress, both

    if not is_main():
        yield lambda event: None
        return
    if log == STDERR:  # lines and bars would mix
        yield JsonLog(sys.stderr)
        return
    with contextlib.ExitStack() as stack:
        lines = None if log is None else stack.enter_context(JsonLog(log))
        yield both(lines, stack.enter_context(Progress()))


def _interrupted(out: Path | None) -> InterruptedRun:
    from reattend.outdir import partial_of

    if out is None or not partial_of(out).exists():
        return InterruptedRun("interrupted; nothing was written", next_step="run the command again")
    return InterruptedRun(
        "interrupted; what was finished is kept",
        where=str(partial_of(out)),
        next_step="run the same command again: it continues where it stopped",
    )


def _dry_run(job: Job, model: Any, opening: dict[str, Any], json: bool) -> None:
    """Print the forecast, then refuse what the run would refuse."""
    from reattend.preflight import enforce

    job.open(model, **opening)
    job.find()
    prediction = job.forecast()
    if json:
        emit(dumped(prediction.to_dict()))
    else:
        show_prediction(prediction)
    enforce(job.choices, job.plan)


def show_prediction(prediction: Prediction) -> None:
    """Tables of sites and stages."""
    from rich.table import Table
    from rich.text import Text

    from reattend.report.numbers import size

    def table(heads: tuple[str, ...]) -> Table:
        made = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for i, head in enumerate(heads):
            made.add_column(head, justify="left" if i < 2 else "right", overflow="fold")
        return made

    costs = ("Cache B/token", "after", "Parameters", "after", "Memory", "Time")
    sites = table(("Block", "Would become", *costs))
    for s in prediction.sites:
        what = _named(s.conversion, s.options)
        what = what if s.action == "converted" else f"{s.action}: {s.reason}"
        sites.add_row(
            Text(s.path), Text(what), f"{s.cache_bytes_before:,}", f"{s.cache_bytes_after:,}",
            f"{s.parameters_before:,}", f"{s.parameters_after:,}",
            *((size(s.peak_bytes), _duration(s.seconds)) if s.action == "converted" else ("", "")),
        )  # fmt: skip
    before = sum(s.cache_bytes_before for s in prediction.sites)
    after = sum(s.cache_bytes_after for s in prediction.sites)
    sites.add_row(
        Text("whole model", style="bold"), "", f"{before:,}", f"{after:,}",
        f"{prediction.parameters_before:,}", f"{prediction.parameters_after:,}", end_section=True,
    )  # fmt: skip
    stages = table(("Stage", "", "Peak memory", "Time, rough"))
    for stage in prediction.stages:
        stages.add_row(stage.name, "", size(stage.peak_bytes), _duration(stage.seconds))
    stages.add_row(
        Text("whole run", style="bold"), "", size(prediction.peak_bytes),
        _duration(prediction.seconds),
    )  # fmt: skip
    screen = console()
    screen.print(sites)
    screen.print()
    screen.print(stages)
    notes = (
        "a block's memory and time: what it would add to the model's if it alone changed",
        "a stage's memory: beside about 0.5 GB for Python, torch and transformers",
    )
    screen.print(Text("\n".join(notes), style="dim"))


def _named(conversion: str, options: Mapping[str, Any]) -> str:
    """`mla (kv_keep: 0.5)`, or `heads [0]: mla (kv_keep: 0.5), heads [1]: dense`."""
    if "groups" in options and conversion == "mixed":
        parts = [dict(part) for part in options["groups"]]
        return ", ".join(f"heads {p.pop('heads')}: {_named(p.pop('to'), p)}" for p in parts)
    text = ", ".join(f"{key}: {value}" for key, value in options.items())
    return f"{conversion} ({text})" if text else conversion


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
