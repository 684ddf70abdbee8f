"""Blocks of models without states, as they are traced: every class of heads calls the op of a node.

What a query sees follows from positions and, where heads choose, from `reattend.mixers.selecting`,
traced as it is; the nodes are told. Layout letters: B batch, N tokens, H query heads, G key/value
heads, d and e widths, R regions (tiles of a grid), K keys that a region reads, Q tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reattend.install.adapter import Adapter
from reattend.mixers.base import Context
from reattend.mixers.config import CoreConfig
from reattend.mixers.dense import DenseAttention
from reattend.mixers.places import places, valid_tokens
from reattend.mixers.selecting.base import Asked
from reattend.mixers.selecting.blocks import Routes, tile_of
from reattend.mixers.sparse import SparseAttention
from reattend.parts import picked, query_heads
from reattend.passes.rewrite.sparse_build import like, sparse_like
from reattend.patterns.pattern import HeadPattern
from reattend.patterns.selectors import Blocks, Observed
from reattend.targets.onnx.encoder_band import BAND, band_attention, band_of
from reattend.targets.onnx.encoder_observed import observed_attention
from reattend.targets.onnx.encoder_ops import (
    chosen_attention,
    masked_attention,
    region_attention,
)
from reattend.targets.onnx.encoder_regions import Regions, regions

FULL = HeadPattern(full=True)


@dataclass
class Passes:
    """Which pass over a text a call is, and the blocks that heads read in later passes.

    Attributes:
        number, passes, new_tokens: [1] each: counted from 1, as `reattend.denoising` is told; no
            passes: a call by itself.
        given, written: by the name of a state, [B, H, P, K].
    """

    number: Tensor
    passes: Tensor
    new_tokens: Tensor
    given: dict[str, Tensor]
    written: dict[str, Tensor] = field(default_factory=dict)


class WholeDense(DenseAttention):
    """A dense block as a node."""

    def attend(self, query: Any, rows: Any, ctx: Context, span: Any) -> Tensor:
        """See `Mixer.attend`."""
        q, (k, v) = query[0], rows
        place = places(valid_tokens(ctx.mask, q.shape[0], q.shape[2]), q.shape[2], q.device)
        return _masked(q, k, v, self.config.core, _seen(FULL, self.config.core, place))


class WholeSparse(SparseAttention):
    """A sparse block as a node, or two, for every class of heads.

    Attributes:
        forms: by class, the nodes of the last call.
        state: what the name of a state of this block begins with.
        around: which pass a call is, where heads ask; set for every call.
        known: by class and number of tokens, what is found before a call is traced; see `prepare`.
    """

    forms: dict[int, str]
    state: str
    around: Passes
    known: dict[tuple[int, int], Regions | Tensor | None]

    def attend(self, query: Any, rows: Any, ctx: Context, span: Any) -> Tensor:
        """See `Mixer.attend`."""
        place = places(rows.valid_BN, query.shape[2], query.device)
        return self.together(
            [self._nodes(query, rows, n, place) for n in range(len(self.config.classes))]
        )

    def _nodes(self, q_BHNd: Tensor, rows: Any, number: int, place: Tensor) -> Tensor:
        """The output of one class' query heads, [B, heads, N, e]."""
        head_class, core = self.config.classes[number], self.config.core
        pattern, heads = head_class.pattern, query_heads(core, head_class.kv_heads)
        own = core.model_copy(update={"heads": len(heads), "kv_heads": len(head_class.kv_heads)})
        q, n = picked(q_BHNd, heads), q_BHNd.shape[2]
        k, v = (picked(x, head_class.kv_heads) for x in (rows.keys, rows.values))
        known = None
        if isinstance(n, int) and rows.valid_BN is None:
            if (number, n) not in self.known:
                self.known[number, n] = _prepared(pattern, own, n)
            known = self.known[number, n]
        band = band_of(pattern, own)
        self.forms[number] = BAND if band and known is None else _form(pattern, known, n)
        if isinstance(known, Regions):
            return _by_boxes(q, k, v, own, known)
        if band:
            return _band(q, k, v, own, place, band)
        seen = _seen(pattern, own, place)
        if pattern.select is None:
            return _masked(q, k, v, own, seen)
        if isinstance(pattern.select, Observed):
            return self._in_passes(q, k, v, own, number, pattern.select)
        method: Any = self.selecting[str(number)]
        chosen = method.choose(Asked(q, k, own, None, None, v))
        if known is not None:
            return _by_tiles(q, k, v, own, chosen, pattern.select, known)
        return _masked(q, k, v, own, chosen.mask() | seen)

    def _in_passes(
        self, q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, number: int, select: Observed
    ) -> Tensor:
        """See `reattend.mixers.selecting.observed`."""
        around, name = self.around, f"{self.state}.{number}.blocks"
        many = (q.shape[2] + select.block - 1) // select.block  # ONNX divides towards zero
        whole = around.passes == 0
        last = (around.passes.double() * select.skip).floor().long() + 2
        phase = (around.number >= last).long() + (around.number > last).long()
        prompt = (q.shape[2] - around.new_tokens + select.block - 1) // select.block
        y: Tensor
        y, blocks = observed_attention(
            q, k, v, around.given[name], torch.where(whole, 3, phase),
            torch.where(whole, many, prompt.clamp(min=0).clamp(max=many - 1)),
            select.block, select.topk or 0, select.ratio or 0.0, core.scale, core.softcap,
        )  # fmt: skip
        around.written[name] = blocks
        return y


