"""What statistics, and choosing sizes from them, will cost in bytes and solves."""

from __future__ import annotations

from reattend.divergence import OUTPUT_BYTES, ROWS
from reattend.preflight import Choice
from reattend.statistics import SAMPLE_ROWS, SAMPLE_TOKENS, TEXT_ROWS, TEXT_TOKENS


def gram_width(choice: Choice) -> int:
    """Y = G (d + e) where the conversion asks for second moments."""
    if "gram" not in choice.needs:
        return 0
    core = choice.config.core
    return core.kv_heads * (core.qk_head_dim + core.v_head_dim)


def moments_bytes(choice: Choice) -> int:
    """Bytes of one site's moments, float64, and of its sample."""
    core, config = choice.config.core, choice.config
    inputs = config.memory_size or config.hidden_size
    found = {
        "gram": gram_width(choice) ** 2,
        "queries": (core.heads * core.qk_head_dim) ** 2,
        "attention": gram_width(choice) ** 2 + core.heads * core.qk_head_dim**2,
        "inputs": inputs**2,
        "sample": SAMPLE_ROWS * SAMPLE_TOKENS * inputs // 2,
        "texts": TEXT_ROWS * TEXT_TOKENS * inputs // 2,
    }
    return 8 * sum(found[need] for need in choice.needs)


def peer_bytes(choice: Choice) -> int:
    """The same for everything that any preset of `to: mla` reads of a site."""
    core, config = choice.config.core, choice.config
    width = core.kv_heads * (core.qk_head_dim + core.v_head_dim)
    inputs = config.memory_size or config.hidden_size
    sample = SAMPLE_ROWS * SAMPLE_TOKENS * inputs // 2
    return 8 * (2 * width**2 + core.heads * core.qk_head_dim**2 + inputs**2 + sample)


def spreading_bytes(converted: list[Choice], length: int) -> int:
    """Bytes while one row's scores of one group are weighed: six copies in float32."""
    cores = [c.config.core for c in converted if "attention" in c.needs]
    return 6 * 4 * max((core.heads // core.kv_heads for core in cores), default=0) * length**2


def sharing_bytes(vocabulary: int, converted: list[Choice], length: int, spared: bool) -> int:
    """Bytes of measuring what each site does to the output: four times a few rows' logits.

    Args:
        spared: logits of some tokens can be left out, so that all rows fit.
    """
    undecided = [c for c in converted if c.conversion and c.conversion.undecided(c.options)]
    if not undecided:
        return 0
    row = 4 * length * max(vocabulary, 1)
    if spared:
        return 5 * min(ROWS * row, max(OUTPUT_BYTES, ROWS * row // length))
    return 5 * row * max(1, min(ROWS, OUTPUT_BYTES // row))


def solves(choice: Choice) -> int:
    """How often a site's second moments are solved for: `auto` sizes try many."""
    return 0 if choice.conversion is None else choice.conversion.solves(choice.options)


def training(choice: Choice, length: int) -> tuple[float, float]:
    """Floating-point operations and bytes of what building a site trains."""
    if choice.conversion is None:
        return 0.0, 0.0
    return choice.conversion.training(choice.config, choice.options, length)
