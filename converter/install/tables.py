"""Where a call hands over a rotary table: which argument, which columns; found by value.

Layout letters: N positions, P pairs, C columns.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.install.binding import TableRef, leaves

#: where a table was found, and the constant factor between it and what is wanted
Hit = tuple[TableRef, float]
#: relative difference of a column that is rounding
_CLOSE = 1e-4


def match_tables(
    arguments: dict[str, Any], cos_NP: Tensor, sin_NP: Tensor
) -> tuple[Hit | None, Hit | None]:
    """Where cos and sin of the pairs stand.

    The cosines of slow pairs are one within rounding, so they do not tell which column is whose;
    sines do (they grow like the angle). Columns of cos are those of sin, wherever they fit.
    """
    sin = match_table(arguments, sin_NP)
    return match_table(arguments, cos_NP, sin[0].columns if sin else ()), sin


def match_table(
    arguments: dict[str, Any], table_NP: Tensor, beside: tuple[int, ...] = ()
) -> Hit | None:
    """The leaf and columns that hold a rotary table, and the constant factor between them.

    Args:
        arguments: of a call.
        table_NP: what is looked for.
        beside: columns that are taken, as they are or all moved by one number, where they fit.
    """
    for path, leaf in leaves(arguments):
        if not isinstance(leaf, Tensor) or leaf.dim() < 2 or leaf.shape[-2] != table_NP.shape[0]:
            continue
        for part in ("real", "imag") if leaf.is_complex() else ("all",):
            values = component(leaf, part)
            if not values.is_floating_point():
                continue
            columns_NC = values.reshape(-1, *values.shape[-2:])[0].double()
            found = _moved(columns_NC, table_NP, beside) or _columns(columns_NC, table_NP)
            if found is not None:
                return TableRef(path=path, part=part, columns=found[0]), found[1]
    return None


def component(leaf: Tensor, part: str) -> Tensor:
    """A real tensor: the leaf itself or one part of a complex one."""
    if part == "real":
        return leaf.real
    return leaf.imag if part == "imag" else leaf


def _moved(
    columns_NC: Tensor, table_NP: Tensor, beside: tuple[int, ...]
) -> tuple[tuple[int, ...], float] | None:
    """`beside`, or the same moved left or right, if that is the table."""
    if not beside:
        return None
    for by in sorted(range(-min(beside), columns_NC.shape[1] - max(beside)), key=abs):
        columns = tuple(c + by for c in beside)
        found = _columns(columns_NC[:, list(columns)], table_NP, ordered=True)
        if found is not None:
            return columns, found[1]
    return None


def _columns(
    columns_NC: Tensor, table_NP: Tensor, ordered: bool = False
) -> tuple[tuple[int, ...], float] | None:
    """For each pair the column proportional to it, one factor for all.

    `ordered`: column p is the one of pair p.
    """
    chosen: list[int] = []
    factor = None
    for p in range(table_NP.shape[1]):
        wanted = table_NP[:, p]
        factors = (columns_NC * wanted[:, None]).sum(0) / columns_NC.square().sum(0).clamp_min(
            1e-30
        )
        gaps = (columns_NC * factors - wanted[:, None]).abs().amax(0)
        good = gaps <= _CLOSE * wanted.abs().max().clamp_min(1e-12)
        if factor is not None:
            good &= (factors - factor).abs() <= 1e-3 * abs(factor)
        candidates = [p] if ordered and bool(good[p]) else []
        if not ordered:
            candidates = torch.nonzero(good).flatten().tolist()
        if not candidates:
            return None
        first = next((c for c in candidates if c not in chosen), candidates[0])
        chosen.append(first)
        factor = float(factors[first]) if factor is None else factor
    assert factor is not None
    return tuple(chosen), factor
