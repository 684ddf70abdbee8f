"""What the keys of a plan may hold, read from the pydantic models that hold them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import BaseModel
from pydantic.errors import PydanticUserError

_KINDS = {
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("a text", "texts"),
    "boolean": ("true or false", "true or false"),
    "object": ("a mapping", "mappings"),
    "null": ("null", "null"),
}
_LIMITS = (
    ("minimum", ">= {}"),
    ("exclusiveMinimum", "> {}"),
    ("maximum", "<= {}"),
    ("exclusiveMaximum", "< {}"),
)


def value_at(data: Any, path: Sequence[int | str]) -> Any:
    """What the data hold at a place; None where they do not go so far."""
    for part in path:
        known = part in data if isinstance(data, Mapping) else isinstance(part, int)
        data = data[part] if known else None
    return data


def mistyped(kind: type[BaseModel], data: Mapping[str, Any]) -> Iterator[str]:
    """Keys that hold true or false, or a text, where a number belongs, or the like.

    Pydantic takes these for each other: true for 1, "4" for 4, "yes" for true.
    """
    schema = _schema(kind)
    for path in _mistyped(schema, schema.get("$defs", {}), data):
        key, words = ".".join(map(str, path)), allowed(kind, path, data)
        yield f"{key} must be {words}, got {shown(value_at(data, path))}"


def _mistyped(
    schema: Mapping[str, Any], names: Mapping[str, Any], value: Any
) -> Iterator[tuple[int | str, ...]]:
    """Where, in a value, something is of another type than all that may be there."""
    choices = list(_fields(schema, names, value))
    if isinstance(value, Mapping):
        for key, inner in value.items():
            found = next((f["properties"][key] for f in choices if _has(f, key)), None)
            if found is not None:
                yield from ((key, *path) for path in _mistyped(found, names, inner))
    elif isinstance(value, list | tuple):
        item = {"anyOf": [f["items"] for f in choices if "items" in f]}
        for number, inner in enumerate(value):
            for path in _mistyped(item, names, inner):
                yield (number, *path) if path else ()
                if not path:  # said of the list
                    return
    elif isinstance(value, bool | str | int | float) and not _may_be(choices, value):
        yield ()


def _may_be(choices: Sequence[Mapping[str, Any]], value: bool | str | float) -> bool:
    types = {str(f.get("type", "")) for f in choices}
    words = [v for f in choices for v in f.get("enum", [f["const"]] if "const" in f else [])]
    exact = types & {"integer", "number", "boolean"}
    if not exact or value in words:
        return True
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, str):
        return bool(types & {"string", "array"})  # a list may be written as its only entry
    return exact != {"boolean"}


@lru_cache(maxsize=64)
def _schema(kind: type[BaseModel]) -> Mapping[str, Any]:
    """Of all keys; empty where pydantic has none, for a type of a conversion that is not ours."""
    try:
        return kind.model_json_schema()
    except PydanticUserError:
        return {}


def allowed(kind: type[BaseModel], path: Sequence[int | str], data: Any = None) -> str:
    """What the field at this place takes; empty where pydantic has no schema of it.

    Args:
        kind: the model.
        path: keys and numbers from it to the field.
        data: what it is to be built from, where that decides what is inside.
    """
    names = _schema(kind).get("$defs", {})
    return _words(_at(kind, path, data)[0], names)


def keys(kind: type[BaseModel], path: Sequence[int | str], data: Any = None) -> list[str]:
    """The keys that the mapping at this place may have."""
    here, inner = _at(kind, path, data)
    names = _schema(kind).get("$defs", {})
    return sorted({k for f in _fields(here, names, inner) for k in f.get("properties", {})})


def _at(
    kind: type[BaseModel], path: Sequence[int | str], data: Any
) -> tuple[Mapping[str, Any], Any]:
    """The schema of a place, and what the data hold there."""
    here: Mapping[str, Any] = _schema(kind)
    names = here.get("$defs", {})
    for part in path:
        here = next((f for f in _fields(here, names, data) if _has(f, part)), {})
        here = (
            here.get("items", {})
            if isinstance(part, int)
            else here.get("properties", {}).get(part, {})
        )
        data = value_at(data, [part]) if isinstance(data, Mapping | list | tuple) else None
    return here, data


def _has(schema: Mapping[str, Any], part: int | str) -> bool:
    return "items" in schema if isinstance(part, int) else part in schema.get("properties", {})


def _fields(
    schema: Mapping[str, Any], names: Mapping[str, Any], value: Any = None
) -> Iterator[Mapping[str, Any]]:
    """The schema itself, or each of the types it is a choice of; of kinds, that of the value."""
    if "$ref" in schema:
        yield from _fields(names.get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), names, value)
    elif "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from _fields(part, names, value)
    elif "oneOf" in schema:
        told = schema.get("discriminator", {})
        said = value.get(told.get("propertyName")) if isinstance(value, Mapping) else None
        chosen = told.get("mapping", {}).get(said) if isinstance(said, str) else None
        for part in schema["oneOf"] if chosen is None else [{"$ref": chosen}]:
            yield from _fields(part, names, value)
    else:
        yield schema


def _words(schema: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _words(names.get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), names)
    if "anyOf" in schema or "oneOf" in schema:
        parts = [_words(part, names) for part in schema.get("anyOf", schema.get("oneOf", []))]
        return either(list(dict.fromkeys(p for p in parts if p)))
    if "const" in schema or "enum" in schema:
        return either([str(v) for v in schema.get("enum", [schema.get("const")])])
    if schema.get("type") == "array":
        item = schema.get("items", {})
        plain = "enum" not in item and "const" not in item and item.get("type") in _KINDS
        inner = _KINDS[item["type"]][1] + _limits(item) if plain else _words(item, names)
        return f"a list of {inner or 'values'}"
    name = _KINDS.get(schema.get("type", ""), ("", ""))[0]
    return name + _limits(schema) if name else ""


def _limits(schema: Mapping[str, Any]) -> str:
    said = [text.format(schema[name]) for name, text in _LIMITS if name in schema]
    return f" {' and '.join(said)}" if said else ""


def either(parts: list[str]) -> str:
    """`a, b or c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} or {parts[-1]}"


def shown(value: Any) -> str:
    """As a plan writes it, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
