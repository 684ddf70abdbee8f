"""`reattend plans options`: what may be written beside `to: NAME`, read from the options model."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from reattend.cli_guard import console, dumped, emit, guarded
from reattend.cli_look import Json

if TYPE_CHECKING:
    from pydantic import BaseModel

_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)$")
_MORE = re.compile(r"^ {8}(\S.*)$")
#: what a conversion tells itself between two stages
_INTERNAL = "not for plans."


@guarded
def options(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="[NAME]", help="A conversion, `calibrate` or `verify`; none: all, by name."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """The keys a plan may hold, what each takes and what it means."""
    from rich.table import Table
    from rich.text import Text

    kinds = sections() if name is None else {name: section(name)}
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
        out.print(Text(headline(title), style="bold"))
        if table.row_count:
            out.print(table)
        out.print()


SECTIONS = ("calibrate", "verify")


def sections() -> dict[str, type[BaseModel]]:
    """Every conversion's options and the plan's own sections, by the name they have in a plan."""
    from reattend.passes.rewrite.registry import conversion_names

    return {name: section(name) for name in (*conversion_names(), *SECTIONS)}


def section(name: str) -> type[BaseModel]:
    """The model behind one name.

    Raises:
        PlanError: no conversion has this name; the nearest one is named.
    """
    from reattend.passes.rewrite.registry import conversion, conversion_names
    from reattend.plan_sections import Calibrate, Verify
    from reattend.plan_text import unknown_name

    own: dict[str, type[BaseModel]] = {"calibrate": Calibrate, "verify": Verify}
    if name in own:
        return own[name]
    names = conversion_names()
    if name not in names:
        raise unknown_name("conversion", name, [*names, *SECTIONS], "plans options")
    found: type[BaseModel] = conversion(name).Options
    return found


def headline(name: str) -> str:
    """One line about a section: of the module its conversion is in, or of its own text."""
    from reattend.passes.rewrite.registry import conversion

    kind = section(name)
    if name in SECTIONS:
        return f"{name}: {(inspect.getdoc(kind) or '').partition(chr(10))[0]}"
    texts = [inspect.getdoc(inspect.getmodule(k)) or "" for k in conversion(name).__mro__]
    telling = (text for text in texts if text.startswith(f"`to: {name}`:"))
    return next(telling, f"to: {name}").partition("\n")[0].replace("`", "")


def described(kind: type[BaseModel]) -> list[tuple[str, dict[str, str]]]:
    """Each key with what it takes, its default as a plan writes it, and the docstring's words."""
    from reattend.plan_words import allowed

    words = meanings(kind)
    rows = []
    for key, field in kind.model_fields.items():
        meaning = words.get(key, "")
        if meaning.endswith(_INTERNAL):
            continue
        default = "required" if field.is_required() else written(field.default)
        takes = allowed(kind, (key,))
        rows.append((key, {"key": key, "takes": takes, "default": default, "meaning": meaning}))
    return rows


def meanings(kind: type[BaseModel]) -> dict[str, str]:
    """The entries under `Attributes:` of a class and its parents, by name, each on one line."""
    found: dict[str, str] = {}
    last: list[str] = []
    texts = [vars(parent).get("__doc__") or "" for parent in reversed(kind.__mro__)]
    for line in "\n".join(map(inspect.cleandoc, texts)).splitlines():
        if entry := _ENTRY.match(line):
            last = entry[1].split(", ")
            found |= dict.fromkeys(last, entry[2])
        elif more := _MORE.match(line):
            found |= {name: f"{found[name]} {more[1]}" for name in last}
    return found


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
