"""The one size all layers of a DeepSeek checkpoint share, and how layers are padded to it.

Layout letters: r latent rank, R rotary width.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from reattend.errors import ArgumentError
from reattend.mixers.latent_config import LatentConfig
from reattend.targets.deepseek.obstacles import UNIFORM, Obstacle

Version = Literal["v3", "v2"]
PAD_STEP = "pad the layers to one size: pad='max' (command line: --pad max)"


@dataclass(frozen=True)
class Shape:
    """Sizes that the config states once.

    Attributes:
        heads, nope, value: H, d and e.
        rank: r of the checkpoint, anchor and padding included.
        frequencies: of the R / 2 rotary slots, in the order of the table.
        scaling: what the host's table multiplies cos and sin by.
        anchored: r holds a row for the anchor (`anchor`).
        q_rank: `q_lora_rank` without its anchor; None for a full query projection.
        biased: `attention_bias`.
    """

    heads: int
    nope: int
    value: int
    rank: int
    frequencies: tuple[float, ...]
    anchored: bool
    q_rank: int | None
    biased: bool

    @property
    def rope(self) -> int:
        """R."""
        return 2 * len(self.frequencies)

    @property
    def cache(self) -> int:
        """Numbers per token and layer."""
        return self.rank + self.rope


def parse_pad(pad: str | None) -> tuple[int, int] | None:
    """`max` is (0, 0), `512+64` is (512, 64): the least r and R; None: no padding.

    Raises:
        ArgumentError: something else.
    """
    if pad is None:
        return None
    if pad == "max":
        return 0, 0
    found = re.fullmatch(r"(\d+)\+(\d+)", pad)
    if found is None or int(found[2]) % 2:
        raise ArgumentError(
            f"pad {pad!r} is not understood",
            next_step="pad='max', or the latent rank and the (even) rotary width: pad='512+64'",
        )
    return int(found[1]), int(found[2])


def slot_frequencies(config: LatentConfig) -> tuple[float, ...]:
    """Radians per token of every rotary slot of a block."""
    if config.rotary is None:
        return ()
    return tuple(config.rotary.inv_freq[column] for column in config.rope_columns)


def union(tables: list[tuple[float, ...]]) -> tuple[float, ...]:
    """The least table that holds every layer's slots, highest frequency first."""
    most: Counter[float] = Counter()
    for table in tables:
        for frequency, count in Counter(table).items():
            most[frequency] = max(most[frequency], count)
    return tuple(sorted(most.elements(), reverse=True))


def widened(table: tuple[float, ...], slots: int, theta: float | None) -> tuple[float, ...]:
    """The table with more slots, highest frequency first; the plain one of that width if it can be.

    A plain table of twice the width holds the narrow one in every second slot.
    """
    if theta is not None:
        plain = [theta ** (-j / slots) for j in range(slots)]
        nearest = [min(range(slots), key=lambda j: abs(plain[j] / f - 1)) for f in table]  # noqa: B023
        alike = all(abs(plain[j] / f - 1) < 1e-6 for j, f in zip(nearest, table, strict=True))
        if alike and len(set(nearest)) == len(table):
            for j, frequency in zip(nearest, table, strict=True):
                plain[j] = frequency
            return tuple(plain)
    return tuple(sorted((*table, *[table[-1]] * (slots - len(table))), reverse=True))


def places(slots: tuple[float, ...], table: tuple[float, ...]) -> list[int]:
    """The table's slot of each slot of a layer; equal frequencies in order."""
    free: dict[float, list[int]] = {}
    for place, frequency in enumerate(table):
        free.setdefault(frequency, []).append(place)
    return [free[frequency].pop(0) for frequency in slots]


def common_shape(
    blocks: dict[str, LatentConfig],
    pad: tuple[int, int] | None,
    version: Version,
    theta: float | None = None,
) -> tuple[Shape | None, list[Obstacle]]:
    """One shape for all layers, or why there is none without padding.

    Args:
        blocks: the latent blocks by path.
        pad: from `parse_pad`.
        version: `v2` turns the shared key in a form that needs an even r.
        theta: base of the host's rotary table, where that is a plain one.
    """
    found: list[Obstacle] = []
    configs = list(blocks.values())
    first = configs[0]
    for name in ("heads", "qk_head_dim", "v_head_dim"):
        sizes = sorted({getattr(c.core, name) for c in configs})
        if len(sizes) > 1:
            found.append(Obstacle("all layers", f"{name} differs: {sizes}", "no DeepSeek form"))
    for name in ("q_lora_rank", "latent_norm"):
        if len({getattr(c, name) for c in configs}) > 1:
            found.append(Obstacle("all layers", f"{name} differs", "one value for all layers"))
    tables = [tuple(sorted(slot_frequencies(c), reverse=True)) for c in configs]
    table = union(tables)
    ranks = sorted({c.kv_lora_rank for c in configs})
    if pad is None and len(ranks) > 1:
        found.append(
            Obstacle(
                "all layers",
                f"kv_lora_rank differs from layer to layer ({_some(ranks)}); the config has one",
                f"{UNIFORM}; or {PAD_STEP} ({ranks[-1]})",
            )
        )
    if pad is None and any(t != table for t in tables):
        widths = sorted({2 * len(t) for t in tables})
        found.append(
            Obstacle(
                "all layers",
                "the rotated frequencies differ from layer to layer "
                f"(qk_rope_head_dim {_some(widths)}; together {2 * len(table)}); the config has "
                "one table",
                f"{UNIFORM}; or {PAD_STEP} (R = {2 * len(table)})",
            )
        )
    if not table and all(c.rotary is None for c in configs):
        found.append(Obstacle("all layers", "no layer rotates anything", "no DeepSeek form"))
    if any(frequency <= 0 for frequency in table):
        found.append(Obstacle("all layers", "a rotated pair does not turn", "no DeepSeek form"))
    if found:
        return None, found
    rank, rope = pad or (0, 0)
    anchored = first.latent_norm == "none"
    room = all(c.kv_lora_rank < rank for c in configs)
    rank = max(rank, ranks[-1] + (anchored and not room))
    if version == "v2":
        rank += rank % 2
    if 2 * len(table) < rope:
        table = widened(table, rope // 2, theta)
    two = first.q_lora_rank is not None or any(c.q.bias for c in configs)
    q_rank = (first.q_lora_rank or first.hidden_size) if two else None
    biased = anchored or two or any(c.out_bias or c.rope_key_bias for c in configs)
    shape = Shape(
        first.core.heads, first.core.qk_head_dim, first.core.v_head_dim, rank, table, anchored,
        q_rank, biased,
    )  # fmt: skip
    return shape, []


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:4])) + (", ..." if len(values) > 4 else "")
