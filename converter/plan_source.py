"""Where a plan comes from: preset or file, the plan it `extends`, and the version of its format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reattend.errors import PlanError
from reattend.plan_text import as_mapping, parse_yaml, read_mapping, unknown_name
from reattend.plans import preset_names, preset_text

PLAN_VERSION = 1


def fetch(source: str | Path, base: Path, asker: str = "plan") -> tuple[dict[str, Any], str, Path]:
    """Read a preset or a file.

    Args:
        source: the name of a preset, or a path.
        base: the folder that a relative path starts from.
        asker: who names it, for errors: the plan that extends it.

    Returns:
        The mapping, the name that errors use for it, and the folder its `extends` starts from.

    Raises:
        PlanError: neither a preset nor a file, or a file that is no plan.
    """
    name = str(source)
    if isinstance(source, str) and name in preset_names():
        where = f"preset {name!r}"
        return as_mapping(parse_yaml(preset_text(name), where), where), where, Path()
    path = base / Path(name).expanduser()
    if path.is_file():
        return read_mapping(path, name), name, path.parent
    written = path.suffix in (".yaml", ".yml") or len(Path(name).parts) > 1
    if isinstance(source, Path) or written or (name and path.exists()):
        why = "it is no ordinary file" if path.exists() else "there is no such file"
        why = "it is a folder" if path.is_dir() else why
        raise PlanError(
            "the plan file cannot be read",
            where=name,
            why=why,
            next_step=f"check the path, or use a shipped plan: {', '.join(preset_names())}",
        )
    raise unknown_name("plan", name, preset_names(), asker)


def extended(data: dict[str, Any], where: str, base: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """Merge `data` over the plan that it extends, if it does.

    Args:
        data: the mapping as read.
        where: its name in errors.
        base: the folder that a relative `extends` starts from.
        seen: plans on the way here, to notice a circle.

    Raises:
        PlanError: the other plan cannot be read, or the plans extend each other.
    """
    source = data.get("extends")
    if source is None:
        return data
    if not isinstance(source, str):
        raise PlanError(
            "`extends` must be a preset or a path",
            where=where,
            why=f"got {source!r}",
            next_step=f"name one plan: {', '.join(preset_names())}, or the path of a file",
        )
    check_version(data, where)
    parent, parent_where, parent_base = fetch(source, base, f"{where}: extends")
    mark = parent_where if source in preset_names() else str((base / source).resolve())
    if mark in seen:
        raise PlanError(
            "plans extend each other in a circle",
            where=where,
            why=f"{source!r} again",
            next_step="remove one `extends`",
        )
    parent = extended(parent, parent_where, parent_base, (*seen, mark))
    check_version(parent, parent_where)
    merged = {**parent, **{k: v for k, v in data.items() if k != "extends"}}
    merged["rules"] = [*(data.get("rules") or ()), *(parent.get("rules") or ())]
    for name in ("calibrate", "verify"):
        both = [parent.get(name) or {}, data.get(name) or {}]
        if all(isinstance(part, Mapping) for part in both):
            merged[name] = {**both[0], **both[1]}
    return merged


def check_version(data: Mapping[str, Any], where: str) -> None:
    """Raise `PlanError` unless the plan's version is one that is read here."""
    version = data.get("version", PLAN_VERSION)
    if isinstance(version, int) and version is not True and version > PLAN_VERSION:
        raise PlanError(
            f"this plan has version {version}, newer than this reattend reads",
            where=where,
            why=f"the newest version known here is {PLAN_VERSION}",
            next_step="update reattend, or rewrite the plan for this version",
        )
    if not isinstance(version, int) or version is True or version != PLAN_VERSION:
        raise PlanError(
            "the plan's version is not a known number",
            where=where,
            why=f"got {version!r}; the only version is {PLAN_VERSION}",
            next_step=f"write version: {PLAN_VERSION}",
        )
