"""reattend: give a trained transformer a new attention.

The public surface is `convert`, `find_attention`, `load`, `export`, `Plan` and `Report`.
Importing this package is light: torch and transformers are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Plan", "Report", "convert", "export", "find_attention", "load"]

_HOME = {
    "convert": "reattend.api",
    "find_attention": "reattend.api",
    "load": "reattend.api",
    "export": "reattend.api",
    "Plan": "reattend.plan",
    "Report": "reattend.report",
}

if TYPE_CHECKING:
    from reattend.api import convert, export, find_attention, load
    from reattend.plan import Plan
    from reattend.report import Report


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'reattend' has no attribute {name!r}")


def _arm() -> None:
    from reattend.autoload import arm

    arm()


_arm()
