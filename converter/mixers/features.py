"""Feature maps: what stands for exp in linear attention.

`identity`; `elu+1`, Katharopoulos et al., arXiv 2006.16236; `relu`; `exp`, exp(x - max x);
`softmax` over a head's numbers; `silu`, Qin et al., arXiv 2401.04658; `hedgehog` as in LoLCATs
(Zhang et al., arXiv 2410.10254), two softmaxes of W x and of -W x side by side, W per head; `t2r`,
relu(W x + b), Kasai et al., arXiv 2103.13076; `sigmoid`; `mlp`, elu+1 of what is projected from
x + f(x) (`reattend.mixers.input_map`). `performer` is in `reattend.mixers.estimated`.
`hedgehog-fla` is what flash-linear-attention calls hedgehog: one softmax over 2 (W x + b) and its
negative, W and b shared by the heads.

Layout letters: B batch, h heads, N tokens, d head width, f features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reattend.kernels.core import compute_dtype
from reattend.mixers.linear_config import BIASED, LEARNED, FeatureMapName


class FeatureMap(nn.Module):
    """One map with weights of its own per head, where it has any."""

    def __init__(self, name: FeatureMapName, heads: int, width: int, rows: int) -> None:
        super().__init__()
        self.name = name
        heads = 1 if name == "hedgehog-fla" else heads
        self.weight_hfd: nn.Parameter | None = None
        self.bias_hf: nn.Parameter | None = None
        if name in LEARNED:
            self.weight_hfd = nn.Parameter(torch.zeros(heads, rows, width))
        if name in BIASED:
            self.bias_hf = nn.Parameter(torch.zeros(heads, rows))

    def start(self, identity: bool) -> None:
        """Set the weights: the identity, or small numbers from a generator of their own.

        Those are uniform with variance 2 / (rows x width), as LoLCATs' code draws them, so that
        all features start nearly equal.
        """
        if self.weight_hfd is None:
            return
        _, rows, width = self.weight_hfd.shape
        with torch.no_grad():
            if identity:
                self.weight_hfd.copy_(torch.eye(rows, width))
                return
            bound = (6 / (rows * width)) ** 0.5
            drawn = torch.rand(self.weight_hfd.shape, generator=torch.Generator().manual_seed(0))
            self.weight_hfd.copy_(bound * (2 * drawn - 1))

    def by_head(self, heads: int) -> tuple[Tensor | None, Tensor | None]:
        """Weights [h, rows, d] and biases [h, rows], also where heads share them."""
        weight, bias = self.weight_hfd, self.bias_hf
        return (
            None if weight is None else weight.expand(heads, -1, -1),
            None if bias is None else bias.expand(heads, -1),
        )

    def forward(self, x_BhNd: Tensor) -> Tensor:
        """Features [B, h, N, f], in float32 or wider."""
        return mapped(self.name, x_BhNd, self.weight_hfd, self.bias_hf)


def widened(x: Tensor) -> Tensor:
    """In float32, or as it is where it is wider."""
    return x.to(compute_dtype(x.dtype))


def mapped(
    name: FeatureMapName, x_BhNd: Tensor, weight_hfd: Tensor | None, bias_hf: Tensor | None
) -> Tensor:
    """Features [B, h, N, f], in float32 or wider; weights are read where the map has them."""
    x = widened(x_BhNd)
    if name in LEARNED and weight_hfd is not None:
        x = x @ weight_hfd.to(x.dtype).transpose(-1, -2)
    if name in BIASED and bias_hf is not None:
        x = x + bias_hf.to(x.dtype)[:, None]
    if name in ("elu+1", "mlp"):
        return nn.functional.elu(x) + 1
    if name in ("relu", "t2r"):
        return torch.relu(x)
    if name == "sigmoid":
        return torch.sigmoid(x)
    if name == "exp":
        return (x - x.amax(-1, keepdim=True)).exp()
    if name == "silu":
        return nn.functional.silu(x)
    if name == "softmax":
        return x.softmax(-1)
    if name == "hedgehog":
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
    if name == "hedgehog-fla":
        return torch.cat([2 * x, -2 * x], -1).softmax(-1)
    return x
