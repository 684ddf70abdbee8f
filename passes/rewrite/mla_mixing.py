"""How the heads of one frequency are mixed into components: docs/math/mla.md section 3.

Write the rotary pair f of kv head g as one complex number, k in C^G. A rotation multiplies all of
k by the same phase, so *any* invertible complex A commutes with it: the components are `encode` k
and k is the sum of `decode` times them. Which A gathers most in few components:

- `real`: orthogonal, eigenvectors of the real part of E[k k^H] (TransMLA's RoRoPE);
- `complex`: unitary, eigenvectors of E[k k^H];
- `balanced`: keys weighted by what the score would lose if the rotation went, query energy times
  `Phase.lost` per kv head; then the eigenvalues *are* the score errors of dropping a component.
- `none`: every head by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reattend.mixers.dense import DenseConfig
from reattend.passes.rewrite.mla_options import Mixing
from reattend.passes.rewrite.mla_phase import Phase


@dataclass(frozen=True)
class Component:
    """One direction of one frequency.

    Attributes:
        frequency: f; `place`: position among its frequency's components, strongest first.
        encode: row [G], component = encode . k.
        decode: column [G], its share of k is decode * component.
        energy: mean |component|^2 times |decode|^2, its share of the key's energy.
        lost: expected squared score error, summed over heads, if its rotation is dropped.
    """

    frequency: int
    place: int
    encode: Tensor
    decode: Tensor
    energy: float
    lost: float


def components(
    config: DenseConfig, key_moment: Tensor, query_energy: Tensor, phase: Phase, mixing: Mixing
) -> list[Component]:
    """Every component of every frequency.

    Args:
        config: the block; its keys are [G, d] with d = [P real | P imaginary | rest].
        key_moment: mean of k k^T over the stacked keys with bias, [G d, G d].
        query_energy: mean |q_h(f)|^2, [H, P].
        phase: what would stand in for the rotation.
        mixing: see above.
    """
    groups, pairs = config.core.kv_heads, query_energy.shape[1]
    at_stake = (
        (query_energy * phase.lost / 2).reshape(groups, config.core.heads // groups, pairs).sum(1)
    )
    found = []
    for f in range(pairs):
        moment = hermitian(config, key_moment, f)
        encode, decode = _mix(moment, at_stake[:, f], mixing)
        strength = torch.einsum("jg,gi,ji->j", encode, moment, encode.conj()).real.clamp_min(0)
        for j in range(groups):
            found.append(
                Component(
                    f, j, encode[j], decode[:, j],
                    energy=float(strength[j] * decode[:, j].abs().square().sum()),
                    lost=float(strength[j] * (decode[:, j].abs().square() * at_stake[:, f]).sum()),
                )
            )  # fmt: skip
    return found


def hermitian(config: DenseConfig, key_moment: Tensor, f: int) -> Tensor:
    """E[k k^H] of frequency f over kv heads, complex [G, G]."""
    assert config.rotary is not None
    d = config.core.qk_head_dim
    real = torch.arange(config.core.kv_heads) * d + f
    imaginary = real + config.rotary.pairs
    across = key_moment[imaginary][:, real]
    same = key_moment[real][:, real] + key_moment[imaginary][:, imaginary]
    return torch.complex(same, across - across.t())


def _mix(moment: Tensor, weight: Tensor, mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Rows that encode and columns that decode, strongest component first."""
    root = torch.ones_like(weight)
    if mixing == "none":
        eye = torch.eye(len(moment), dtype=moment.dtype)
        return eye, eye
    if mixing == "balanced" and float(weight.max()) > 0:
        # Heads without weight would make A singular; a millionth of the largest is as good as 0.
        root = weight.clamp_min(1e-6 * float(weight.max())).sqrt()
    if mixing == "real":
        moment = moment.real.to(moment.dtype)
    weighted = root[:, None] * moment * root
    _, vectors = torch.linalg.eigh((weighted + weighted.conj().t()) / 2)
    basis = _fixed_phase(vectors.flip(1))
    return basis.conj().t() * root, basis / root[:, None]


def _fixed_phase(vectors: Tensor) -> Tensor:
    """Columns with their largest entry real and positive, so that LAPACK does not choose."""
    largest = vectors[vectors.abs().argmax(0), torch.arange(vectors.shape[1])]
    return vectors * (largest.conj() / largest.abs())
