"""The node of sinks and a window on both sides, for texts of any length without states.

Queries are cut into regions of c, which read c + 2 (w - 1) rows of their own and the sinks. That
holds where real tokens come first, as texts of an encoder are padded; otherwise, and in texts that
are hardly longer than that, every score is formed under a mask. Letters: B batch, H query heads, N
tokens, R regions, w window, K rows that a region reads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.config import CoreConfig
from reattend.patterns.pattern import HeadPattern
from reattend.targets.onnx.encoder_ops import masked_attention
from reattend.targets.onnx.fragments import RUNS

BAND = "BandAttention"

_READ = """
      side = Sub (w, one)
      sides = Add (side, side)
      near_many = Add (run_c, sides)
      near = Range (zero, near_many, one)
      run_number = Range (zero, runs, one)
      run_first = Mul (run_number, run_c)
      near_first = Sub (run_first, side)
      near_first_1 = Unsqueeze (near_first, axis_1)
      near_row = Add (near_first_1, near)
      is_behind = GreaterOrEqual (near_row, s)
      is_inside = Less (near_row, n)
      is_row = And (is_behind, is_inside)
      s_1 = Unsqueeze (s, axis_0)
      by_sink = Concat <axis = 0> (runs_1, s_1)
      sink_row = Expand (sink, by_sink)
      is_sink = Equal (sink_row, sink_row)
      rows_any = Concat <axis = 1> (sink_row, near_row)
      rows_in = Clip (rows_any, zero, n_less)
      rows_real = Concat <axis = 1> (is_sink, is_row)
      inside = Range (zero, run_c, one)
      inside_1 = Unsqueeze (inside, axis_1)
      near_place = Sub (near, side)
      apart = Sub (inside_1, near_place)
      far = Abs (apart)
      is_near = Less (far, w)
      sink_of_all = Concat <axis = 0> (run_c_1, s_1)
      sink_of_row = Expand (always, sink_of_all)
      is_seen = Concat <axis = 1> (sink_of_row, is_near)
      token_real = Gather <axis = 1> (is_real, rows_in)
      is_token = And (token_real, rows_real)
      token_5 = Unsqueeze (is_token, axes_134)
      visible = And (is_seen, token_5)
      read_key = Gather <axis = 2> (key, rows_in)
      read_value = Gather <axis = 2> (value, rows_in)
REGIONS
      band_y = Slice (y_flat, same, n_1, axis_2)"""

BAND_BODY = f"""
  w = Constant <value_int: int = @window> ()
  s = Constant <value_int: int = @sinks> ()
  sink = Range (zero, s, one)
  axes_134 = Constant <value_ints = [1, 3, 4]> ()
  n_less = Sub (n, one)
  row = Range (zero, n, one)
  is_real = GreaterOrEqual (place, zero)
  always = Equal (one, one)
  stands_there = Equal (place, row)
  is_padding = Not (is_real)
  is_fit = Or (stands_there, is_padding)
  fit_int = Cast <to = 7> (is_fit)
  fit_least = ReduceMin <keepdims = 0> (fit_int)
  is_first = Greater (fit_least, zero)
  twice = Add (w, w)
  run_length = Constant <value_int = @RUN> ()
  reads_any = Add (twice, run_length)
  reads = Add (reads_any, s)
  is_long = Less (reads, n)
  is_band = And (is_first, is_long)
  y = If (is_band) <
    then_branch = band () => (band_y)
    {{
      run_most = Constant <value_int = @RUN> (){RUNS}{_READ}
    }},
    else_branch = under_a_mask () => (masked_y)
    {{
      place_i = Unsqueeze (place, axis_2)
      place_j = Unsqueeze (place, axis_1)
      places_apart = Sub (place_i, place_j)
      places_far = Abs (places_apart)
      in_window = Less (places_far, w)
      in_sinks = Less (place_j, s)
      in_either = Or (in_window, in_sinks)
      real_j = GreaterOrEqual (place_j, zero)
      seen_any = And (in_either, real_j)
      seen = Unsqueeze (seen_any, axis_1)
MASKED
    }}
  >
}}"""


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