def gathers(pattern: HeadPattern) -> bool:
    """Whether a selector chooses equally many tiles for every tile of queries."""
    s = pattern.select
    return (
        isinstance(s, Blocks) and bool(s.tile) and s.queries == "pooled" and s.across == "row"
        and s.topp is None and s.threshold is None and not pattern.terms
    )  # fmt: skip


def _form(pattern: HeadPattern, known: Regions | Tensor | None, n: int) -> str:
    """The node of a class of heads; a second one where a grid has text around it."""
    if isinstance(pattern.select, Observed):
        return "ObservedAttention"
    if known is None:
        return "MaskedAttention"
    boxes = isinstance(known, Regions)
    tokens = known.tokens if isinstance(known, Regions) else known.numel()
    op = "RegionAttention" if boxes else "ChosenRegionAttention"
    return op if tokens == n else f"{op} + MaskedAttention"


def _prepared(pattern: HeadPattern, core: CoreConfig, n: int) -> Regions | Tensor | None:
    """What is known of a pattern for so many tokens: regions, the tokens [Q, c] of tiles; or None.

    It is found with values, so a traced call must find it here.
    """
    if gathers(pattern):
        select: Any = pattern.select
        return tile_of(select).argsort(stable=True).view(-1, select.size)
    if pattern.select is None and pattern.grids and pattern.grids[0].fits(n):
        return regions(pattern, core, n)
    return None


def _seen(pattern: HeadPattern, core: CoreConfig, place_BN: Tensor) -> Tensor:
    """What the pattern's terms show, [B or 1, 1, N or 1, N]."""
    j = place_BN[:, None, None, :]
    if pattern.full and not core.causal:
        return j >= 0
    return pattern.sees(place_BN[:, None, :, None], j, core)


def _masked(q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, seen: Tensor) -> Tensor:
    y: Tensor = masked_attention(q, k, v, seen, core.scale, core.softcap)
    return y


def _band(
    q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, place: Tensor, band: tuple[int, int]
) -> Tensor:
    y: Tensor = band_attention(q, k, v, place, *band, core.scale, core.softcap)
    return y


def _by_boxes(q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, boxes: Regions) -> Tensor:
    """The grid by regions; text sees everything."""
    end = boxes.first + boxes.tokens
    y = region_attention(
        q[:, :, boxes.first : end], k, v, *boxes.told, core.scale, core.softcap,
    )  # fmt: skip
    return _with_text(q, k, v, core, y, boxes.first)


def _by_tiles(
    q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, chosen: Routes, select: Any, grid_Qc: Tensor
) -> Tensor:
    """Every tile of queries reads the tiles that it has chosen, and all text; a query itself."""
    (tiles, size), n = grid_Qc.shape, q.shape[2]
    end = select.text_before + tiles * size
    map_BHRQ = chosen.map_BHRQ[:, :, :tiles, :tiles].float()
    order_BHRQ = map_BHRQ.topk(select.units(tiles), sorted=False).indices
    key_rows = (grid_Qc + select.text_before)[order_BHRQ].flatten(3)
    text = torch.cat([torch.arange(select.text_before), torch.arange(end, n)])
    key_rows = torch.cat([key_rows, text.expand(*key_rows.shape[:3], -1)], 3)
    every = torch.ones(1, 1, 1, size, 1, dtype=torch.bool)
    every = every.expand(*key_rows.shape[:3], size, key_rows.shape[3])
    is_own = torch.eye(tiles, dtype=torch.bool)
    alone = ~(chosen.map_BHRQ[:, :, :tiles, :tiles] & is_own).any(-1)[..., None, None]
    seen = torch.cat([every, alone & torch.eye(size, dtype=torch.bool)], 4)
    own_rows = (grid_Qc + select.text_before).expand(*key_rows.shape[:3], -1)
    key_rows, at = torch.cat([key_rows, own_rows], 3), grid_Qc.flatten().argsort()
    grid = q[:, :, select.text_before : end]
    y = chosen_attention(grid, k, v, grid_Qc, key_rows, seen, at, core.scale, core.softcap)
    return _with_text(q, k, v, core, y, select.text_before)


def _with_text(q: Tensor, k: Tensor, v: Tensor, core: CoreConfig, y: Tensor, before: int) -> Tensor:
    """The output of a grid, and of the tokens around it, which see everything."""
    n, end = q.shape[2], before + y.shape[2]
    if end - before == n:
        return y
    text = torch.cat([q[:, :, :before], q[:, :, end:]], 2)
    every = torch.ones(1, 1, 1, n, dtype=torch.bool)
    around = _masked(text, k, v, core, every)
    return torch.cat([around[:, :, :before], y, around[:, :, before:]], 2)


def make_whole(model: nn.Module) -> dict[str, int]:
    """Let all blocks of a model call their nodes; changes `model`.

    Returns:
        Query heads of each state [B, H, P, K], by its name.
    """
    found, layer = {}, 0
    for module in model.modules():
        if not isinstance(module, Adapter):
            continue
        mixer = module.mixer
        if isinstance(mixer, SparseAttention):
            made = sparse_like(mixer, mixer.config, WholeSparse)
            made.selecting = mixer.selecting  # what chooses keeps its weights
            made.forms, made.known, made.state = {}, {}, f"state.{layer}"
            for number, c in enumerate(mixer.config.classes):
                if isinstance(c.pattern.select, Observed):
                    heads = query_heads(mixer.config.core, c.kv_heads)
                    found[f"state.{layer}.{number}.blocks"] = len(heads)
            module.mixer = made
        elif isinstance(mixer, DenseAttention):
            module.mixer = like(mixer, WholeDense)
        layer += 1
    return found
