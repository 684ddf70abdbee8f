"""`reattend find`: the blocks of a model as a table, as JSON, or the long story of one."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reattend.cli_guard import console, dumped, emit, guarded, quiet
from reattend.cli_look import (
    Inputs,
    Json,
    Model,
    Trust,
    Weights,
    example_inputs,
    opened_model,
)  # fmt: skip
from reattend.errors import ArgumentError, NothingFoundError

if TYPE_CHECKING:
    from reattend.found import FoundAttention

Why = Annotated[
    str | None,
    typer.Option("--why", metavar="PATH", help="All that is known of one block, found or refused."),
]
Meta = Annotated[
    bool,
    typer.Option(
        "--meta",
        help="Read the config alone, no weights: proofs wait. Done by itself where there are none.",
    ),
]


@guarded
def find(
    model: Model,
    why: Why = None,
    json: Json = False,
    meta: Meta = False,
    trust_remote_code: Trust = False,
    weights: Weights = None,
    inputs: Inputs = None,
) -> None:
    """List the attention blocks of a model, what they compute, and which cannot be converted.

    A block is verified when, rebuilt from its description, it gives the original's output to
    1e-12 in float64.
    """
    quiet()
    from reattend.find_table import show_found
    from reattend.finder import find_attention
    from reattend.pages import given_back

    with given_back():
        opened = _opened(model, weights, meta, trust_remote_code)
        found = find_attention(opened, example_inputs(inputs, opened))
    if why is not None:
        _explained(found, why, json)
        return
    if json:
        emit(dumped(as_data(found)))
    else:
        show_found(found, console())
    if not found.sites:
        raise nothing_found(model, found)


def _opened(model: str, weights: Path | None, meta: bool, trust: bool) -> Any:
    """The model; from its config alone where that is asked for, or all there is."""
    from reattend.factory import names_factory
    from reattend.hollow import is_meta
    from reattend.source_check import check_weights
    from reattend.source_empty import open_empty, readable

    if meta and names_factory(model):
        raise ArgumentError(
            "--meta is for model folders and ids",
            where=model,
            next_step="build the module on the meta device in the factory itself: it is read so",
        )
    if meta:
        return open_empty(model, trust)
    opened = opened_model(model, weights)
    if not isinstance(opened, str) and not is_meta(opened):
        check_weights(opened)
    return readable(opened, trust)


def _explained(found: FoundAttention, path: str, json: bool) -> None:
    from reattend.explain import explain
    from reattend.find_story import show_story

    told = explain(found, path)
    if json:
        emit(dumped(told.to_dict()))
    else:
        show_story(told, console())


def nothing_found(model: str, found: FoundAttention) -> NothingFoundError:
    """Why there is nothing to convert, and what to do about it."""
    if found.refused:
        first = found.refused[0]
        alike: dict[str, list[str]] = {}
        for r in found.refused:
            alike.setdefault(r.reason, []).append(r.path or "(model)")
        told = [(p[0] + (f" and {len(p) - 1} more" if p[1:] else ""), r) for r, p in alike.items()]
        why = "; ".join(f"{paths}: {reason}" for paths, reason in told[:5])
        step = f'see what differs: reattend find {model} --why "{first.path or "(model)"}"'
    else:
        why = "the graph has no softmax attention"
        step = (
            "a model without attention (state spaces, convolutions) has nothing to convert; if "
            "this one has some, pass --inputs with arguments that reach it"
        )
    return NothingFoundError(
        "no attention block was found that could be converted", where=model, why=why, next_step=step
    )


def as_data(found: FoundAttention) -> dict[str, Any]:
    """Everything found and refused, for machines."""
    from reattend.find_table import parameters
    from reattend.reporting import spec_summary

    return {
        "sites": [
            {
                "path": s.path,
                "kind": s.spec.kind,
                "spec": spec_summary(s).model_dump(mode="json"),
                "summary": s.spec.summary(),
                "parameters": parameters(found, s),
                "verified": s.verified,
                "deferred": s.deferred,
                "error": None if math.isnan(s.error) else s.error,
            }
            for s in found.sites
        ],
        "refused": [
            {
                "path": r.path,
                "reason": r.reason,
                "step": r.step,
                "node": r.node,
                "nearest": r.nearest,
                "latent": None if r.latent is None else asdict(r.latent),
                "verified": r.verified,
            }
            for r in found.refused
        ],
    }
