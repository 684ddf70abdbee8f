"""What a key of a plan may hold, in words, read from the pydantic model that holds it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
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


def complaints(
    error: ValidationError, kind: type[BaseModel], data: Mapping[str, Any]
) -> Iterator[str]:
    """One sentence for each key that is wrong: what it may hold and what it holds.

    A choice between types makes pydantic complain once for every one of them; here the key is
    named once. What a validator of ours says (`ValueError`) is passed on as it is.

    Args:
        error: what pydantic raised.
        kind: the model that was to be built.
        data: the mapping it was to be built from.
    """
    told: set[str] = set()
    for item in error.errors():
        path = _inside(item["loc"], data)
        key = ".".join(map(str, path))
        if key and key in told:
            continue
        told.add(key)
        if item["type"] == "missing":
            yield f"{'.'.join(map(str, item['loc']))} is missing"
        elif item["type"] == "extra_forbidden" and len(path) > 1:
            yield f"{'.'.join(map(str, path[:-1]))} has no key {path[-1]!r}"
        elif item["type"] in ("value_error", "assertion_error") or not path:
            said = str(item.get("ctx", {}).get("error") or item["msg"])
            yield f"{key}: {said} (got {_shown(item['input'])})" if key else said
        else:
            words = allowed(kind, path)
            said = f" must be {words}" if words else f": {item['msg']}"
            yield f"{key}{said}, got {_shown(_value(data, path))}"


def _inside(place: Sequence[int | str], data: Any) -> tuple[int | str, ...]:
    """The part of pydantic's place of an error that is in the data; the rest names types."""
    path: list[int | str] = []
    for part in place:
        known = isinstance(data, Mapping) and part in data
        if not known and not (isinstance(data, list | tuple) and isinstance(part, int)):
            break
        data = data[part]
        path.append(part)
    while path and isinstance(path[-1], int):  # what a list holds is said of the list
        path.pop()
    return tuple(path)


def _value(data: Any, path: Sequence[int | str]) -> Any:
    for part in path:
        data = data[part]
    return data


def not_switches(kind: type[BaseModel], data: Mapping[str, Any]) -> Iterator[str]:
    """Keys that hold true or false where a number belongs; to pydantic these are 1 and 0."""
    for key, value in data.items():
        values = value if isinstance(value, list | tuple) else [value]
        if not any(isinstance(v, bool) for v in values):
            continue
        words = allowed(kind, (key,))
        if "number" in words and "true or false" not in words:
            yield f"{key} must be {words}, got {_shown(value)}"


def allowed(kind: type[BaseModel], path: Sequence[int | str]) -> str:
    """What the field at this place takes; empty where pydantic has no schema of it."""
    try:
        schema = kind.model_json_schema()
    except PydanticUserError:  # a type without a schema: of a conversion that is not ours
        return ""
    names = schema.get("$defs", {})
    here: Mapping[str, Any] = schema
    for part in path:
        here = next((f for f in _fields(here, names) if _has(f, part)), {})
        here = (
            here.get("items", {})
            if isinstance(part, int)
            else here.get("properties", {}).get(part, {})
        )
    return _words(here, names)


def _has(schema: Mapping[str, Any], part: int | str) -> bool:
    return "items" in schema if isinstance(part, int) else part in schema.get("properties", {})


def _fields(schema: Mapping[str, Any], names: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema itself, or each of the types it is a choice of."""
    if "$ref" in schema:
        yield from _fields(names.get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), names)
    elif "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from _fields(part, names)
    else:
        yield schema


def _words(schema: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _words(names.get(str(schema["$ref"]).rsplit("/", 1)[-1], {}), names)
    if "anyOf" in schema:
        parts = [_words(part, names) for part in schema["anyOf"]]
        return _either(list(dict.fromkeys(p for p in parts if p)))
    if "const" in schema or "enum" in schema:
        return _either([str(v) for v in schema.get("enum", [schema.get("const")])])
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


def _either(parts: list[str]) -> str:
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} or {parts[-1]}"


def _shown(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
