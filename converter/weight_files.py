"""The files of a model folder: readable, complete, and identified by their hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from reattend.errors import ModelError


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object of the model folder.

    Raises:
        ModelError: it cannot be read, is not JSON, or not an object.
    """
    try:
        config = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as problem:
        raise ModelError(
            f"{file.name} is not JSON",
            where=str(file),
            why=str(problem),
            next_step="copy or download it again",
        ) from problem
    if not isinstance(config, dict):
        raise ModelError(
            f"{file.name} is not a JSON object",
            where=str(file),
            why=f"it holds a {type(config).__name__}",
            next_step="copy or download it again",
        )
    return config


def check_files(folder: Path) -> None:
    """Weights must be safetensors, complete and readable."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
        why = f"it only has {pickled[0].name}, which could run code when opened" if pickled else ""
        raise ModelError(
            "the model folder has no safetensors weights",
            where=str(folder),
            why=why,
            next_step="save the model with save_pretrained (safetensors is its default)",
        )
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
        except (SafetensorError, OSError, ValueError) as problem:
            raise ModelError(
                "a weight file is damaged or cut short",
                where=str(file),
                why=str(problem),
                next_step="copy or download it again",
            ) from problem
        if not names:
            raise ModelError("a weight file holds no tensor", where=str(file))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        placed = read_config(index).get("weight_map") or {}
        if not isinstance(placed, dict) or not all(isinstance(n, str) for n in placed.values()):
            raise ModelError(
                "the index of the weight files is damaged",
                where=str(index),
                why="`weight_map` does not map tensors to files",
                next_step="copy or download it again",
            )
        missing = sorted(set(placed.values()) - {f.name for f in files})
        if missing:
            raise ModelError(
                "a weight file is missing", where=str(folder / missing[0]),
                next_step="copy or download the whole model",
            )  # fmt: skip


def hash_files(folder: Path) -> dict[str, str]:
    """sha256 of every weight file of a model folder."""
    return {file.name: hash_file(file) for file in sorted(folder.glob("*.safetensors"))}


def hash_file(file: Path) -> str:
    """`sha256:` and the hexadecimal digest of a file."""
    with file.open("rb") as opened:
        return "sha256:" + hashlib.file_digest(opened, "sha256").hexdigest()
