"""Compiling what a peer chooses among, in several processes, before anything is timed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def share_of_configs(part: int, parts: int) -> Iterator[None]:
    """Triton's autotuner tries every `parts`-th configuration only, from the `part`-th on.

    The choice is not kept: the process that times chooses among all on a quiet device, and finds
    their programs on disk. fla asks its variable when it is imported.
    """
    os.environ["FLA_CACHE_RESULTS"] = "0"
    from triton.runtime.autotuner import Autotuner

    whole = Autotuner.prune_configs

    def some(self: Any, kwargs: dict[str, Any]) -> list[Any]:
        configs: list[Any] = whole(self, kwargs)
        return configs[part::parts] or configs[:1]

    Autotuner.prune_configs = some
    try:
        yield
    finally:
        Autotuner.prune_configs = whole
