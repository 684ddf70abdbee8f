"""`reattend plans options`: what may be written beside `to: NAME`, read from the options model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from reattend.cli_guard import console, dumped, emit, guarded
from reattend.cli_look import Json
from reattend.plan_keys import meanings, writable
from reattend.plan_schema import allowed

if TYPE_CHECKING:
    from pydantic import BaseModel

SECTIONS = ("calibrate", "verify")


@guarded
def options(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]",
            help="A conversion, `calibrate` or `verify`, or a key of one that holds keys of its "
            "own, for example sparse.pattern; none: all, by name.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The keys a plan may hold, what each takes and what it means."""
    from rich.table import Table
    from rich.text import Text

    kinds = sections() if name is None else section(name)
    if json:
        found = {n: [row for _, row in described(kind)] for n, kind in kinds.items()}
        emit(dumped(found))
        return
    out = console()
    for title, kind in kinds.items():
        table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
        for head in ("Key", "Takes", "Default", "Meaning"):
            table.add_column(head, overflow="fold", ratio={"Takes": 3, "Meaning": 7}.get(head))
        for key, row in described(kind):
            style = Text(key, style="bold")
            table.add_row(style, Text(row["takes"]), Text(row["default"]), Text(row["meaning"]))
        out.print(Text(headline(title, kind), style="bold"))
        if table.row_count:
            out.print(table)
        out.print()


def sections() -> dict[str, type[BaseModel]]:
    """Every conversion's options and the plan's own sections, by the name they have in a plan."""
    from reattend.passes.rewrite.registry import conversion, conversion_names
    from reattend.plan_sections import Calibrate, Verify

    own: dict[str, type[BaseModel]] = {"calibrate": Calibrate, "verify": Verify}
    return {name: conversion(name).Options for name in conversion_names()} | own


def section(name: str) -> dict[str, type[BaseModel]]:
    """The model behind one name, and those of its keys that hold keys of their own, each once.

    Raises:
        PlanError: nothing has this name; the nearest one is named.
    """
    from reattend.plan_text import unknown_name

    every = {n: k for title, kind in sections().items() for n, k in nested(title, kind).items()}
    found = {n: k for n, k in every.items() if n == name or n.startswith(f"{name}.")}
    found = found or {n: k for n, k in every.items() if f".{name}." in f"{n}."}
    if not found:
        whole = [n for n in every if "." not in n]
        ends = {n.rpartition(".")[2] for n in every}
        raise unknown_name("conversion", name, {*whole, *ends}, "plans options")
    first: dict[type[BaseModel], str] = {}
    for title, kind in found.items():
        first.setdefault(kind, title)
    return {title: kind for kind, title in first.items()}


def nested(title: str, kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """A model by its name, and those inside of it, by dotted names; kinds by theirs."""
    found = {title: kind}
    for key in writable(kind):
        inside = list(_models(kind.model_fields[key].annotation))
        for inner in inside:
            said = get_args(inner.model_fields["kind"].annotation) if len(inside) > 1 else ()
            found |= nested(".".join((title, key, *said)), inner)
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def headline(name: str, kind: type[BaseModel]) -> str:
    """One line about a section: of the module its conversion is in, or of its own text."""
    from reattend.passes.rewrite.registry import conversion, conversion_names

    if name not in conversion_names():
        return f"{name}: {(inspect.getdoc(kind) or '').partition(chr(10))[0]}"
    texts = [inspect.getdoc(inspect.getmodule(k)) or "" for k in conversion(name).__mro__]
    telling = (text for text in texts if text.startswith(f"`to: {name}`:"))
    return next(telling, f"to: {name}").partition("\n")[0].replace("`", "")


def described(kind: type[BaseModel]) -> list[tuple[str, dict[str, str]]]:
    """Each key with what it takes, its default as a plan writes it, and the docstring's words."""
    words = meanings(kind)
    rows = []
    for key in writable(kind):
        field = kind.model_fields[key]
        default = "required" if field.is_required() else written(field.default)
        row = {"key": key, "takes": allowed(kind, (key,)), "default": default}
        rows.append((key, {**row, "meaning": words.get(key, "")}))
    return rows


def written(value: Any) -> str:
    """A default as YAML would hold it; nested sections keep their own defaults."""
    from pydantic import BaseModel

    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(written, value))}]"
    return str(value)
