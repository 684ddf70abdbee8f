"""The forms in which every shipped kernel is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from reattend.kernels.configs import KernelConfig, find_config, shipped

SPARSE_BLOCK = 64
SMALL_BLOCKS = (16, 32)  # of a sparse layout; tiles never exceed a block
VARIANTS = ("plain", "full")


@dataclass(frozen=True)
class Form:
    """A kernel as it is launched.

    Attributes:
        kernel: of the table in `reattend.kernels.configs`.
        width_class: of that table.
        size: bytes per element, 2 (bf16) or 4 (fp32).
        config: tile sizes.
        variant: ``plain`` (causal only) or ``full`` (window, softcap and pages as well, of linear
            kernels decay and a denominator). Plain pipelines the most loads (most shared memory),
            full has the most to compute; either may need the more registers.
        width: head width, or latent rank; 0: the class.
        block: tokens of a block of a sparse layout; 0: not sparse.
    """

    kernel: str
    width_class: int
    size: int
    config: KernelConfig
    variant: str = "full"
    width: int = 0
    block: int = 0

    @property
    def wide(self) -> int:
        """The width that is compiled."""
        return self.width or self.width_class

    @property
    def is_usual(self) -> bool:
        """As wide as its class, in blocks of the usual size; plain where that loads otherwise."""
        paged = ("prefill", "decode", "wide", "tall", "channels")
        more = self.kernel.endswith(paged) and not self.kernel.startswith("sparse")
        told = self.variant == "full" or more
        return told and not self.width and self.block in (0, SPARSE_BLOCK)


def forms(target: str) -> Iterator[Form]:
    """Every form of a target's kernels.

    Each in both variants as wide as its class. In 2 bytes also as wide as 3/4 of the class, where a
    tile's last columns are masked (96 and 192 of a head, ranks of 192 and 384), and sparse kernels
    with smaller blocks, both with all that a kernel can do.
    """
    for kernel, width, size, config in shipped(target):
        sparse = kernel.startswith("sparse")
        form = Form(kernel, width, size, config, block=SPARSE_BLOCK if sparse else 0)
        for variant in VARIANTS:
            yield replace(form, variant=variant)
        if size == 2 and width in (128, 256, 512) and not kernel.startswith("linear"):
            masked = 3 * width // 4
            if find_config(target, kernel, masked, size) == config:
                yield replace(form, width=masked)
        for block in SMALL_BLOCKS if sparse else ():
            rows = config.rows if kernel.endswith("decode") else min(config.rows, block)
            tile = replace(config, rows=rows, keys=min(config.keys, block))
            yield replace(form, config=tile, block=block)
