"""The tensors of a latent block under DeepSeek's names and in DeepSeek's order, in float64.

Layout letters: H heads, G key/value groups, D hidden width, d, e key and value widths, r latent
rank, R rotary width, n rank of the query's factors.

Against `LatentAttention`: every head has its own rows of `kv_b_proj` (a group's are repeated),
rotated dimensions are neighbours ([re, im, re, im, ..]), the class takes (d + R)^-1/2 for the scale
of the scores, so queries are multiplied by the rest, and both norms are there (`anchor`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.latent import LatentAttention
from reattend.targets.deepseek.anchor import Anchor, anchor, row_bound
from reattend.targets.deepseek.shape import Shape, places, slot_frequencies


def attention_tensors(
    mixer: LatentAttention, shape: Shape, input_gain_D: Tensor, factor: float, dtype: torch.dtype
) -> tuple[dict[str, Tensor], float]:
    """The tensors of one `self_attn`.

    Args:
        mixer: the block.
        shape: of all layers.
        input_gain_D: gain of the norm before the block.
        factor: what the residual stream is given of the block's output.
        dtype: that the tensors will be stored in.

    Returns:
        Tensors by name, and the largest relative change that anchored norms can make.
    """
    c = mixer.config
    own = {k: v.detach().double().cpu() for k, v in mixer.state_dict().items()}
    slots = torch.tensor(places(slot_frequencies(c), shape.frequencies), dtype=torch.long)
    queries, error = _queries(mixer, own, shape, slots, input_gain_D, dtype)
    r, pad = c.kv_lora_rank, shape.rank - c.kv_lora_rank
    latent, rope = own["kv_a_proj_with_mqa.weight"].split([r, c.qk_rope_head_dim])
    up = own["kv_b_proj.weight"].unflatten(0, (c.core.kv_heads, -1))
    up = up.repeat_interleave(shape.heads // c.core.kv_heads, 0).flatten(0, 1)
    gain, bias = torch.zeros(shape.rank), torch.zeros(shape.rank + shape.rope)
    gain, bias = gain.double(), bias.double()
    if shape.anchored:
        made = anchor(row_bound(latent, input_gain_D.cpu()), shape.rank, dtype)
        gain[:r], bias[shape.rank - 1] = made.gain, made.value
        up = up * made.correction
        error = max(error, made.error)
    else:  # the mean square is over more rows now: keep it, and undo that after the norm
        wider = (shape.rank / r) ** 0.5
        latent, gain[:r] = latent * wider, own["kv_a_layernorm.weight"] / wider
    if "k_rope_bias" in own:
        bias[shape.rank :] = _interleaved(own["k_rope_bias"][:, None], slots, shape)[:, 0]
    rows = [latent, latent.new_zeros(pad, latent.shape[1]), _interleaved(rope, slots, shape)]
    out = {
        "kv_a_proj_with_mqa.weight": torch.cat(rows),
        "kv_a_layernorm.weight": gain,
        "kv_b_proj.weight": torch.cat([up, up.new_zeros(up.shape[0], pad)], 1),
        "o_proj.weight": own["o_proj.weight"] * factor,
        **queries,
    }
    if shape.biased:
        out["kv_a_proj_with_mqa.bias"] = bias
        zero = torch.zeros(out["o_proj.weight"].shape[0], dtype=torch.float64)
        out["o_proj.bias"] = own.get("o_proj.bias", zero) * factor
    return out, error


def _queries(
    mixer: LatentAttention,
    own: dict[str, Tensor],
    shape: Shape,
    slots: Tensor,
    input_gain_D: Tensor,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], float]:
    """One matrix, or two with an anchored norm between them, which also carries a query bias."""
    c = mixer.config
    table = 1.0 if c.rotary is None else c.rotary.scaling**2
    scale = c.q.scale * c.core.scale * (shape.nope + shape.rope) ** 0.5

    def placed(rows: Tensor) -> Tensor:
        """[H (d + R of the block), ..] to [H (d + R of the shape), ..], scaled."""
        heads = rows.reshape(shape.heads, shape.nope + c.qk_rope_head_dim, -1) * scale
        nope, rope = heads.split([shape.nope, c.qk_rope_head_dim], 1)
        turned = torch.stack([_interleaved(h * table, slots, shape) for h in rope])
        return torch.cat([nope, turned], 1).flatten(0, 1)

    if shape.q_rank is None:
        return {"q_proj.weight": placed(own["q_proj.weight"])}, 0.0
    n = shape.q_rank
    if c.q_lora_rank is None:
        first = torch.eye(n, dtype=torch.float64)
        second, bias = own["q_proj.weight"], own.get("q_proj.bias")
    else:
        first = own["q_proj.q_a_proj.weight"]
        second, bias = own["q_proj.q_b_proj.weight"], own.get("q_proj.q_b_proj.bias")
    made: Anchor = anchor(row_bound(first, input_gain_D.cpu()), n + 1, dtype)
    last = second.new_zeros(second.shape[0], 1) if bias is None else bias[:, None]
    gain = torch.full((n + 1,), made.gain, dtype=torch.float64)
    # after the norm the anchor is sqrt(n + 1), so with this gain it carries the bias as it is
    gain[n] = (n + 1) ** -0.5
    constant = torch.zeros(n + 1, dtype=torch.float64)
    constant[n] = made.value
    return {
        "q_a_proj.weight": torch.cat([first, first.new_zeros(1, first.shape[1])]),
        "q_a_proj.bias": constant,
        "q_a_layernorm.weight": gain,
        "q_b_proj.weight": placed(torch.cat([second * made.correction, last], 1)),
    }, made.error


def _interleaved(rows: Tensor, slots: Tensor, shape: Shape) -> Tensor:
    """[real slots | imaginary slots] of a block to neighbouring rows of the common table."""
    pairs = rows.shape[0] // 2
    out = rows.new_zeros(len(shape.frequencies), 2, *rows.shape[1:])
    out[slots, 0], out[slots, 1] = rows[:pairs], rows[pairs:]
    return out.flatten(0, 1)
