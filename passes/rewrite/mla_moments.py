"""Second moments of y = [keys | values] that the conversion compresses and selects by.

`pca`: as calibrated. `output`: weighted by what errors of the scores with each token cost. `care`
(FutureMLS-Lab/CARE): W S^2 W^T with S = (1 - l) C^(1/2) + l I for the input covariance C, scaled
to mean diagonal 1; l = 0 is `pca` up to a factor. `svd` (MHA2MLA, X-EcoMLA): W W^T, no data.
W = [W_K; W_V]; a norm behind the key projection counts at its mean size (`key_weight`, ours).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reattend.mixers.dense import DenseAttention
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.statistics import SiteStatistics


def latent_moment(
    dense: DenseAttention, statistics: SiteStatistics, options: MlaOptions
) -> tuple[Tensor, Tensor]:
    """Moment of y and the mean it is about (zero uncentred), [Y, Y] and [Y]."""
    zero = torch.zeros_like(statistics.total)
    if options.latent in ("care", "svd"):
        values = dense.v_proj.weight.detach().double().cpu()
        weight = torch.cat([key_weight(dense, statistics), values])
        if options.latent == "care":
            weight = weight @ shrunk_root(statistics, options.shrunk)
        return weight @ weight.t(), zero
    count = float(max(statistics.count, 1))
    gram, total = statistics.gram, statistics.total
    if options.latent == "output":
        assert statistics.attention is not None
        gram, total = statistics.attention.gram, statistics.attention.total
        count = float(statistics.attention.weight.clamp_min(1e-300))
    if not options.center or dense.config.core.sinks:
        return gram / count, zero
    mean = total / count
    if dense.config.core.softcap:  # a constant key is no constant score any more
        mean = mean.clone()
        mean[: dense.config.core.kv_heads * dense.config.core.qk_head_dim] = 0
        cross = torch.outer(total / count, mean)
        return gram / count - cross - cross.t() + torch.outer(mean, mean), mean
    return gram / count - torch.outer(mean, mean), mean


def key_weight(dense: DenseAttention, statistics: SiteStatistics) -> Tensor:
    """The linear map from the block's input to its unrotated keys, [G d, D].

    A norm is not linear; in its place stands division by its mean size over the calibration
    tokens, and its gain. What the norm adds to every key alike, its bias and that of the
    projection, is left out as elsewhere: softmax does not see it in keys that are not rotated.
    """
    weight: Tensor = dense.k_proj.weight.detach().double().cpu()
    norm = dense.k_norm
    if norm is None:
        return weight
    assert statistics.key_sizes is not None
    size = statistics.key_sizes / max(statistics.count, 1)
    each: Tensor = weight.unflatten(0, (len(size), -1))
    if norm.config.kind == "layer":
        each = each - each.mean(1, keepdim=True)
    each = each / size[:, None, None]
    if norm.weight is not None:
        each = each * (norm.weight.detach().double().cpu() + norm.config.gain_offset)[:, None]
    return each.flatten(0, 1)


def shrunk_root(statistics: SiteStatistics, shrinkage: float) -> Tensor:
    """S, [D, D]."""
    assert statistics.input_gram is not None
    gram = statistics.input_gram
    scaled = gram / (torch.diagonal(gram).mean().clamp_min(1e-300))
    values, vectors = torch.linalg.eigh(scaled)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
    return (1 - shrinkage) * root + shrinkage * torch.eye(len(root), dtype=root.dtype)


def key_moment(dense: DenseAttention, statistics: SiteStatistics, weighted: bool) -> Tensor:
    """Mean of k k^T of the keys as they are rotated, bias included, [G d, G d].

    Args:
        dense: the block.
        statistics: of it.
        weighted: tokens count by the attention they get, where that was measured.
    """
    core = dense.config.core
    width, count = core.kv_heads * core.qk_head_dim, float(max(statistics.count, 1))
    gram, total = statistics.gram, statistics.total
    if weighted and statistics.attention is not None:
        gram, total = statistics.attention.gram, statistics.attention.total
        count = float(statistics.attention.weight.clamp_min(1e-300))
    bias = dense.k_proj.bias if dense.k_norm is None else None
    return with_bias(gram[:width, :width] / count, total[:width] / count, bias)


def with_bias(moment: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    """Mean of (y + b) (y + b)^T, from that of y y^T and the mean of y."""
    if bias is None:
        return moment
    b = bias.detach().double().cpu()
    return moment + torch.outer(b, mean) + torch.outer(mean, b) + torch.outer(b, b)
