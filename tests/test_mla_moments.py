"""Moments that are compressed: CARE and SVD beside calibrated ones."""

from __future__ import annotations

import pytest
import torch
from mla_blocks import HIDDEN, config, dense, moments

from reattend.mixers.config import NormConfig
from reattend.passes.rewrite.mla_moments import key_moment, key_weight, latent_moment, shrunk_root
from reattend.passes.rewrite.mla_options import MlaOptions
from reattend.statistics import SiteStatistics, keys, normed


def test_care_without_shrinkage_is_the_activations_moment() -> None:
    mixer = dense(config())
    found = moments(mixer)
    care, _ = latent_moment(mixer, found, MlaOptions(latent="care", shrinkage=0.0))
    pca, _ = latent_moment(mixer, found, MlaOptions(latent="pca", center=False))
    scale = float(torch.diagonal(found.input_gram).mean()) / found.count
    assert torch.allclose(care * scale, pca, rtol=1e-9, atol=1e-9)


def test_care_shrunk_far_is_the_weights_moment() -> None:
    mixer = dense(config())
    found = moments(mixer)
    care, _ = latent_moment(mixer, found, MlaOptions(latent="care", shrinkage=1 - 1e-9))
    svd, _ = latent_moment(mixer, found, MlaOptions(latent="svd"))
    assert torch.allclose(care, svd, atol=1e-6)
    weight = torch.cat([mixer.k_proj.weight, mixer.v_proj.weight]).detach()
    assert torch.equal(svd, weight @ weight.t())


def test_the_root_is_a_root() -> None:
    found = moments(dense(config()))
    root = shrunk_root(found, 0.0)
    scaled = found.input_gram / torch.diagonal(found.input_gram).mean()
    assert torch.allclose(root @ root, scaled, atol=1e-10)
    assert root.shape == (HIDDEN, HIDDEN)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_centred_moments_are_about_the_mean(softcap: float) -> None:
    """Under a softcap a constant key shifts scores unevenly, so keys stay uncentred."""
    mixer = dense(config(softcap=softcap))
    found = moments(mixer)
    moment, mean = latent_moment(mixer, found, MlaOptions(latent="pca"))
    expected = found.total / found.count
    if softcap:
        expected = torch.cat([torch.zeros(16, dtype=torch.float64), expected[16:]])
    assert torch.allclose(mean, expected)
    raw = found.gram / found.count
    total = found.total / found.count
    about = raw - torch.outer(mean, total) - torch.outer(total, mean) + torch.outer(mean, mean)
    assert torch.allclose(moment, about)


def test_key_moment_includes_the_bias() -> None:
    mixer = dense(config(bias=True))
    x = torch.randn(300, HIDDEN, dtype=torch.float64)
    found = SiteStatistics.empty(mixer)
    with torch.no_grad():
        found.add(mixer, x[None], None, None)
        biased = mixer.k_proj(x)
    got = key_moment(mixer, found, weighted=False)
    assert torch.allclose(got, biased.t() @ biased / 300)


@pytest.mark.parametrize("scope", ["head", "full"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_behind_a_norm_keys_are_linear_at_its_mean_size(kind: str, scope: str) -> None:
    """Equal for the token that the sizes come from; right in the mean for tokens of other sizes."""
    norm = NormConfig(kind=kind, scope=scope, eps=1e-3, gain_offset=0.5)
    plain = config(norm=True)
    stream = plain.k.model_copy(update={"norm": norm})
    mixer = dense(plain.model_copy(update={"q": stream, "k": stream}))
    x = torch.randn(1, 1, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        key = normed(mixer, keys(mixer, x))[0, 0]
        one = SiteStatistics.empty(mixer)
        one.add(mixer, x, None, None)
        assert torch.allclose(key_weight(mixer, one) @ x[0, 0], key, atol=1e-13)
        three = SiteStatistics.empty(mixer)
        three.add(mixer, torch.cat([x, 40 * x, 7 * x], 1), None, torch.tensor([[1.0, 1.0, 0.0]]))
        twice = mixer.k_norm.size(keys(mixer, torch.cat([x, 40 * x], 1)).unflatten(
            -1, (2 if scope == "head" else 1, -1)))[0]  # fmt: skip
    expected = key.unflatten(0, (twice.shape[1], -1)) * (twice[0] / twice.mean(0))[:, None]
    assert torch.allclose(key_weight(mixer, three) @ x[0, 0], expected.flatten(), atol=1e-13)
    stored = SiteStatistics.from_tensors(three.tensors())
    assert torch.equal(stored.key_sizes, three.key_sizes)
    if scope == "head":
        part = three.part(mixer.config.core, [1])
        assert torch.equal(part.key_sizes, three.key_sizes[1:])
