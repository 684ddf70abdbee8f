"""`to: sparse`: every KV head sees only part of the keys, by a pattern of its own.

The block keeps its weights; what changes is which keys a head reads and which rows its cache keeps.
Exact with `full: true`. One conversion serves all static patterns and selectors;
presets name them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.sparse import SparseAttention
from reattend.mixers.sparse_config import SparseConfig
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import (
    Built,
    Conversion,
    Cost,
    Measure,
    Subject,
    dense_cost,
    regrouped,
)
from reattend.passes.rewrite.repeats import repeated
from reattend.passes.rewrite.sparse_build import head_classes, sparse_like
from reattend.passes.rewrite.sparse_cost import between, searched, settled
from reattend.passes.rewrite.sparse_extent import misplaced, pointless, unread
from reattend.passes.rewrite.sparse_find import find, trials
from reattend.passes.rewrite.sparse_options import SparseOptions
from reattend.passes.rewrite.sparse_select import at_layer, calibrate, heads_seen, misfit, stated
from reattend.passes.rewrite.sparse_teach import effort, taught
from reattend.statistics import Need


class ToSparse(Conversion):
    """A pattern per KV head, static or chosen at run time."""

    name = "sparse"
    Options = SparseOptions

    def check(self, config: DenseConfig, options: SparseOptions) -> Refusal | None:
        """Reads no weight."""
        core = config.core
        if config.cross:
            return Refusal("cross-attention: its keys have no place in the sequence of its queries")
        if (moved := regrouped(config)) is not None:
            return moved
        if core.pattern == "opaque":
            return Refusal("the mask has no fixed pattern that a sparse one could be laid over")
        if config.added is not None or config.relative is not None or config.alibi is not None:
            return Refusal("a position bias is added to the scores, which needs every key's place")
        named = [*options.heads_full, *(h for c in options.head_patterns for h in c.kv_heads)]
        if max(named, default=0) >= core.kv_heads:
            return Refusal(
                f"KV head {max(named)} is named, and the block has {core.kv_heads} (from 0)"
            )
        classes = head_classes(config, options)
        grids = [g for c in classes for g in c.pattern.grids]
        if grids and core.causal:
            return Refusal("a grid of image tokens is laid over a causal block")
        if any(not g.shape for g in grids):
            return Refusal(
                "the pattern lies over a grid of image tokens, and nothing says how large: give "
                "image_grid, for example image_grid: [14, 14] with text_before: 1 (a class token)"
            )
        wanted = [*(c.pattern for c in classes), *options.candidates]
        if options.evict and (back := [p for p in wanted if not (p.full or p.monotone)]):
            return Refusal(
                f"evict: true, but `{back[0].words()}` is not KV-monotone: a later query may see "
                "again what an earlier one did not, so nothing can be forgotten (powers, slashes, "
                "grids, select); without `evict`, the heads of other patterns forget"
            )
        if options.evict and not core.causal:
            return Refusal("evict: true, but a block that is not causal has no cache to shrink")
        return misfit(config, wanted) or pointless(core, wanted, None, options.pattern)

    def check_within(
        self, config: DenseConfig, options: SparseOptions, longest: int
    ) -> Refusal | None:
        """A pattern that hides nothing in the longest text would change nothing."""
        wanted = [*(c.pattern for c in head_classes(config, options)), *options.candidates]
        return pointless(config.core, wanted, longest, options.pattern)

    def check_tokens(
        self, config: DenseConfig, options: SparseOptions, tokens: int
    ) -> Refusal | None:
        """Whether the image is where the patterns have it."""
        return misplaced(
            [*(c.pattern for c in head_classes(config, options)), *options.candidates], tokens
        )

    def undecided(self, options: SparseOptions) -> bool:
        """Whether heads are to be chosen."""
        return options.searches

    def wants(self, config: DenseConfig, options: SparseOptions) -> frozenset[Need]:
        """The rows of statistics are where heads are measured, and selectors learn."""
        found = [p.select for p in options.patterns if p.select is not None]
        needs: set[Need] = {"sample"} if any(s.calibrated for s in found) else set()
        if options.finder == "gate":
            needs = {"texts"}
        return frozenset(needs | ({"gram"} if needs or self.undecided(options) else set()))

    def for_layer(self, options: SparseOptions, layer: int, layers: int) -> SparseOptions | Refusal:
        """Selectors that reach across layers are told where they are."""
        if (why := unread(options.pattern, layers)) is not None:
            return why
        return options.model_copy(update={"pattern": at_layer(options.pattern, layer)})

    def decodes_apart(self, options: SparseOptions) -> bool:
        """Selectors that act while decoding only."""
        return any(p.select is not None and p.select.acts == "decode" for p in options.patterns)

    def trials(self, configs: Sequence[DenseConfig], options: SparseOptions) -> int:
        """As many as the finder says."""
        return trials(configs, options)

    def learns(self, options: SparseOptions) -> bool:
        """DuoAttention's finder trains; MoA's takes gradients."""
        return options.finder in ("alpha", "profile")

    def training(
        self, config: DenseConfig, options: SparseOptions, length: int
    ) -> tuple[float, float]:
        """Gates are trained in `build`."""
        if options.finder != "gate":
            return 0.0, 0.0
        return effort(self.described(config, options), options.steps, length)

    def rehearsal(self, batch: dict[str, Any], options: Any) -> dict[str, Any]:
        """Text that repeats itself."""
        return repeated(batch)

    def allocate(self, sites: list[Subject], measure: Measure) -> list[Any]:
        """Heads by what the model loses without them, or by what they look at."""
        return find(self, sites, measure)

    def outcome(self, config: DenseConfig, options: SparseOptions) -> SparseConfig | None:
        """The mixer's description; None where heads are to be chosen."""
        return None if self.undecided(options) else self.described(config, options)

    def described(self, config: DenseConfig, options: SparseOptions) -> SparseConfig:
        """The mixer's description."""
        return SparseConfig.model_validate(
            {
                **config.model_dump(exclude={"kind"}),
                "kind": "sparse",
                "classes": head_classes(config, options),
                "evict": config.core.causal and options.evict is not False,
            }
        )

    def exact_setting(self, config: DenseConfig) -> SparseOptions:
        """Every head sees every key."""
        return SparseOptions()

    def cost(self, config: DenseConfig, options: SparseOptions) -> Cost:
        """Rows kept and read at the context of the original's cost."""
        if options.kv_density is not None:
            return searched(config, options.candidates, options.kv_density)
        if options.keep_full is None:
            return settled(config, self.described(config, options))
        part = self.cost(config, SparseOptions(pattern=options.pattern))
        return between(dense_cost(config), part, options.keep_full)

    def made(self, dense: DenseAttention, options: SparseOptions) -> SparseAttention:
        """The mixer, around the modules of `dense`."""
        return sparse_like(dense, self.described(dense.config, options), SparseAttention)

    def build(self, dense: DenseAttention, statistics: Any, options: SparseOptions) -> Built:
        """The same weights; selectors are set from rows of the block's input."""
        mixer = self.made(dense, options)
        texts = statistics.samples if statistics is not None else None
        calibrate(mixer, texts)
        exact = all(c.pattern.full for c in mixer.config.classes)
        evidence = heads_seen(mixer.config) | stated(mixer.config, options.density_at)
        if options.chosen:
            evidence["chosen"] = options.chosen
        if options.finder == "gate":
            evidence |= taught(mixer, texts, options.steps)
        return Built(mixer, "exact" if exact else "learned", evidence)
