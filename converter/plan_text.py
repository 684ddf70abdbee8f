"""From text to checked sections: the YAML reader and the base class of every part of a plan.

YAML is read by the 1.2 rules (`1e-4` is a number, `off` is a word, `200_000` is an integer),
and a key that does not exist is an error that names the nearest one that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from reattend.errors import PlanError
from reattend.plan_schema import mistyped
from reattend.plan_words import complaints, nearest


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML 1.2 with plain types only.

    Raises:
        PlanError: the text is not YAML, holds a key twice, or asks for a Python object.
    """
    try:
        return YAML(typ="safe", pure=True).load(text)
    except RecursionError as error:
        raise PlanError(
            "the plan is not YAML",
            where=where,
            why="it is nested deeper than any plan",
            next_step="pass a YAML file; `reattend plans show transmla > plan.yaml` writes one",
        ) from error
    except YAMLError as error:
        hint = "check the indentation and the quotes at the line named above"
        if "alias" in str(error):
            hint = 'put a glob in quotes: sites: "*" (a bare * starts a YAML alias)'
        why = " ".join(str(error).split("To suppress")[0].split())
        raise PlanError("the plan is not YAML", where=where, why=why, next_step=hint) from error


def read_mapping(path: Path, where: str) -> dict[str, Any]:
    """Read one plan file.

    Raises:
        PlanError: the file cannot be read, is not UTF-8, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PlanError(
            "the plan file is not UTF-8 text",
            where=where,
            why=str(error),
            next_step="pass a YAML file; `reattend plans show transmla > plan.yaml` writes one",
        ) from error
    except OSError as error:
        raise PlanError(
            "the plan file cannot be read",
            where=where,
            why=error.strerror or str(error),
            next_step="check the path and its permissions",
        ) from error
    return as_mapping(parse_yaml(text, where), where)


def as_mapping(value: Any, where: str) -> dict[str, Any]:
    """Return `value` as a dict, or raise `PlanError` if it is anything but a mapping."""
    if isinstance(value, Mapping):
        return dict(value)
    seen = "nothing" if value is None else f"{type(value).__name__}: {str(value)[:60]!r}"
    raise PlanError(
        "a mapping (key: value lines) was expected here",
        where=where,
        why=f"found {seen}",
        next_step="see `reattend plans show transmla` for a plan that works",
    )


def unknown_name(kind: str, name: Any, known: Iterable[str], where: str) -> PlanError:
    """The error for a name that is not in a closed set; names the nearest one that is."""
    known = sorted(known)
    close = nearest(str(name), known)
    use = "use one of those" if known else "see `reattend plans show transmla`"
    use = f"leave it out, or {use}" if kind == "key" else use
    return PlanError(
        f"unknown {kind} {str(name)!r}",
        where=where,
        why=f"known here: {', '.join(known) or 'none'}",
        next_step=f"did you mean {close[0]!r}?" if close else use,
    )


def not_allowed(lines: Iterable[str], where: str, preset: str = "transmla") -> PlanError:
    """The error for values that are not allowed, one sentence each, and a plan to look at."""
    return PlanError(
        "a value of the plan is not allowed",
        where=where,
        why="; ".join(lines),
        next_step=f"change it; `reattend plans show {preset}` is a plan that works",
    )


def build(
    kind: type[BaseModel], data: Mapping[str, Any], where: str, preset: str = "transmla"
) -> Any:
    """Build a pydantic model that is not a `Section` (a conversion's options) from plan keys.

    Raises:
        PlanError: a key is unknown (the nearest is named) or a value is not allowed.
    """
    names = {f.alias or n for n, f in kind.model_fields.items()}
    for key in data:
        if key not in names:
            raise unknown_name("key", key, names, where)
    if wrong := list(mistyped(kind, data)):
        raise not_allowed(wrong, where, preset)
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise not_allowed(complaints(error, kind, data), where, preset) from error


class Section(BaseModel):
    """A frozen part of a plan whose mistakes are `PlanError`s, however it is constructed.

    `model_validate(..., context={"where": text})` sets the place that errors name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _explained(
        cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo
    ) -> Self:
        where = str((info.context or {}).get("where") or cls.__name__)
        if not isinstance(data, cls):
            data = cls.prepare(as_mapping(data, where), where)
            for key in data:
                if key not in cls.model_fields:
                    raise unknown_name("key", key, cls.known_keys(data), where)
            if wrong := list(mistyped(cls, data)):
                raise not_allowed(wrong, where)
        try:
            made = handler(data)
        except ValidationError as error:
            raise not_allowed(complaints(error, cls, data), where) from error
        if why := made.contradiction():
            raise not_allowed([why], where)
        return made

    def contradiction(self) -> str:
        """Hook: why fields that are each allowed do not go together; nothing where they do.

        A validator of pydantic's own would run outside `_explained`, and its error escape unread.
        """
        return ""

    @classmethod
    def prepare(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        """Hook: rewrite the user's mapping into this section's fields."""
        return data

    @classmethod
    def known_keys(cls, data: Mapping[str, Any]) -> set[str]:
        """The keys a user may write here; suggestions come from this set."""
        return set(cls.model_fields)
