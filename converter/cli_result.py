"""Commands on a finished result: `report`, `verify` and `export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from reattend.cli_guard import console, dumped, emit, guarded, quiet
from reattend.cli_look import Inputs, Json, Trust
from reattend.errors import GateError

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="What `reattend convert` wrote.")]
MARKS = {"pass": ("✓", "green"), "fail": ("✗", "bold red"), "info": ("·", "dim")}


@guarded
def report(folder: Folder, json: Json = False) -> None:
    """Print the summary of a conversion, and where its full report lies."""
    from reattend.report import Report

    found = Report.load(folder)
    if json:
        emit(found.to_json())
        return
    out = console()
    out.print(found.summary())
    page = (folder if folder.is_dir() else folder.parent) / "report.html"
    out.print()
    line = f"full report: {page.absolute()}" if page.is_file() else f"there is no {page.name} here"
    out.print(line, markup=False, soft_wrap=True)


@guarded
def verify(
    folder: Folder,
    original: Annotated[
        str | None,
        typer.Option("--original", metavar="MODEL", help="Also compare with what it was made of."),
    ] = None,
    json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Check that a converted folder still is what its report says.

    Files, report, provenance and weights are read again, and cached decoding is compared with one
    pass. Nothing is written.
    """
    quiet()
    from rich.table import Table
    from rich.text import Text

    from reattend.recheck import recheck

    findings = recheck(folder, original, trust_remote_code=trust_remote_code)
    if json:
        emit(dumped([asdict(f) for f in findings]))
    else:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for f in findings:
            mark, style = MARKS[f.verdict]
            table.add_row(Text(mark, style=style), Text(f.name), Text(f.detail))
        console().print(table)
    failed = [f for f in findings if f.verdict == "fail"]
    if failed:
        raise GateError(
            f"{len(failed)} of {len(findings)} checks failed",
            where=str(folder),
            why="; ".join(f"{f.name}: {f.detail}" for f in failed),
            next_step="convert the model again",
        )


@guarded
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to create.")],
    target: Annotated[str, typer.Option(help="onnx, deepseek or deepseek-v2.")] = "onnx",
    dtype: Annotated[
        str | None,
        typer.Option(help="onnx: float32 (default) or float16; else the model's if not given."),
    ] = None,
    pad: Annotated[
        str | None,
        typer.Option(help="deepseek: max, or 512+64: zeros that make all layers one size."),
    ] = None,
    flavour: Annotated[
        str | None,
        typer.Option(help="onnx: portable (default), ort (ONNX Runtime's operators) or custom."),
    ] = None,
    inputs: Inputs = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another export of reattend in OUT.")
    ] = False,
) -> None:
    """Lower a converted model to files that others read, and check them against torch.

    onnx: one file for ONNX Runtime; of an encoder, vision or diffusion model one pass, from example
    --inputs to outputs. deepseek: a checkpoint for transformers' own
    DeepseekV3ForCausalLM (deepseek-v2: DeepseekV2ForCausalLM), without reattend.
    """
    quiet()
    from reattend.api import export as lower
    from reattend.outdir import check_claimable
    from reattend.report.numbers import size

    check_claimable(out.expanduser().absolute())
    made = lower(
        folder, target, out=out, dtype=dtype, pad=pad, flavour=flavour, inputs=inputs,
        overwrite=overwrite,
    )  # fmt: skip
    weight = sum(f.stat().st_size for f in made.path.iterdir() if f.is_file())
    text = f"{made.path}: {size(weight)}, relative difference from torch {made.max_error:.1e}"
    console().print(text, markup=False, soft_wrap=True)
    if target != "onnx":
        from reattend.targets.deepseek.loaders import as_text

        console().print(f"\n{as_text(made.manifest.loaders)}", markup=False, soft_wrap=True)
