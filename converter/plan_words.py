"""What is wrong with a plan, in words: a sentence for each key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from reattend.plan_schema import allowed, either, keys, shown, value_at


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
        while path and isinstance(path[-1], int):  # what a list holds is said of the list
            path = path[:-1]
        key = ".".join(map(str, path))
        if key and key in told:
            continue
        told.add(key)
        if item["type"] == "missing":
            whole = (*_inside(item["loc"][:-1], data), item["loc"][-1])
            yield f"{'.'.join(map(str, whole))} is missing"
        elif item["type"] == "extra_forbidden" and len(path) > 1:
            *place, word = path
            known = _instead(word, keys(kind, place, data))
            yield f"{'.'.join(map(str, place))} has no key {word!r}{known}"
        elif item["type"] in ("union_tag_invalid", "union_tag_not_found"):
            yield _kinds(key, item)
        elif item["type"] in ("value_error", "assertion_error") or not path:
            said = str(item.get("ctx", {}).get("error") or item["msg"])
            yield f"{key}: {said} (got {shown(item['input'])})" if key else said
        else:
            words = allowed(kind, path, data)
            said = f" must be {words}" if words else f": {item['msg']}"
            yield f"{key}{said}, got {shown(value_at(data, path))}"


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.5) -> list[str]:
    """The entries of `known` that begin with `word`, then those closest by difflib ratio."""
    known = list(known)
    begin = [name for name in known if len(word) > 2 and name.startswith(word)]
    close = difflib.get_close_matches(word, known, n=count, cutoff=cutoff)
    return list(dict.fromkeys([*begin, *close]))[:count]


def _instead(word: Any, known: Sequence[str]) -> str:
    """What is known in place of a word that is not."""
    close = [f"did you mean {name!r}? " for name in nearest(str(word), known)]
    return f" ({''.join(close)}known here: {', '.join(known)})" if known else ""


def _kinds(key: str, item: Any) -> str:
    """A mapping whose `kind` says what it is, without one or with one that does not exist."""
    name = item["ctx"]["discriminator"].strip("'")
    if item["type"] == "union_tag_not_found":
        return f"{key}.{name} is missing (got {shown(item['input'])})"
    known = [word.strip().strip("'") for word in item["ctx"]["expected_tags"].split(",")]
    said, close = item["ctx"]["tag"], nearest(str(item["ctx"]["tag"]), known)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{key}.{name} must be {either(known)}, got {said!r}{hint}"


def _inside(place: Sequence[int | str], data: Any) -> tuple[int | str, ...]:
    """The part of pydantic's place of an error that is in the data; the rest names types."""
    path: list[int | str] = []
    for part in place:
        if isinstance(data, Mapping) and part not in data and part in _texts(data):
            continue  # the kind of this mapping, by which its type was chosen
        known = isinstance(data, Mapping) and part in data
        if not known and not (isinstance(data, list | tuple) and isinstance(part, int)):
            break
        data = data[part]
        path.append(part)
    return tuple(path)


def _texts(data: Mapping[str, Any]) -> list[str]:
    return [value for value in data.values() if isinstance(value, str)]
