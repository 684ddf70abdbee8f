"""The DeepSeek target: a checkpoint that transformers' own DeepseekV3ForCausalLM loads.

`export_deepseek` writes and proves it; `foresee` says before a conversion what would stand in the
way. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reattend.targets.deepseek.export import Checkpoint, export_deepseek
    from reattend.targets.deepseek.forecast import foresee

__all__ = ["Checkpoint", "export_deepseek", "foresee"]

_HOMES = {
    "Checkpoint": "reattend.targets.deepseek.export",
    "export_deepseek": "reattend.targets.deepseek.export",
    "foresee": "reattend.targets.deepseek.forecast",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
