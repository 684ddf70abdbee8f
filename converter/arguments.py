"""What people pass to the public calls, checked before anything is opened."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from reattend.errors import ArgumentError

#: torch's generators take 64 bits; shuffling multiplies by a million
LARGEST_SEED = 2**40


def as_folder(value: Any, name: str) -> Path:
    """A path.

    Raises:
        ArgumentError: it is no path.
    """
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise ArgumentError(
            f"{name} must be the path of a folder",
            where=f"{name}={value!r}"[:200],
            next_step="give a string or a pathlib.Path",
        )
    return Path(value)


def as_seed(value: Any) -> int:
    """A seed.

    Raises:
        ArgumentError: not a whole number from 0 to 2^40.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= LARGEST_SEED:
        raise ArgumentError(
            "seed must be a whole number from 0", where=f"seed={value!r}"[:200],
            why="the largest one is 2^40", next_step="leave it out for 0",
        )  # fmt: skip
    return value


def as_inputs_or_file(value: Any) -> dict[str, Any] | Path | None:
    """`as_inputs`, or the safetensors file that they are in.

    Raises:
        ArgumentError: neither.
    """
    return Path(value) if isinstance(value, str | Path) and str(value) else as_inputs(value)


def as_inputs(value: Any) -> dict[str, Any] | None:
    """Example inputs by the name of the argument; None: none were given.

    Raises:
        ArgumentError: not a mapping of names.
    """
    if value is None:
        return None
    if not hasattr(value, "keys") or not all(isinstance(key, str) for key in value):
        raise ArgumentError(
            "inputs must be a dict of keyword arguments",
            where=f"inputs is a {type(value).__name__}",
            next_step="pass inputs={'input_ids': tensor, ...}: model(**inputs) must run",
        )
    return dict(value)


def as_callback(value: Any, name: str) -> Any:
    """A function, or None.

    Raises:
        ArgumentError: it cannot be called.
    """
    if value is not None and not callable(value):
        raise ArgumentError(
            f"{name} must be a function", where=f"{name} is a {type(value).__name__}",
            next_step="pass a function of one argument, or leave it out",
        )  # fmt: skip
    return value


def as_flag(value: Any, name: str) -> bool:
    """True or False and nothing like it: the text "no" is true to Python.

    Raises:
        ArgumentError: something else.
    """
    if not isinstance(value, bool):
        raise ArgumentError(
            f"{name} must be True or False", where=f"{name}={value!r}"[:200],
            next_step="leave it out for False",
        )  # fmt: skip
    return value


def as_tokenizer(value: Any) -> Any:
    """A tokenizer that can be saved, or None.

    Raises:
        ArgumentError: it cannot.
    """
    if value is not None and not hasattr(value, "save_pretrained"):
        raise ArgumentError(
            f"not a tokenizer: {type(value).__name__}", where=f"tokenizer={value!r}"[:200],
            next_step="pass one of transformers: AutoTokenizer.from_pretrained(folder)",
        )  # fmt: skip
    return value
