"""`to: masa`: the projections of several layers become combinations of fewer atoms that they share.

W_l = sum over s of c_ls D_s for the layers l of a group, with atoms of their own for queries, keys,
values and the output ("Share Your Attention", arXiv 2508.04581, which trains it from scratch). Here
atoms start from the trained weights: of all that S atoms can make, what the blocks' own inputs show
least difference to. Weights are saved, and neither cache nor arithmetic. Exact with as many atoms
as layers. Derivation: docs/math/heads.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from reattend.mixers.config import Frozen
from reattend.mixers.dense import DenseAttention, DenseConfig
from reattend.mixers.pooled import PROJECTIONS, PooledAttention, PooledConfig, PooledLinear
from reattend.passes.base import Refusal
from reattend.passes.rewrite.base import Built, Conversion, Cost, Subject, dense_cost
from reattend.passes.rewrite.importance import joined
from reattend.passes.rewrite.moh_options import Count
from reattend.passes.rewrite.sparse_build import like
from reattend.statistics import Need


class MasaOptions(Frozen):
    """How many atoms, and who shares them.

    Attributes:
        atoms: of each projection: a count, or a share of the layers that share them (rounded up).
        layers_each: layers, one after the other, that share atoms; None: all that the rule takes.
        group, size, place: first of the sites that share atoms, which owns them, how many they are,
            and which of them this is; not for plans.
    """

    atoms: Count = 0.5
    layers_each: int | None = Field(default=None, ge=1)
    group: str = ""
    size: int = Field(default=1, ge=1)
    place: int = Field(default=0, ge=0)


class ToMasa(Conversion):
    """Blocks with four linear projections, those of equal sizes together."""

    name = "masa"
    Options = MasaOptions
    joins = True
    adapts = False

    def check(self, config: DenseConfig, options: MasaOptions) -> Refusal | None:
        """Reads no weight."""
        for name, stream in (("queries", config.q), ("keys", config.k), ("values", config.v)):
            if stream.opaque is not None:
                return Refusal(f"{name} are made by the model's own steps, not by one projection")
        if config.out_features is None:
            return Refusal("it has no output projection of its own")
        if options.atoms == 0:
            return Refusal("atoms: 0: weights must be made of something")
        if config.cross:
            return Refusal("what atoms lose is measured on one input, and its keys have another")
        if config.core.pattern == "opaque" or config.added is not None:
            return Refusal(
                "what its output projection reads is measured without the model, and its mask is "
                "the model's own"
            )
        return None

    def join(self, members: Sequence[tuple[str, DenseConfig, Any]]) -> list[Any]:
        """Which sites share atoms; a refusal where their projections differ in size."""
        found: list[Any] = []
        each = members[0][2].layers_each or len(members)
        for begin in range(0, len(members), each):
            group = members[begin : begin + each]
            first = group[0][1]
            owner = group[0][0]
            for place, (path, config, options) in enumerate(group):
                wanted = atoms(options, len(group))
                if _sizes(config) != _sizes(first):
                    found.append(Refusal(
                        f"its projections have other sizes than those of {owner}, with which "
                        f"{path} would share atoms"
                    ))  # fmt: skip
                elif wanted > len(group):
                    found.append(
                        Refusal(f"atoms: {wanted} for {len(group)} layers that share them")
                    )
                else:
                    told = {"group": owner, "size": len(group), "place": place}
                    found.append(options.model_copy(update=told))
        return found

    def wants(self, config: DenseConfig, options: MasaOptions) -> frozenset[Need]:
        """Moments of the block's input, and rows of it, unless nothing is lost."""
        exact = atoms(options, options.size) == options.size
        return frozenset() if exact else frozenset({"gram", "inputs", "sample"})

    def solves(self, options: MasaOptions) -> int:
        """Only sums of products: as many numbers as layers are solved for."""
        return 0

    def outcome(self, config: DenseConfig, options: MasaOptions) -> PooledConfig:
        """The mixer's description."""
        return PooledConfig.model_validate(
            {
                **config.model_dump(exclude={"kind"}),
                "atoms": atoms(options, options.size),
                "owner": options.group if options.place else "",
            }
        )

    def exact_setting(self, config: DenseConfig) -> MasaOptions:
        """As many atoms as layers."""
        return MasaOptions(atoms=1.0)

    def cost(self, config: DenseConfig, options: MasaOptions) -> Cost:
        """Atoms count where they are owned; every call forms the weights of its block."""
        plain = dense_cost(config)
        made = atoms(options, options.size)
        size = sum(a * b for a, b in _sizes(config))
        own = 4 * made + (0 if options.place else made * size)
        return Cost(
            plain.cache, plain.parameters - size + own,
            plain.flops_per_token + 2 * made * size, plain.context,
        )  # fmt: skip

    def build(self, dense: DenseAttention, statistics: Any, options: MasaOptions) -> Built:
        """One block that shares with nobody: as many atoms as layers, which is one."""
        (built,) = self.build_together([Subject("", dense, statistics, options)]).values()
        return built

    def build_together(self, subjects: Sequence[Subject]) -> dict[str, Built]:
        """Atoms for all, then each block's shares of them."""
        options = subjects[0].options
        wanted = atoms(options, len(subjects))
        shares, pools = torch.eye(len(subjects), dtype=torch.float64), {}
        found: dict[str, tuple[Tensor, list[Tensor]]] = {}
        lost = {}
        moments = {} if wanted == len(subjects) else _input_moments(subjects)
        for name in PROJECTIONS:
            weights = [_weight(s.dense, name) for s in subjects]
            if moments:
                shares, pools[name], gone = fitted(weights, moments[name], wanted)
                lost[f"{name}_lost"] = f"{gone:.4f}"
            else:
                pools[name] = torch.stack(weights)
            found[name] = (pools[name], list(shares))
        made = {}
        for place, subject in enumerate(subjects):
            mixer = like(subject.dense, PooledAttention)
            mixer.begin(self.outcome(subject.dense.config, subject.options))
            tensor = next(subject.dense.parameters())
            for name in PROJECTIONS:
                layer: PooledLinear = getattr(mixer, name)
                layer.share.data = found[name][1][place].to(tensor)
                if mixer.pool is not None:
                    getattr(mixer.pool, name).data = found[name][0].to(tensor)
            mixer.train(subject.dense.training)
            told: dict[str, Any] = {"atoms": f"{wanted} for {len(subjects)} layers", **lost}
            made[subject.path] = Built(mixer, "learned" if moments else "exact", told)
        return made


