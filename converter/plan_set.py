"""`--set key=value`: change single values of a plan that is already read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from reattend.errors import PlanError
from reattend.plan_text import parse_yaml, unknown_name


def apply_settings(
    data: dict[str, Any],
    settings: Iterable[str],
    keys: Collection[str],
    options: Sequence[Collection[str]],
) -> None:
    """Apply settings to the plain data of a plan, in place.

    Args:
        data: `Plan.to_dict()`.
        settings: texts `key=value`; the value is YAML, `null` removes the key.
        keys: the keys a plan has.
        options: for each rule the option names of its conversion.

    Raises:
        PlanError: no `=`, or no such key.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        key, where = key.strip(), f"--set {setting}"
        if not equals or not key:
            raise PlanError(
                "a setting needs key=value",
                where=where,
                next_step="write for example --set kv_keep=0.25",
            )
        value = parse_yaml(text, where)
        for path in _places(key, keys, options, where):
            _put(data, path, value, keys, where)


def _places(
    key: str, keys: Collection[str], options: Sequence[Collection[str]], where: str
) -> list[list[str]]:
    """Paths of a key: of the plan itself, or of an option in every rule that has it."""
    first, *inside = key.split(".")
    if first in keys and (inside or first != "rules"):
        return [[first, *inside]]
    if first == "rules":
        raise PlanError(
            "a setting changes one key of a rule, not all rules",
            where=where,
            next_step="write for example --set kv_keep=0.25, or give the rules in a plan file",
        )
    places = [["rules", str(i), first, *inside] for i, o in enumerate(options) if first in o]
    if not places:
        known = set(keys).union(*options) - {"rules", "extends", "version"}
        raise unknown_name("key", first if inside else key, known, where)
    return places


def _put(
    data: dict[str, Any], path: Sequence[str], value: Any, keys: Collection[str], where: str
) -> None:
    """Set `data` at a dotted path; None removes the key."""
    here: Any = data
    for depth, part in enumerate(path[:-1]):
        if isinstance(here, list):
            here = _item(here, part, where)
        elif (depth == 0 and part in ("calibrate", "verify")) or (depth > 1 and part not in here):
            here = here.setdefault(part, {})
        else:
            here = here.get(part) if isinstance(here, dict) else None
        if not isinstance(here, dict | list):
            known = keys if depth == 0 else []
            raise unknown_name("key", ".".join(path[: depth + 1]), known, where)
    if isinstance(here, list):
        raise PlanError(
            "a setting changes one key of a rule, not a whole rule",
            where=where,
            next_step="write for example --set rules.0.kv_keep=0.25",
        )
    if value is None:
        here.pop(path[-1], None)
    else:
        here[path[-1]] = value


def _item(rules: list[Any], part: str, where: str) -> Any:
    if not part.isdecimal() or int(part) >= len(rules):
        raise PlanError(
            "no such rule",
            where=where,
            why=f"the plan has {len(rules)} rules, counted from 0",
            next_step="`reattend plans show` prints the rules of a plan",
        )
    return rules[int(part)]
