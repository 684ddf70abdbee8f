"""Which key/value heads become one: equally many in every group, those that lose least together.

What a group loses is taken to be the sum over its pairs, and groups are improved from neighbours by
exchanging two heads as long as that helps. So the result is never worse than neighbours by this
measure, and depends on nothing but the costs.
"""

from __future__ import annotations

from itertools import combinations

from torch import Tensor


def neighbours(heads: int, groups: int) -> list[list[int]]:
    """Heads in the order they have."""
    each = heads // groups
    return [list(range(g * each, (g + 1) * each)) for g in range(groups)]


def similar(cost: Tensor, groups: int) -> list[list[int]]:
    """Groups whose pairs cost little, each in order, by their first heads.

    Args:
        cost: what each pair of heads loses as one, symmetric, [G, G].
        groups: of the result; divides G.
    """
    table: list[list[float]] = cost.tolist()
    found = neighbours(len(table), groups)
    while (swap := _best_swap(table, found)) is not None:
        (a, i), (b, j) = swap
        found[a][i], found[b][j] = found[b][j], found[a][i]
    return sorted(sorted(group) for group in found)


def _best_swap(
    table: list[list[float]], groups: list[list[int]]
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """The exchange of two heads that saves most; None where none saves anything."""
    most = 1e-9 * sum(map(sum, table))
    best = None
    for a, b in combinations(range(len(groups)), 2):
        for i, x in enumerate(groups[a]):
            for j, y in enumerate(groups[b]):
                saved = sum(table[x][o] - table[y][o] for o in groups[a] if o != x)
                saved += sum(table[y][o] - table[x][o] for o in groups[b] if o != y)
                if saved > most:
                    most, best = saved, ((a, i), (b, j))
    return best
