"""Whether this process is one of several, read from what torchrun and accelerate set."""

from __future__ import annotations

import os


def several() -> bool:
    """Whether torchrun or accelerate started more than this process."""
    return count() > 1


def count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return not several() or int(os.environ.get("RANK", "0")) == 0
