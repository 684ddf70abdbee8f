"""Recall by distance: spans that come again, and keys with their values, each at set distances.

Rows of text carry, for every distance, one item whose second time begins exactly so many tokens
after its first. `copy`: a span of other text; all but its first token count. `key-value`: keys that
begin alike, each with a value of its own, of random tokens, each one once in a row; the values
count.
"""

from __future__ import annotations

from typing import Any

from recall_rows import DRAWN

SPAN, SHARED, KEY, VALUE = 24, 4, 8, 8
#: of the row; the rows are a little longer than the longest distance
SHARES = (1 / 8, 1 / 4, 1 / 2, 7 / 8)


def distances(length: int) -> list[int]:
    """Tokens from the first time to the second, in rows of a length."""
    return [round(share * length) for share in SHARES]


def rows(text_SN: Any, kind: str, *, seed: int) -> tuple[Any, list[Any]]:
    """(S, N) token ids, and for every distance (S, N) the tokens that count.

    Args:
        text_SN: rows that the items are written into.
        kind: `copy` or `key-value`.
        seed: of tokens and places.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids_SN, length = text_SN.clone(), text_SN.shape[1]
    apart = distances(length)
    counted = [torch.zeros_like(ids_SN, dtype=torch.bool) for _ in apart]
    size, known = (SPAN, 1) if kind == "copy" else (KEY + VALUE, KEY)
    for row in range(len(ids_SN)):
        drawn = 1 + torch.randperm(DRAWN - 1, generator=generator)
        other = text_SN[(row + len(text_SN) // 2) % len(text_SN)]
        chosen = zip(places(apart, size, length, generator), apart, strict=True)
        for n, (first, distance) in enumerate(chosen):
            if kind == "copy":
                span = other[n * size : (n + 1) * size]
            else:
                own = drawn[SHARED + n * size : (n + 1) * size]
                span = torch.cat([drawn[:SHARED], own])
            second = first + distance
            ids_SN[row, first : first + size] = ids_SN[row, second : second + size] = span
            counted[n][row, second + known : second + size] = True
    return ids_SN, counted


def places(apart: list[int], size: int, length: int, generator: Any) -> list[int]:
    """Where the item of each distance begins, so that no two overlap."""
    import torch

    while True:
        taken, found = torch.zeros(length, dtype=torch.bool), []
        for distance in reversed(apart):  # the longest has the fewest places
            free = length - distance - size + 1
            first = int(torch.randint(free, (), generator=generator))
            both = [slice(at, at + size) for at in (first, first + distance)]
            if any(bool(taken[part].any()) for part in both):
                break
            for part in both:
                taken[part] = True
            found.append(first)
        else:
            return found[::-1]


def accuracy(text_SN: Any, kind: str, scorer: Any, *, seed: int) -> list[float]:
    """Share of the counted tokens that are told right, for every distance; argmax, teacher-forced.

    Args:
        text_SN, kind, seed: as `rows`.
        scorer: (ids, mask) -> logits.
    """
    import torch

    from reattend.verify.scoring import token_nll

    ids_SN, counted = rows(text_SN, kind, seed=seed)
    right = []
    for ids_BN in ids_SN.split(4):
        every_BN = torch.ones_like(ids_BN)
        right.append(token_nll(scorer(ids_BN, every_BN), ids_BN, every_BN)[1])
    right_SM = torch.cat(right).cpu()
    return [float(right_SM[chosen[:, 1:]].double().mean()) for chosen in counted]
