"""Small blocks in the normal form with random weights, and statistics of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reattend.mixers.config import (
    CoreConfig,
    GateConfig,
    NormConfig,
    RelativeConfig,
    RotaryConfig,
    StreamConfig,
)
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.statistics import SiteStatistics

HIDDEN = 24


#: TransMLA as published.
PAPER: dict[str, Any] = {
    "mixing": "real", "rope_select": "per-frequency", "phase": "one", "rope_table": "strided",
    "latent": "pca", "center": False,
}  # fmt: skip


class GrowingState:
    """The plainest cache: concatenate."""

    def __init__(self) -> None:
        self.rows: tuple[Tensor, Tensor] | None = None

    def update(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        if self.rows is not None:
            first = torch.cat([self.rows[0], first], 2)
            second = torch.cat([self.rows[1], second], 2)
        self.rows = (first, second)
        return self.rows

    def seen(self) -> int:
        return 0 if self.rows is None else self.rows[0].shape[2]

    def span(self) -> None:
        return None


def config(
    heads: int = 4, kv_heads: int = 2, *, bias: bool = False, norm: bool = False, pairs: int = 4,
    width: int = 8, v_width: int = 8, softcap: float = 0.0, window: int = 0, out: bool = True,
) -> DenseConfig:  # fmt: skip
    head_norm = NormConfig(kind="rms", scope="head", eps=1e-6) if norm else None
    stream = StreamConfig(bias=bias, norm=head_norm)
    return DenseConfig(
        hidden_size=HIDDEN, memory_size=0, q=stream, k=stream, v=StreamConfig(bias=bias),
        rotary=RotaryConfig(inv_freq=tuple(3.0**-i for i in range(pairs))) if pairs else None,
        core=CoreConfig(
            heads=heads, kv_heads=kv_heads, qk_head_dim=width, v_head_dim=v_width, scale=0.3,
            softcap=softcap, pattern="sliding" if window else "causal", window=window,
        ),
        out_features=HIDDEN if out else None, out_bias=False,
    )  # fmt: skip


def dense(cfg: DenseConfig) -> DenseAttention:
    torch.manual_seed(3)
    mixer = DenseAttention(cfg).double().eval()
    for name, parameter in mixer.named_parameters():
        centre = 1.0 if "norm" in name else 0.0
        parameter.data = centre + 0.4 * torch.randn_like(parameter)
    return mixer


def moments(mixer: DenseAttention, queries: bool = False) -> SiteStatistics:
    needs = {"attention", "inputs", "sample", *(["queries"] if queries else [])}
    found = SiteStatistics.empty(mixer, needs)
    x = torch.randn(4, 50, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        found.add(mixer, x, None, torch.ones(4, 50))
    return found


CASES: dict[str, DenseConfig] = {
    "gqa": config(),
    "mha": config(4, 4),
    "mqa": config(4, 1),
    "bias": config(bias=True),
    "bias-no-out": config(bias=True, out=False),
    "qk-norm": config(norm=True),
    "qk-norm-bias": config(norm=True, bias=True),
    "partial-rotary": config(pairs=2),
    "no-rotary": config(pairs=0),
    "softcap": config(softcap=5.0),
    "window": config(window=5),
    "v-width": config(v_width=6),
}


SINKS = {"core": config().core.model_copy(update={"sinks": True})}


RELATIVE = RelativeConfig(buckets=(0, 1, 1, 2, 3, 4, 5), rows=6)


CASES |= {
    "sinks": config().model_copy(update=SINKS),
    "sinks-bias": config(bias=True).model_copy(update=SINKS),
    "sinks-bias-no-out": config(bias=True, out=False).model_copy(update=SINKS),
    "sinks-qk-norm-bias": config(norm=True, bias=True).model_copy(update=SINKS),
    "alibi": config(pairs=0).model_copy(update={"alibi": (0.5, 0.25, 0.125, 0.3)}),
    "relative": config(pairs=0).model_copy(update={"relative": RELATIVE}),
    "gate-bias": config(bias=True).model_copy(
        update={"gate": GateConfig(act="sigmoid", per_head=False, bias=True)}
    ),
    "gate-per-head": config().model_copy(update={"gate": GateConfig(act="silu", per_head=True)}),
}
