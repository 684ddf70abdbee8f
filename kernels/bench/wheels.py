"""Packages that a machine for measuring may lack, and what cannot be measured without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from cases import Case


@dataclass(frozen=True)
class Need:
    """What some cases need.

    Attributes:
        modules: by the names they are imported by.
        packages: the wheels that have them.
        cases: which cases need it.
        goals: of these cases, those that are lost; all when empty.
    """

    modules: tuple[str, ...]
    packages: str
    cases: Callable[[Case], bool]
    goals: tuple[str, ...] = ()


NEEDS = (
    Need(
        ("pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"),
        "pydantic, pydantic-core, annotated-types, typing-extensions, typing-inspection",
        lambda case: bool(case.pattern) and not case.pattern.endswith("blocks"),
    ),
    Need(
        ("fla", "einops"),
        "fla-core, einops",
        lambda case: case.op == "linear_attention" and case.n > 1 and case.dtype != "float32",
        ("fla forward", "fla backward"),
    ),
)


def lacking(cases: Iterable[Case]) -> str:
    """One line on what is missing and loses something of these cases; empty: nothing is."""
    told, every = [], list(cases)
    for need in NEEDS:
        gone = [module for module in need.modules if not _there(module)]
        hit = [case for case in every if need.cases(case)]
        if not gone or not hit:
            continue
        lost = [g for case in hit for g in case.goals if not need.goals or g in need.goals]
        what = "peers of" if need.goals else "times of"
        told.append(
            f"no {', '.join(gone)} (wheels: {need.packages}): without {what} {len(hit)} problems,"
            f" {len(lost)} goals ({', '.join(sorted(set(lost)))})"
        )
    return "; ".join(told)


def _there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # half of it is there
        return False
