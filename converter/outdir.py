"""What is on disk where the output should go: free, this very result, another one, not ours."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from reattend.durable import os_errors_explained
from reattend.errors import OutputError
from reattend.weight_files import hash_file

FINGERPRINT = "fingerprint.json"
#: of that file; the first ones were written without a number
VERSION = 1
State = Literal["new", "resumed", "complete"]


def state_of_out(out: Path, fingerprint: Mapping[str, str], overwrite: bool) -> State:
    """`complete` if `out` holds the result with this fingerprint, `new` if it may be written.

    Raises:
        OutputError: it holds another result and `overwrite` is off, or it is not ours at all.
    """
    if out.name.endswith(".partial"):
        raise OutputError(
            "an output folder cannot be called *.partial",
            where=str(out),
            why="that name is where the work for another output would happen",
            next_step="choose another --out",
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return "new"
    known = inputs_of(out) if out.is_dir() else None
    if known is None:
        raise foreign(out)
    differ = sorted(k for k in {*known, *fingerprint} if known.get(k) != fingerprint.get(k))
    broken = [] if differ else damaged(out)
    if not differ and not broken:
        return "complete"
    if overwrite:
        return "new"
    why = f"made with another {', '.join(differ)}" if differ else f"damaged: {', '.join(broken)}"
    raise OutputError(
        "the output folder holds another result",
        where=str(out),
        why=why,
        next_step="pass --overwrite to replace it, or choose another --out",
    )


def check_claimable(out: Path) -> None:
    """Before any work: whether an output could go here at all. Creates nothing.

    Raises:
        OutputError: it is taken by something that is not ours, or cannot be written.
    """
    with os_errors_explained(out):  # a name that the system refuses to look up
        _check_claimable(out)


def _check_claimable(out: Path) -> None:
    for folder in (out, partial_of(out)):
        if folder.is_file() or (folder.is_symlink() and not folder.exists()):
            raise foreign(folder)
        inside = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".tmp")]
        if inside and inputs_of(folder) is None:
            raise foreign(folder)
    above = next(p for p in out.parents if p.exists())
    if not above.is_dir():
        raise OutputError(
            "the output folder cannot be made",
            where=str(out),
            why=f"{above.name} is a file",
            next_step="choose another --out",
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(
            "the output folder is not writable",
            where=str(out),
            why=f"no permission to write in {above}",
            next_step="choose another --out, or change its permissions",
        )


def damaged(out: Path) -> list[str]:
    """Files of a complete result that are missing or other than when it was made: every byte."""
    sums = (read_json(out / FINGERPRINT) or {}).get("files") or {}
    return [
        name
        for name, known in sums.items()
        if not (out / name).is_file() or (known is not None and hash_file(out / name) != known)
    ]


def recover(out: Path) -> None:
    """Undo or complete a replacement that a kill interrupted."""
    aside = aside_of(out)
    if not aside.exists():
        return
    if inputs_of(aside) is None:
        raise foreign(aside)
    if out.exists():
        shutil.rmtree(aside)
    else:
        aside.rename(out)


def foreign(path: Path) -> OutputError:
    """The error for a folder or file that reattend did not make and will not touch."""
    return OutputError(
        "the output folder is taken",
        where=str(path),
        why="it exists and was not made by reattend, so it is never replaced",
        next_step="choose another --out, or move it away yourself",
    )


def partial_of(out: Path) -> Path:
    """The folder where the work for `out` happens."""
    return out.with_name(f"{out.name}.partial")


def aside_of(out: Path) -> Path:
    """Where an older result waits while the new one takes its name."""
    return out.with_name(f".{out.name}.replaced-by-reattend")


def inputs_of(folder: Path) -> dict[str, str] | None:
    """The fingerprint in a folder that reattend made; None for any other folder.

    Raises:
        OutputError: a newer reattend made it.
    """
    known = read_json(folder / FINGERPRINT)
    if not known or known.get("made_by") != "reattend":
        return None
    version = known.get("version", VERSION)
    if version != VERSION:
        raise OutputError(
            f"{FINGERPRINT} has version {version!r}, which is not known here",
            where=str(folder),
            why=f"this reattend reads version {VERSION}",
            next_step="pip install -U reattend, or choose another --out",
        )
    inputs = known.get("inputs")
    return inputs if isinstance(inputs, dict) else None


def fingerprint_of(
    inputs: Mapping[str, str], files: Mapping[str, str | None] | None = None
) -> dict[str, Any]:
    """The content of `fingerprint.json`: what a run was made from and, when done, its files."""
    done = {} if files is None else {"files": dict(files)}
    return {"made_by": "reattend", "version": VERSION, "inputs": dict(inputs), **done}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no such file or it holds anything else."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        return value if isinstance(value, dict) else None
    return None
