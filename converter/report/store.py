"""Reading a versioned JSON file of this package, with errors a user can act on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from reattend.arguments import as_folder
from reattend.errors import ArgumentError
from reattend.report.part import Part

P = TypeVar("P", bound=Part)


def load_mapping(
    source: str | Path | Mapping[str, Any], file_name: str, newest: int
) -> tuple[Mapping[str, Any], str]:
    """Read a file and check that this version of reattend knows its schema.

    Args:
        source: the file, the folder that holds `file_name`, or the contents.
        file_name: `report.json` or `run.json`.
        newest: the newest schema this version reads.

    Returns:
        The contents and where they came from, for messages.

    Raises:
        ArgumentError: no such file, not JSON, not an object, no schema, or a newer schema.
    """
    if isinstance(source, Mapping):
        data: Any = source
        where = "the given mapping"
    else:
        path = as_folder(source, "source")
        path = path / file_name if path.is_dir() else path
        where = str(path)
        data = _read(path, file_name)
    if not isinstance(data, Mapping):
        raise ArgumentError(
            f"this is not a {file_name}",
            where=where,
            why="not a JSON object",
            next_step="give the folder that `reattend convert --out` wrote",
        )
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise ArgumentError(
            f"this is not a {file_name}",
            where=where,
            why=f"its schema number is {schema!r}",
            next_step="give the folder that `reattend convert --out` wrote",
        )
    if schema > newest:
        raise ArgumentError(
            f"this {file_name} was written by a newer reattend",
            where=where,
            why=f"it has schema {schema}, this version reads up to {newest}",
            next_step=f"install reattend {data.get('reattend_version', '')} or newer",
        )
    return data, where


def validated(cls: type[P], data: Mapping[str, Any], where: str) -> P:
    """`data` as `cls`.

    Raises:
        ArgumentError: the contents do not follow the schema; names the first three places.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        first = [
            f"{'.'.join(str(step) for step in item['loc']) or 'top level'}: {item['msg']}"
            for item in error.errors()[:3]
        ]
        raise ArgumentError(
            f"this file does not follow the schema of a {cls.__name__.lower()}",
            where=where,
            why="; ".join(first),
            next_step=f"read it with the reattend that wrote it "
            f"({data.get('reattend_version', 'version unknown')}), or run the conversion again",
        ) from error


def _read(path: Path, file_name: str) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ArgumentError(
            f"there is no {file_name} to read",
            where=str(path),
            why=error.strerror or str(error),
            next_step="give the folder that `reattend convert --out` wrote",
        ) from error
    except ValueError as error:
        raise ArgumentError(
            f"this {file_name} is damaged",
            where=str(path),
            why=f"not JSON: {error}",
            next_step="run the conversion again",
        ) from error