def atoms(options: MasaOptions, layers: int) -> int:
    """S, for a group of so many layers."""
    share = options.atoms
    return ceil(share * layers - 1e-9) if isinstance(share, float) else share


def fitted(
    weights: Sequence[Tensor], moments: Sequence[Tensor], wanted: int
) -> tuple[Tensor, Tensor, float]:
    """Shares [n, S], atoms [S, out, in], and what is lost of all outputs, a share of their energy.

    With C the mean of the layers' E[x x^T], each over the energy of its layer's output, the best S
    atoms under C span the leading right singular vectors of the stacked vec(W_l C^(1/2)); they are
    combinations of the W_l, found from the [n, n] products alone. Then each layer's shares are
    solved for under its own moments.

    Args:
        weights: W_l [out, in], float64.
        moments: sum of x x^T [in, in] of each layer's own input.
        wanted: S.
    """
    energy = [float(((w @ c) * w).sum()) for w, c in zip(weights, moments, strict=True)]
    scaled = [w / max(e, 1e-300) ** 0.5 for w, e in zip(weights, energy, strict=True)]
    mean = torch.stack([c / c.trace().clamp_min(1e-300) for c in moments]).mean(0)
    flat = torch.stack([w.flatten() for w in scaled])
    products = torch.stack([(w @ mean).flatten() for w in scaled]) @ flat.T
    _, vectors = torch.linalg.eigh((products + products.T) / 2)
    chosen = vectors[:, -wanted:]
    pool = (chosen.T @ flat).unflatten(1, weights[0].shape)
    # of the weights' own size: a step of training is as long as the learning rate for all of them
    size = torch.stack([w.norm() for w in weights]).mean()
    pool = pool * (size / pool.flatten(1).norm(dim=1).clamp_min(1e-300))[:, None, None]
    shares, lost = [], 0.0
    for w, c, e in zip(weights, moments, energy, strict=True):
        seen = torch.stack([d @ c for d in pool]).flatten(1)
        normal, right = seen @ pool.flatten(1).T, seen @ w.flatten()
        share = torch.linalg.lstsq(normal, right[:, None], driver="gelsd").solution[:, 0]
        gap = w - torch.einsum("s,soi->oi", share, pool)
        lost += float(((gap @ c) * gap).sum()) / max(e, 1e-300)
        shares.append(share)
    return torch.stack(shares), pool, lost / len(weights)


def _input_moments(subjects: Sequence[Subject]) -> dict[str, list[Tensor]]:
    """Sum of x x^T of what each projection reads, by projection and layer."""
    found: dict[str, list[Tensor]] = {name: [] for name in PROJECTIONS}
    for subject in subjects:
        statistics = subject.statistics
        assert statistics.input_gram is not None and statistics.samples is not None
        for name in PROJECTIONS[:3]:
            found[name].append(statistics.input_gram)
        with torch.no_grad():
            heads = torch.cat(joined(subject.dense, statistics.samples)).flatten(1)
        found["o_proj"].append(heads.T @ heads)
    return found


def _weight(dense: DenseAttention, name: str) -> Tensor:
    layer: nn.Linear = getattr(dense, name)
    return layer.weight.detach().double().cpu()


def _sizes(config: DenseConfig) -> tuple[tuple[int, int], ...]:
    """Outputs and inputs of the four projections."""
    core, hidden = config.core, config.hidden_size
    queries, keys = (n * core.qk_head_dim for n in (core.heads, core.kv_heads))
    return (
        (queries, hidden), (keys, hidden), (core.kv_heads * core.v_head_dim, hidden),
        (config.out_features or 0, core.heads * core.v_head_dim),
    )  # fmt: skip
