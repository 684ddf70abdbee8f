"""Which heads each token uses, and with what weight: the router of Mixture-of-Heads attention.

Jin et al., arXiv 2410.11842, as their code computes it: a token's shared heads get weights of mean
1, its chosen heads get weights of mean 1 over those chosen, and a softmax of two, times 2, divides
between both kinds. So a router of zeros that leaves nothing out gives weights of exactly 1.
`qnorm` is the router of their MoH-LLaMA3-8B, without parameters: the norms of a token's queries.
Experts are weighed by the softmax itself (BAM, Zhang et al., arXiv 2408.08274), whose sum is 1.

Layout letters: B batch, N tokens, D hidden, H query heads, U units (query heads or KV groups), S
shared units, R routed ones, d key head width.
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn

from reattend.mixers.routed_config import RoutedConfig


class Routes(NamedTuple):
    """What a router decided for some tokens.

    `gate_BUN`: the weight of each unit, 0 where it is left out; `active_BUN`: which are used, None
    where every token uses all.
    """

    gate_BUN: Tensor
    active_BUN: Tensor | None


class Router(nn.Module):
    """Zero weights rank units by their number, so that training starts from a known choice.

    Attributes:
        k: routed units that a token uses now; `RoutedConfig.top_k` unless training says otherwise.
        balances: while training with a balance loss, that of every call since it was asked for.
    """

    def __init__(self, config: RoutedConfig) -> None:
        super().__init__()
        self.config, self.k = config, config.top_k
        self.balances: list[Tensor] | None = None
        linear, weighted = config.router == "linear", config.gate_by == "weighted"
        sizes = {
            "routed": config.routed if linear else 0,
            "shared": config.shared if weighted else 0,
            "share": 2 if weighted and config.shared and config.routed else 0,
        }
        for name, size in sizes.items():
            layer = nn.Linear(config.hidden_size, size, bias=False) if size else None
            if layer is not None:
                nn.init.zeros_(layer.weight)
            self.register_module(name, layer)

    routed: nn.Linear | None
    shared: nn.Linear | None
    share: nn.Linear | None

    def forward(self, x_BND: Tensor, q_BHNd: Tensor, real_BN: Tensor | None = None) -> Routes:
        """Routes of the tokens whose hidden states and queries these are.

        `real_BN` says which count for the balance loss; None: all.
        """
        c = self.config
        wide = torch.float64 if x_BND.dtype == torch.float64 else torch.float32
        shared_BSN = x_BND.new_ones(x_BND.shape[0], c.shared, x_BND.shape[1], dtype=wide)
        if self.shared is not None:
            shared_BSN = mean_one(_scores(self.shared, x_BND, wide))
        if not c.routed:
            return Routes(shared_BSN, None)
        z_BRN = self.ranks(x_BND, q_BHNd, wide)
        chosen_BRN = best(z_BRN, self.k)
        if self.balances is not None and torch.is_grad_enabled():
            self.balances.append(balance(z_BRN, chosen_BRN, real_BN))
        weighted = c.gate_by == "weighted"
        if c.route == "expert":
            return Routes(z_BRN.softmax(1), None)
        gate_BRN = mean_one(z_BRN, chosen_BRN) if weighted else chosen_BRN.to(wide)
        if torch.is_grad_enabled() and (not weighted or self.k == 1):
            # a gate that is 1 whatever its score: its gradient is that of its probability
            p_BRN = z_BRN.softmax(1)
            gate_BRN = gate_BRN + (p_BRN - p_BRN.detach())
        if self.share is not None:
            each_B2N = mean_one(_scores(self.share, x_BND, wide))
            shared_BSN, gate_BRN = shared_BSN * each_B2N[:, :1], gate_BRN * each_B2N[:, 1:]
        active = None
        if self.k < c.routed:
            active = torch.cat([chosen_BRN.new_ones(shared_BSN.shape), chosen_BRN], 1)
        return Routes(torch.cat([shared_BSN, gate_BRN], 1), active)

    def trained(self, share: float) -> None:
        """See `Schooled.trained`: all routed units are used at first, fewer and fewer later."""
        c = self.config
        done = 1.0 if not c.anneal else min(1.0, share / c.anneal)
        self.k = c.top_k + ceil((c.routed - c.top_k) * (1 - done) - 1e-9)
        if c.balance_loss and c.routed and self.balances is None:
            self.balances = []

    def ranks(self, x_BND: Tensor, q_BHNd: Tensor, dtype: torch.dtype) -> Tensor:
        """What routed units are ranked by, and whose softmax is their probability, [B, R, N]."""
        if self.routed is not None:
            return _scores(self.routed, x_BND, dtype)
        norm_BUN = unit_norms(q_BHNd.to(dtype), self.config.units)[:, self.config.shared :]
        apart = norm_BUN.std(1, keepdim=True, unbiased=self.config.routed > 1)
        scaled: Tensor = norm_BUN / apart.clamp_min(torch.finfo(dtype).tiny)
        return scaled


def balance(z_BRN: Tensor, chosen_BRN: Tensor, real_BN: Tensor | None) -> Tensor:
    """R sum_u f_u P_u: k where tokens are spread evenly over the routed units, more elsewhere.

    f is the share of tokens that use a unit, without a gradient; P its mean probability. In the
    paper's code it is mean(f P) R^2, the same.
    """
    weight_BN = torch.ones_like(z_BRN[:, 0]) if real_BN is None else real_BN.to(z_BRN.dtype)
    weight_BN = weight_BN / weight_BN.sum().clamp_min(1)
    f_R = (chosen_BRN * weight_BN[:, None]).sum((0, 2))
    p_R = (z_BRN.softmax(1) * weight_BN[:, None]).sum((0, 2))
    return z_BRN.shape[1] * (f_R * p_R).sum()


def unit_norms(q_BHNd: Tensor, units: int) -> Tensor:
    """The norm of each unit's queries, [B, U, N]; rotations do not change it."""
    rows: Tensor = q_BHNd.unflatten(1, (units, -1))
    return rows.square().sum((2, 4)).sqrt()


def best(z_BRN: Tensor, k: int) -> Tensor:
    """Which of R are among the k highest; the first of equals win."""
    if k >= z_BRN.shape[1]:
        return torch.ones_like(z_BRN, dtype=torch.bool)
    order = z_BRN.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(z_BRN, dtype=torch.bool).scatter_(1, order[:, :k], True)


def mean_one(z_BUN: Tensor, chosen_BUN: Tensor | None = None) -> Tensor:
    """Softmax over the chosen units times their number, 0 elsewhere; equal scores give 1."""
    if chosen_BUN is not None:
        z_BUN = z_BUN.masked_fill(~chosen_BUN, float("-inf"))
    e_BUN = (z_BUN - z_BUN.detach().amax(1, keepdim=True)).exp()
    count: Tensor | int = z_BUN.shape[1]
    if chosen_BUN is not None:
        count = chosen_BUN.sum(1, keepdim=True)
    return e_BUN * (count / e_BUN.sum(1, keepdim=True))


def _scores(layer: nn.Linear, x_BND: Tensor, dtype: torch.dtype) -> Tensor:
    scores: Tensor = layer(x_BND)
    return scores.to(dtype).transpose(1, 2)
