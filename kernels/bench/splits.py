"""In how many parts the sweep cuts the keys of a decode."""

from __future__ import annotations

from collections.abc import Iterator

from cases import Case

from reattend.kernels.configs import KernelConfig

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def sane_splits(case: Case, config: KernelConfig, processors: int) -> Iterator[int]:
    """Splits that make a third of a wave to four and a half, of at least two tiles each."""
    if case.op == "linear_attention":
        yield 1
        return
    rows = case.h // case.g * case.n
    programs = -(-rows // config.rows) * case.g * case.b
    for splits in SPLITS:
        fills = processors / 3 <= programs * splits <= 4.5 * processors
        if (fills and case.m // splits >= 2 * config.keys) or (splits == 1 and programs > 3):
            yield splits
