"""What is verified and reported on: one finished conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from reattend.finder import FoundAttention
from reattend.materials import Materials
from reattend.plan import Plan
from reattend.preflight import Choice
from reattend.rewriting import Rewritten
from reattend.source import Source
from reattend.workdir import Workdir


@dataclass(frozen=True)
class Subject:
    """The plan and seed, the original with what was found in it, and what was made of it.

    Attributes:
        plan: with the sizes it asked for, not those that were chosen.
        seed: of sampling, training and measurement.
        source: the original, opened.
        found: its attention.
        choices: what happened to every site.
        done: the converted model.
        materials: the data that was read, and what was held back.
        work: where what takes long is kept for a run that continues; None keeps nothing.
        tell: told of what is being measured.
    """

    plan: Plan
    seed: int
    source: Source
    found: FoundAttention
    choices: list[Choice]
    done: Rewritten
    materials: Materials
    work: Workdir | None = None
    tell: Callable[[str], None] = lambda what: None
