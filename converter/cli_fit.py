"""`reattend plans fit`: which fixed shapes are worth it for a model."""

from __future__ import annotations

from dataclasses import asdict

from reattend.cli_guard import console, dumped, emit, guarded, quiet
from reattend.cli_look import Inputs, Json, Model, Trust, Weights, example_inputs, opened_model


@guarded
def fit(
    model: Model,
    json: Json = False,
    trust_remote_code: Trust = False,
    weights: Weights = None,
    inputs: Inputs = None,
) -> None:
    """What the shapes that servers' kernels take would keep of a model's cache, or add to it.

    Numbers cached per token and layer: r + R of the plan, of G x (d + e) for G key/value heads of
    widths d and e. Nothing is converted.
    """
    quiet()
    from rich.table import Table
    from rich.text import Text

    from reattend.advice import advise, loading
    from reattend.finder import find_attention
    from reattend.source import open_source

    source = open_source(opened_model(model, weights), trust_remote_code=trust_remote_code)
    found = find_attention(source.model, example_inputs(inputs, source.model))
    rows, missing = advise(found), loading(source.model, found)
    if json:
        emit(dumped({"fits": [asdict(row) for row in rows], "deepseek": missing}))
        return
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for head in ("Plan", "Blocks", "r + R of G x (d + e)", "Keeps", "Advice"):
        table.add_column(head, overflow="fold")
    for row in rows:
        style = "" if row.takes else "yellow"
        table.add_row(
            Text(row.plan, style="bold"), str(row.blocks), Text(row.arithmetic),
            f"{100 * row.share:.1f} %", Text(row.advice, style=style),
        )  # fmt: skip
    console().print(table)
    told = f"no: {missing}" if missing else "yes (the plan deepseek, or --target deepseek)"
    console().print(Text(f"transformers' DeepseekV3ForCausalLM can carry it: {told}"))
