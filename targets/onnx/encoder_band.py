"""The node of sinks and a window on both sides, for texts of any length without states.

Queries go region by region (`pattern_regions.py`), and each reads the rows around it and the sinks:
where real tokens stand together, N (sinks + 2 window) products. Letters: B batch, H query heads, G
key/value heads, N tokens, d and e widths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.encoder_ops import masked_attention
from reattend.targets.onnx.pattern_regions import by_region, filled_both_ways
from reattend.targets.onnx.pattern_terms import TERMS, Term

BAND = "BandAttention"

_NEAR = Term(
    TERMS["window"].once
    + """
  width_back = Neg (width)""",
    """
  is_behind = Less (apart, width)
  is_before = Less (width_back, apart)
  band = And (is_behind, is_before)""",
    """
  is_behind_r = Less (apart_r, width)
  is_before_r = Less (width_back, far_r)
  band_r = And (is_behind_r, is_before_r)""",
)

_BODY = f"""
  p0 = Constant <value: tensor = int32 {{0}}> ()
  p1 = Constant <value: tensor = int32 {{1}}> ()
ONCE
  batch_1 = Shape <start = 0, end = 1> (q)
  every_place = Concat <axis = 0> (batch_1, n_1)
  place_p = Cast <to = 6> (place)
  j_rows = Expand (place_p, every_place)
  i_bn = Max (j_rows, p0)
{by_region("key", "value")}
  y = Identity (regions_y)
}}"""

BAND_BODY = filled_both_ways(_BODY, {"sinks": TERMS["sinks"], "band": _NEAR})


def band_of(pattern: HeadPattern, core: CoreConfig) -> tuple[int, int] | None:
    """Sinks and the window of a class of heads, if that is all it sees, in both directions."""
    given = pattern.model_dump(exclude_defaults=True)
    if core.causal or not given or not set(given) <= {"sinks", "window"}:
        return None
    return pattern.sinks, max(pattern.window, 1)


@torch.library.custom_op("reattend::band_attention", mutates_args=())
def band_attention(
    q_BHNd: Tensor, k_BGNd: Tensor, v_BGNe: Tensor, place_BN: Tensor, sinks: int, window: int,
    scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Attention to the first tokens and to those closer than `window`.

    Args:
        q_BHNd, k_BGNd, v_BGNe: of all tokens.
        place_BN: of every token, [B or 1, N], negative for padding.
        sinks, window: of the pattern.
        scale, softcap: of the scores.

    Returns:
        y [B, H, N, e]; at padding it is finite, and means nothing.
    """
    i, j = place_BN[:, :, None], place_BN[:, None]
    seen = (((i - j).abs() < window) | (j < sinks)) & (j >= 0)
    y: Tensor = masked_attention(q_BHNd, k_BGNd, v_BGNe, seen[:, None], scale, softcap)
    return y


@band_attention.register_fake
def _fake(
    q: Tensor, k: Tensor, v: Tensor, place: Tensor, sinks: int, window: int, scale: float,
    softcap: float,
) -> Tensor:  # fmt: skip
    return q.new_empty(*q.shape[:3], v.shape[3])
