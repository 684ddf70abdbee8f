"""An entry of a plan's `targets` that carries options: `- onnx: {flavour: ort}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from reattend.errors import PlanError
from reattend.plan_text import Section, as_mapping, unknown_name


class Target(Section):
    """What to lower to, and how.

    Attributes:
        name: as `export` takes it.
        flavour: of an ONNX file: `portable`, `ort` or `custom`; None leaves it to `export`.
    """

    name: str
    flavour: str | None = None

    @classmethod
    def read(cls, entry: Any, where: str) -> str | Target:
        """A target of a plan: its name, or a mapping from its name to its options.

        Raises:
            PlanError: anything else, or an option that does not exist.
        """
        if isinstance(entry, str | Target):
            return entry
        if not isinstance(entry, Mapping) or len(entry) != 1:
            raise PlanError(
                "a target is a name, or one name with its options",
                where=where,
                why=f"found {str(entry)[:60]!r}",
                next_step="write `targets: [onnx]` or `targets: [{onnx: {flavour: ort}}]`",
            )
        ((name, options),) = entry.items()
        given = as_mapping({} if options is None else options, f"{where}: {name}")
        known = set(cls.model_fields) - {"name"}
        if unknown := [key for key in given if key not in known]:
            raise unknown_name("key", unknown[0], known, f"{where}: {name}")
        return cls.model_validate({"name": str(name), **given}, context={"where": where})

    def to_dict(self) -> str | dict[str, Any]:
        """The entry as a plan writes it."""
        options = self.model_dump(mode="json", exclude={"name"}, exclude_none=True)
        return {self.name: options} if options else self.name


def target_name(target: str | Target) -> str:
    """The name of a target with or without options."""
    return target if isinstance(target, str) else target.name
