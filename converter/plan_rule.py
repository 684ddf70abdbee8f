"""One rule of a plan: which sites it takes, and what becomes of them.

`layers` counts inside a *stack*: the sites whose paths agree up to their first number
(`model.layers.3.self_attn` is layer 3 of the stack `model.layers`, and
`decoder.block.2.layer.1.EncDecAttention` is layer 2 of `decoder.block`). A path without any
number belongs to the stack of all such paths, where its layer is its position among them.
Negative layers and slices count from the end of each stack: the length of a stack is its
highest layer plus one.
"""

from __future__ import annotations

import fnmatch
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, Field, SerializeAsAny, field_validator

from reattend.errors import PlanError
from reattend.plan_keys import writable
from reattend.plan_text import Section, build, unknown_name
from reattend.plan_words import nearest
from reattend.plans import preset_of

KEEP = "keep"
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(?::(-?\d+)?)?")


def _registry() -> Any:
    # Imported by name at call time: conversions need torch, reading this module must not.
    return importlib.import_module("reattend.passes.rewrite.registry")


def options_class(to: str, where: str) -> type[BaseModel]:
    """The options model of the conversion called `to`.

    Raises:
        PlanError: no conversion has this name; the nearest one is named.
    """
    registry = _registry()
    names = list(registry.conversion_names())
    if to not in names:
        raise unknown_name("conversion", to, [*names, KEEP], where)
    options: type[BaseModel] = registry.conversion(to).Options
    return options


