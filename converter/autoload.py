"""Make `AutoModel*.from_pretrained` know reattend checkpoints, without importing transformers.

If transformers' auto classes are already imported, the model type is registered at once;
otherwise an import hook registers it right after they are, and removes itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_WATCHED = "transformers.models.auto.modeling_auto"


class _RegisterAfter(Loader):
    """Runs the real loader, then registers."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the real loader does."""
        made: ModuleType | None = self.real.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Execute, then register."""
        self.real.exec_module(module)
        _register()


class _Watch(MetaPathFinder):
    """Answers for one module name only, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The real spec with a registering loader."""
        if name != _WATCHED:
            return None
        sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _RegisterAfter(spec.loader)
                return spec
        return None


def _register() -> None:
    """Import our side, which registers itself; it may be what is importing transformers now."""
    import_module("reattend.targets.huggingface")


def arm() -> None:
    """Register now, or as soon as transformers' auto classes are imported."""
    if _WATCHED in sys.modules:
        _register()
    elif not any(isinstance(f, _Watch) for f in sys.meta_path):
        sys.meta_path.insert(0, _Watch())
