"""The keys of a plan by the docstrings of the models that hold them: meaning, and for whom."""

from __future__ import annotations

import inspect
import re

from pydantic import BaseModel

_ENTRY = re.compile(r"^ {4}(\w+(?:, \w+)*): (.*)$")
_MORE = re.compile(r"^ {8}(\S.*)$")
#: what a conversion tells itself between two stages
_INTERNAL = "not for plans."


def writable(kind: type[BaseModel]) -> list[str]:
    """The keys that a plan may write."""
    words = meanings(kind)
    return [key for key in kind.model_fields if not words.get(key, "").endswith(_INTERNAL)]


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