class Rule(Section):
    """`sites` and/or `layers` choose, `to` names the conversion, every other key is its option.

    Attributes:
        sites: globs over site paths (`*` also crosses dots), or `re:` and a regular expression
            that matches the whole path. Any of them is enough. None: every path.
        layers: layer numbers, negatives, or slices as text ("2:10", "::2"). None: every layer.
            A site must satisfy both `sites` and `layers`.
        heads: KV groups (0 to G-1) the rule takes; the others go on to later rules, and those no
            rule takes stay as they are. None: all that are left.
        to: kebab-case conversion name, or `keep`.
        options: the validated options of that conversion (its own `Options` class); None for
            `keep`. Written as plain keys of the rule, never as a key of this name.
    """

    sites: tuple[str, ...] | None = None
    layers: tuple[int | str, ...] | None = None
    heads: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    to: str
    options: SerializeAsAny[BaseModel] | None = None

    @classmethod
    def prepare(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Split the mapping into the rule's own keys and the options of its conversion."""
        own: dict[str, Any] = {
            k: data.pop(k) for k in ("sites", "layers", "heads", "to") if k in data
        }
        if "to" not in own:
            close = [k for k in data if nearest(str(k), ["to"])]
            raise PlanError(
                "a rule must say what its sites become",
                where=where,
                why=f"`to` is missing{f' ({close[0]!r} is no key)' if close else ''}",
                next_step="add for example `to: mla`, or `to: keep`",
            )
        if own.get("sites") is None and own.get("layers") is None:
            raise PlanError(
                "a rule must choose its sites",
                where=where,
                why="neither `sites` nor `layers` is given"
                + (f"; unknown keys: {', '.join(map(str, data))}" if data else ""),
                next_step='add `sites: "*"` for all of them',
            )
        if own["to"] == KEEP:
            for key in data:
                raise unknown_name("key", key, cls.known_keys(own), where)
            return own
        kind = options_class(str(own["to"]), where)
        ready = data.pop("options", None)
        if isinstance(ready, BaseModel):
            ready = ready.model_dump(exclude_unset=True)
        elif ready is not None:
            raise unknown_name("key", "options", cls.known_keys(own), where)
        for key in data:
            if key not in writable(kind):
                raise unknown_name("key", key, cls.known_keys(own), where)
        own["options"] = build(kind, {**(ready or {}), **data}, where, preset_of(str(own["to"])))
        return own

    @classmethod
    def known_keys(cls, data: Mapping[str, Any]) -> set[str]:
        """The rule's own keys and those of its conversion."""
        own = {"sites", "layers", "heads", "to"}
        to = data.get("to")
        if to is None or to == KEEP:
            return own
        return own | set(writable(options_class(str(to), "rule")))

    @field_validator("sites", mode="before")
    @classmethod
    def _sites(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str) else value
        if isinstance(value, Sequence):
            if not value:
                raise ValueError('an empty list chooses nothing; "*" chooses all')
            for glob in value:
                if isinstance(glob, str) and glob.startswith("re:"):
                    try:
                        re.compile(glob[3:])
                    except re.error as error:
                        raise ValueError(f"{glob!r} is not a regular expression: {error}") from None
        return value

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        value = [value] if isinstance(value, int | str) else value
        if isinstance(value, Sequence):
            if not value:
                raise ValueError('an empty list chooses nothing; "::" chooses all')
            for item in value:
                number = isinstance(item, int) and not isinstance(item, bool)
                if not number and not (isinstance(item, str) and _slice(item)):
                    raise ValueError(f"{item!r} is neither a layer number nor a slice like '2:10'")
        return value

    @field_validator("heads", mode="before")
    @classmethod
    def _heads(cls, value: Any) -> Any:
        value = [value] if isinstance(value, int) and not isinstance(value, bool) else value
        if isinstance(value, Sequence) and (not value or len(set(map(repr, value))) < len(value)):
            raise ValueError("give each KV group once, and at least one")
        return value

    def match(self, path: str, layer_index: int | None, n_layers: int) -> bool:
        """Whether this rule takes a site.

        Args:
            path: the site's module path.
            layer_index: its layer inside its stack; None never satisfies `layers`.
            n_layers: the length of that stack, for negatives and slices.
        """
        if self.sites is not None and not any(_fits(glob, path) for glob in self.sites):
            return False
        if self.layers is None:
            return True
        return layer_index is not None and layer_index in self.layer_set(n_layers)

    def layer_set(self, n_layers: int) -> set[int]:
        """The layers that `layers` names in a stack of `n_layers` layers; all without `layers`."""
        chosen: set[int] = set()
        for item in ["::"] if self.layers is None else self.layers:
            if isinstance(item, int):
                chosen |= {item % n_layers} if -n_layers <= item < n_layers else set()
            else:
                chosen |= set(range(n_layers)[_slice(item) or slice(0)])
        return chosen

    def describe(self) -> str:
        """The choosing part as the user wrote it, for messages."""
        parts = []
        if self.sites is not None:
            parts.append("sites: " + ", ".join(self.sites))
        if self.layers is not None:
            parts.append("layers: " + ", ".join(map(str, self.layers)))
        if self.heads is not None:
            parts.append("heads: " + ", ".join(map(str, self.heads)))
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The rule as plan keys, with only the options that were given."""
        out: dict[str, Any] = {}
        if self.sites is not None:
            out["sites"] = self.sites[0] if len(self.sites) == 1 else list(self.sites)
        for name in ("layers", "heads"):
            if (value := getattr(self, name)) is not None:
                out[name] = list(value)
        out["to"] = self.to
        if self.options is not None:
            out |= self.options.model_dump(mode="json", exclude_unset=True)
        return out


def layer_of(paths: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each site path its layer and the length of its stack (see the module's docstring)."""
    stacks: dict[str, dict[str, int]] = {}
    for path in paths:
        found = _NUMBER.search(path)
        if found:
            stacks.setdefault(path[: found.start()] + ".", {})[path] = int(found[1])
        else:
            plain = stacks.setdefault("", {})
            plain.setdefault(path, len(plain))
    return {
        path: (layer, max(stack.values()) + 1)
        for stack in stacks.values()
        for path, layer in stack.items()
    }


def _fits(glob: str, path: str) -> bool:
    if glob.startswith("re:"):
        return re.fullmatch(glob[3:], path) is not None
    return fnmatch.fnmatchcase(path, glob)


def _slice(text: str) -> slice | None:
    found = _SLICE.fullmatch(text.strip())
    if not found or found[3] == "0":
        return None
    return slice(*(int(part) if part else None for part in found.groups()))
